"""Weights of other projects: converted, and compared with the networks that they come from."""

import io
import pickle

import pytest
import torch
from monai.networks.nets import UNETR, MaskedAutoEncoderViT
from monai.networks.nets import ViT as MonaiViT
from safetensors.torch import save_file

from biovfm_monai.checkpoints import (
    convert,
    encoder_info,
    from_huggingface,
    from_monai,
    from_timm,
    inflate,
    load_encoder,
    read_weights,
    with_channels,
)
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

transformers = pytest.importorskip("transformers", reason="the reference networks are not installed (extra 'test')")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def randomised(network):
    """Random weights everywhere, biases and factors too, so that a wrong place cannot hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    return network.eval()


def huggingface(kind, **options):
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    return randomised(model(config(**SIZES, **options)))


HUGGING_FACE = {
    "ViT": ("ViT", {"intermediate_size": 64}),
    "ViT without bias": ("ViT", {"intermediate_size": 64, "qkv_bias": False}),
    "Dinov2": ("Dinov2", {}),
    "Dinov2 with SwiGLU": ("Dinov2", {"use_swiglu_ffn": True}),
    "Dinov2 with registers": ("Dinov2WithRegisters", {}),
    "DINOv3": ("DINOv3ViT", {"intermediate_size": 64, "num_register_tokens": 4}),
    "DINOv3 with SwiGLU": (
        "DINOv3ViT",
        {"intermediate_size": 64, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
}


@pytest.mark.parametrize(("kind", "options"), HUGGING_FACE.values(), ids=HUGGING_FACE.keys())
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_a_hugging_face_network_gives_the_same_tokens_after_conversion(tmp_path, kind, options, size):
    reference = huggingface(kind, **options)
    reference.save_pretrained(tmp_path)
    encoder, dropped = from_huggingface(read_weights(tmp_path), num_heads=4)
    image = torch.randn(2, 3, *size)
    extra = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    with torch.no_grad():
        expected = reference(pixel_values=image, **extra).last_hidden_state
        torch.testing.assert_close(encoder(image), expected, rtol=1e-5, atol=1e-5)
    assert set(dropped) <= {"pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"}


def test_a_hugging_face_mae_gives_the_same_tokens_after_conversion(tmp_path):
    decoder = {f"decoder_{name}": value for name, value in SIZES.items() if name not in ("image_size", "patch_size")}
    config = transformers.ViTMAEConfig(**SIZES, **decoder, intermediate_size=64, mask_ratio=0.0)
    reference = randomised(transformers.ViTMAEForPreTraining(config))
    reference.save_pretrained(tmp_path)
    encoder, dropped = from_huggingface(read_weights(tmp_path), num_heads=4)
    image, order = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, -1).float()
    with torch.no_grad():
        expected = reference.vit(pixel_values=image, noise=order).last_hidden_state
        torch.testing.assert_close(encoder(image), expected, rtol=1e-5, atol=1e-5)
    assert all(name.startswith("decoder.") for name in dropped)


LEARNED = {"pos_embed_type": "learnable", "decoder_pos_embed_type": "learnable"}
MONAI = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 4}


@pytest.mark.parametrize("size", [(32, 32), (16, 16, 16), (16, 32, 24)])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_monai_vit_gives_the_same_tokens_after_conversion(size, qkv_bias):
    reference = randomised(MonaiViT(2, size, 8, num_layers=2, spatial_dims=len(size), qkv_bias=qkv_bias, **MONAI))
    encoder, dropped = from_monai(reference.state_dict(), num_heads=4, img_size=size)
    image = torch.randn(2, 2, *size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), reference(image)[0], rtol=1e-5, atol=1e-5)
    assert all("norm_cross_attn" in name for name in dropped)


def test_a_monai_mae_gives_the_same_tokens_after_conversion():
    reference = randomised(
        MaskedAutoEncoderViT(
            1, (16, 16, 16), 8, num_layers=2, decoder_hidden_size=24, decoder_num_heads=4, **LEARNED, **MONAI
        )
    )
    encoder, _ = from_monai(reference.state_dict(), num_heads=4)
    image = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        x = reference.patch_embedding(image)
        x = reference.blocks(torch.cat([reference.cls_token.expand(2, -1, -1), x], dim=1))
        torch.testing.assert_close(encoder(image), x, rtol=1e-5, atol=1e-5)


def test_the_encoder_of_a_monai_unetr_gives_the_same_tokens_after_conversion():
    reference = randomised(UNETR(1, 2, (32, 32, 32), feature_size=4, **MONAI))
    encoder, dropped = from_monai(reference.state_dict(), num_heads=4)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), reference.vit(image)[0], rtol=1e-5, atol=1e-5)
    assert any(name.startswith("encoder1.") for name in dropped)


def timm_layout(encoder):
    """An encoder's weights under the names, and in the shapes, of timm's and the official files."""
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    p = encoder.patch_size[0]
    kernel = state.pop("patch_embed.weight").unflatten(1, (p, p, encoder.in_channels)).permute(0, 3, 1, 2)
    state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = kernel, state.pop("patch_embed.bias")
    grid = state.pop("pos_embed").flatten(2).transpose(1, 2)
    # The class token's own position is stored apart from it.
    place = torch.randn(1, 1, encoder.embed_dim)
    state["cls_token"] = state["cls_token"] - place
    state["pos_embed"] = torch.cat([place, grid], dim=1)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    return state


def plain(**options):
    return randomised(ViT(3, (32, 32), 8, embed_dim=32, depth=3, num_heads=4, pos_embed="learn", **options))


LAYOUTS = {
    "MAE": (lambda s: {"model": s | {"mask_token": torch.zeros(1), "decoder_pred.weight": torch.zeros(1)}}, {}),
    "DINO": (lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}, "student": {}, "epoch": 3}, {}),
    "DINO with heads": (
        lambda s: {
            "teacher": {f"module.backbone.{k}": v for k, v in s.items()} | {"module.head.mlp.0.bias": s["norm.bias"]}
        },
        {},
    ),
    "DINOv2": (lambda s: s | {"mask_token": torch.zeros(1, 32)}, {"init_values": 1.0}),
    "DINOv2 with registers": (lambda s: s, {"init_values": 1.0, "reg_tokens": 4, "pos_antialias": True}),
    "DINOv2 in training": (
        lambda s: {"teacher": {f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in s.items()}},
        {"init_values": 1.0},
    ),
    "DINOv2 with SwiGLU": (
        lambda s: {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in s.items()},
        {"init_values": 1.0, "swiglu_mlp": True},
    ),
    "MoCo v3": (
        lambda s: {"state_dict": {f"module.base_encoder.{k}": v for k, v in s.items()} | {
            "module.momentum_encoder.norm.bias": s["norm.bias"], "module.predictor.0.weight": s["norm.bias"],
        }},
        {},
    ),
    "timm": (lambda s: s | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}, {}),
    "timm without bias": (lambda s: s, {"qkv_bias": False}),
}  # fmt: skip


@pytest.mark.parametrize(("wrap", "options"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_file_in_an_official_layout_gives_back_the_encoder_it_was_made_from(tmp_path, wrap, options):
    expected = plain(**options)
    torch.save(wrap(timm_layout(expected)), tmp_path / "weights.pth")
    encoder, _ = from_timm(read_weights(tmp_path / "weights.pth"), num_heads=4)
    image = torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(encoder(image), expected(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["average", "center"])
@pytest.mark.parametrize("options", [{}, {"rope": "index", "pos_embed": "none"}, {"reg_tokens": 2}])
def test_an_inflated_encoder_gives_2d_images_the_tokens_they_had(mode, options):
    flat = randomised(ViT(3, (32, 32), 8, embed_dim=32, depth=2, num_heads=4, **{"pos_embed": "learn", **options}))
    volume = inflate(flat, (16, 32, 32), mode=mode)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(volume(image), flat(image), rtol=1e-5, atol=1e-5)
    kernel = volume.patch_embed.weight.unflatten(1, (8, -1))
    torch.testing.assert_close(kernel.sum(1), flat.patch_embed.weight)
    if mode == "average":
        torch.testing.assert_close(
            volume(image[:, :, None].expand(-1, -1, 8, -1, -1)), flat(image), rtol=1e-4, atol=1e-5
        )
    else:
        assert (kernel[:, [0, 1, 2, 5, 6, 7]] == 0).all()


def test_an_encoder_of_one_channel_sees_a_grey_image_as_its_model_saw_it_in_colour():
    colour = plain()
    grey = with_channels(colour, 1)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    again = with_channels(grey, 3)
    torch.testing.assert_close(again(image.expand(-1, 3, -1, -1)), grey(image), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="one of the two must be 1"):
        with_channels(colour, 4)


# Bad input


def test_an_unknown_tensor_is_an_error_and_not_left_out():
    state = timm_layout(plain()) | {"blocks.0.attn.surprise": torch.zeros(1)}
    with pytest.raises(InputError, match=r"not known in the layout 'timm': blocks\.0\.attn\.surprise"):
        from_timm(state, num_heads=4)


def test_a_missing_tensor_is_named():
    state = timm_layout(plain())
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(InputError, match=r"blocks\.2\.mlp\.fc2\.bias|blocks\.1\.mlp\.fc2\.bias"):
        from_timm(state, num_heads=4)


@pytest.mark.parametrize(("convert", "family"), [(from_timm, "Hugging Face"), (from_monai, "Hugging Face")])
def test_a_checkpoint_of_another_family_is_refused_with_the_name_of_its_own(convert, family):
    with pytest.raises(InputError, match=f"It looks like {family}"):
        convert(huggingface("Dinov2").state_dict())
    with pytest.raises(InputError, match="It looks like timm"):
        from_huggingface(timm_layout(plain()))


def test_positions_that_are_no_grid_are_refused():
    state = timm_layout(plain())
    state["pos_embed"] = state["pos_embed"][:, :-2]
    with pytest.raises(InputError, match="15 positions are no grid"):
        from_timm(state, num_heads=4)


def test_a_width_whose_heads_cannot_be_told_asks_for_them():
    with pytest.raises(InputError, match="--num_heads"):
        from_timm(timm_layout(plain()))


class Malicious:
    def __reduce__(self):
        return print, ("code from the file was run",)


def test_a_pickle_that_runs_code_is_refused_with_the_name_of_what_it_wants(tmp_path, capsys):
    torch.save({"model": {"x": torch.zeros(1)}, "args": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad\.pth: cannot be opened without running code from it .*print"):
        read_weights(tmp_path / "bad.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match=r"old\.pth"):
        read_weights(tmp_path / "old.pth")
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, name):
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1000)}, buffer)
    save_file({"x": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    whole = buffer.getvalue() if name == "cut.pth" else (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{name}: truncated or no checkpoint.*again"):
        read_weights(tmp_path / name)


def test_files_without_weights_are_refused(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: holds no weights, but epoch, lr"):
        read_weights(tmp_path / "a.pth")
    with pytest.raises(InputError, match="no such checkpoint"):
        read_weights(tmp_path / "b.pth")


# The whole way, from a file to an encoder file


def test_a_hugging_face_folder_becomes_an_encoder_file_of_volumes_with_one_channel(tmp_path):
    reference = huggingface("Dinov2")
    reference.save_pretrained(tmp_path / "their model")
    left_out = convert(
        "huggingface", tmp_path / "their model", tmp_path / "encoder.safetensors", in_channels=1,
        volume_size=(16, 32, 32), mean=0.5, std=0.25,
    )  # fmt: skip
    assert left_out == ["embeddings.mask_token"]
    info = encoder_info(tmp_path / "encoder.safetensors")
    assert info["training"]["left_out"] == left_out
    assert info["preprocessing"] == {"mean": 0.5, "std": 0.25}
    encoder, image = load_encoder(tmp_path / "encoder.safetensors"), torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        expected = reference(pixel_values=image.expand(-1, 3, -1, -1)).last_hidden_state
        torch.testing.assert_close(encoder(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dinov5", "x.pth"), "source 'dinov5' is unknown. Give one of huggingface, monai, timm"),
        (("timm", "x.pth"), r"x\.pth: no such checkpoint"),
    ],
)
def test_a_conversion_that_cannot_be_made_says_why(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        convert(arguments[0], tmp_path / arguments[1], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_network_that_computes_something_else_is_refused(tmp_path):
    huggingface("ViT", hidden_act="relu", intermediate_size=64).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"config\.json: hidden_act 'relu'"):
        convert("huggingface", tmp_path, tmp_path / "out.safetensors")
