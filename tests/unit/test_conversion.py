"""Weights of other projects: converted, and compared with the networks that they come from."""

import argparse
import copy
import io
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNETR, MaskedAutoEncoderViT
from monai.networks.nets import ViT as MonaiViT
from monai.transforms import CenterSpatialCrop, Compose, LoadImage, Orientation, ScaleIntensity
from safetensors.torch import save_file

from biovfm_monai import checkpoints, cli
from biovfm_monai.checkpoints import (
    convert,
    encoder_info,
    from_dinov3,
    from_eva02,
    from_huggingface,
    from_mae,
    from_monai,
    from_pumit,
    from_timm,
    inflate,
    load_encoder,
    read_weights,
    with_channels,
)
from biovfm_monai.checkpoints.dinov3 import interleave
from biovfm_monai.data import sample_datalist
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


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_a_hugging_face_mae_gives_the_same_tokens_after_conversion(tmp_path, size):
    decoder = {f"decoder_{name}": value for name, value in SIZES.items() if name not in ("image_size", "patch_size")}
    config = transformers.ViTMAEConfig(**SIZES, **decoder, intermediate_size=64, mask_ratio=0.0)
    reference = randomised(transformers.ViTMAEForPreTraining(config))
    reference.save_pretrained(tmp_path)
    encoder, dropped = from_huggingface(read_weights(tmp_path), num_heads=4)
    image, order = torch.randn(2, 3, *size), torch.arange(size[0] * size[1] // 64).expand(2, -1).float()
    with torch.no_grad():
        expected = reference.vit(image, noise=order, interpolate_pos_encoding=True).last_hidden_state
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
    kernel = state.pop("patch_embed.weight").unflatten(1, (-1, encoder.in_channels))
    state["patch_embed.proj.weight"] = kernel.transpose(1, 2).unflatten(2, encoder.patch_size)
    state["patch_embed.proj.bias"] = state.pop("patch_embed.bias")
    if encoder.spatial_dims == 2 and "pos_embed" in state:
        # The table begins with the class token's own position.
        state["pos_embed"] = torch.cat([state.pop("cls_pos"), state["pos_embed"].flatten(2).transpose(1, 2)], dim=1)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    return state


def named(state, *pairs):
    for ours, theirs in pairs:
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    return state


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def eva_layout(state):
    """EVA-02's names, from timm_layout's: separate projections, and a bias of queries and of values."""
    result = {"rope.freqs_cos": torch.zeros(16, 8), "mask_token": torch.zeros(1), "lm_head.bias": torch.zeros(3)}
    for name, value in state.items():
        if name.endswith("attn.qkv.weight"):
            parts = zip("qkv", value.chunk(3), strict=True)
            result |= {name.replace("qkv", f"{part}_proj"): matrix for part, matrix in parts}
        elif name.endswith("qv_bias"):
            result |= {name.replace("qv_bias", f"{part}_bias"): value[n] for n, part in enumerate("qv")}
        elif ".mlp.fc1." in name:
            result |= {name.replace("fc1", f"w{n + 1}"): part for n, part in enumerate(value.chunk(2))}
        else:
            result[name.replace("mlp.fc2", "mlp.w3").replace("mlp.norm", "mlp.ffn_ln")] = value
    return result


def dinov3_layout(encoder):
    """DINOv3's names: a mask switches the keys' bias off, and rotary pairs lie half a head apart."""
    apart = copy.deepcopy(encoder)
    interleave(apart, back=True)
    state = timm_layout(apart)
    for n in range(len(encoder.blocks)):
        q, v = state.pop(f"blocks.{n}.attn.qv_bias")
        state[f"blocks.{n}.attn.qkv.bias"] = torch.cat([q, torch.full_like(q, 7.0), v])
        state[f"blocks.{n}.attn.qkv.bias_mask"] = torch.ones(3 * len(q)).index_fill(
            0, torch.arange(len(q), 2 * len(q)), 0
        )
        if encoder.arguments["swiglu_mlp"]:
            for kind in ("weight", "bias"):
                state |= {
                    f"blocks.{n}.mlp.w{m + 1}.{kind}": part
                    for m, part in enumerate(state.pop(f"blocks.{n}.mlp.fc1.{kind}").chunk(2))
                }
                state[f"blocks.{n}.mlp.w3.{kind}"] = state.pop(f"blocks.{n}.mlp.fc2.{kind}")
    state["storage_tokens"] = state.pop("register_tokens")
    return state | {
        "rope_embed.periods": 100 ** (torch.arange(2) / 2),
        "mask_token": torch.zeros(1),
        "local_cls_norm.bias": torch.zeros(1),
    }


def plain(**options):
    sizes = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "pos_embed": "learn"}
    options = sizes | options
    flat = len(options["img_size"]) == 2 and options["pos_embed"] == "learn"
    return randomised(ViT(3, **{"no_embed_class": not flat, **options}))


DINOV2 = {"init_values": 1.0, "global_pool": "token"}
REGISTERS = {**DINOV2, "reg_tokens": 4, "pos_antialias": True}
EVA = {"swiglu_mlp": True, "k_bias": False, "rope": "index"}
DINOV3 = {**DINOV2, "reg_tokens": 4, "pos_embed": "none", "k_bias": False, "rope": "normalised", "norm_eps": 1e-5}
PUMIT = {
    **EVA, "scale_mlp": True, "img_size": (24, 32, 32), "norm_eps": 1e-5, "global_pool": "token",
}  # fmt: skip
ZERO = torch.zeros(1)
TOKEN = {"global_pool": "token"}

# name -> source, what stands in the file for a state in timm_layout, the encoder's options
LAYOUTS = {
    "timm": ("timm", lambda s: s | {"head.weight": torch.zeros(10, 32), "head.bias": ZERO}, TOKEN),
    "timm without bias": ("timm", lambda s: s, {**TOKEN, "qkv_bias": False}),
    "timm with qk-norm": ("timm", lambda s: s, {**TOKEN, "qk_norm": True}),
    "timm pooled by its average": (
        "timm", lambda s: s | {"fc_norm.weight": ZERO, "fc_norm.bias": ZERO}, {"final_norm": False},
    ),
    "MAE": ("mae", lambda s: {"model": s | {"mask_token": ZERO, "decoder_blocks.0.norm1.bias": ZERO}}, {}),
    "DINO": (
        "dino", lambda s: {"teacher": prefixed(s, "backbone."), "student": {}, "epoch": 3}, {"global_pool": "token"},
    ),
    "DINO with heads": (
        "dino", lambda s: {"teacher": prefixed(s, "module.backbone.") | {"module.head.mlp.0.bias": ZERO}},
        {"global_pool": "token"},
    ),
    "DINOv2": ("dinov2", lambda s: s | {"mask_token": torch.zeros(1, 32)}, DINOV2),
    "DINOv2 with registers": ("dinov2", lambda s: s, REGISTERS),
    "DINOv2 in training": (
        "dinov2", lambda s: {"teacher": prefixed(named(s, ("blocks.", "blocks.0.")), "backbone.") | {
            "dino_head.mlp.0.bias": ZERO, "ibot_head.mlp.0.bias": ZERO,
        }}, DINOV2,
    ),
    "DINOv2 with SwiGLU": (
        "dinov2", lambda s: named(s, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")), {**DINOV2, "swiglu_mlp": True},
    ),
    "DINOv3": ("dinov3", lambda s: s, DINOV3),
    "DINOv3 with SwiGLU": ("dinov3", lambda s: s, {**DINOV3, "swiglu_mlp": True}),
    "MoCo v3": (
        "mocov3", lambda s: {"state_dict": prefixed(s, "module.base_encoder.") | {
            "module.base_encoder.head.0.weight": ZERO, "module.momentum_encoder.norm.bias": ZERO,
            "module.predictor.0.weight": ZERO,
        }}, {"global_pool": "token"},
    ),
    "BioVFM-M": ("biovfm", lambda s: {"model": s | {"mask_token": ZERO, "decoder_pred.weight": ZERO}}, {}),
    "BioVFM-D": (
        "biovfm", lambda s: {"teacher": prefixed(s, "module.backbone.") | {"module.dino_head.mlp.0.bias": ZERO}},
        DINOV2,
    ),
    "EVA-02": ("eva02", lambda s: {"module": eva_layout(s)}, {**EVA, "scale_mlp": True, "ref_feat_shape": [16, 16]}),
    "EVA-02 of timm": (
        "eva02",
        lambda s: named(
            eva_layout(s), ("q_bias", "q_proj.bias"), ("v_bias", "v_proj.bias"), ("mlp.w1", "mlp.fc1_g"),
            ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2"), ("ffn_ln", "norm"),
        ),
        {**EVA, "scale_mlp": True, "ref_feat_shape": [16, 16]},
    ),
    "EVA-02 tiny": (
        "eva02",
        lambda s: {
            name: value for n, v in named(s, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")).items()
            for name, value in ([(n, v)] if "qv_bias" not in n else [
                (n.replace("qv_bias", "q_bias"), v[0]), (n.replace("qv_bias", "v_bias"), v[1]),
            ])
        },
        {**EVA, "ref_feat_shape": [16, 16]},
    ),
    "PUMIT": (
        "pumit", lambda s: {"state_dict": eva_layout(s) | {"mim_head.0.weight": ZERO}, "epoch": 1}, PUMIT,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("source", "wrap", "options"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_file_in_an_official_layout_gives_back_the_encoder_it_was_made_from(tmp_path, source, wrap, options):
    expected = plain(**options)
    layout = dinov3_layout if source == "dinov3" else timm_layout
    torch.save(wrap(layout(expected)), tmp_path / "weights.pth")
    encoder, _ = getattr(checkpoints, f"from_{source}")(read_weights(tmp_path / "weights.pth"), num_heads=4)
    weights = expected.state_dict()
    assert encoder.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    image = torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(encoder(image), expected(image), rtol=1e-5, atol=1e-5)
    # The size it is made for, the share of the MLP and LayerScale's first value are told by shapes, or not at all.
    untold = ("img_size", "mlp_ratio", "init_values")
    for name, value in expected.arguments.items():
        assert name in untold or encoder.arguments[name] == value, name


def test_pumits_weights_see_volumes_and_thick_slices_as_they_did(tmp_path):
    expected = plain(**PUMIT)
    encoder, left_out = from_pumit(eva_layout(timm_layout(expected)), num_heads=4)
    for shape, anisotropy in (((24, 32, 32), 0), ((4, 48, 32), 2)):
        image = torch.randn(1, 3, *shape)
        torch.testing.assert_close(encoder(image, anisotropy), expected(image, anisotropy), rtol=1e-5, atol=1e-5)
    assert sorted(left_out) == ["lm_head.bias", "mask_token", "rope.freqs_cos"]


def test_eva02_counts_positions_on_the_grid_it_was_trained_on(tmp_path):
    encoder = plain(**EVA, ref_feat_shape=[4, 4])
    fine, coarse = (encoder.embed(encoder.patchify(torch.zeros(1, 3, n, n)))[1][0, 1:] for n in (64, 32))
    torch.testing.assert_close(fine.view(8, 8, 4)[::2, ::2], coarse.view(4, 4, 4))


def test_an_inflated_encoder_gives_2d_images_of_other_sizes_the_tokens_they_had_too():
    flat = plain()
    volume, image = inflate(flat, (16, 32, 32)), torch.randn(1, 3, 48, 40)
    torch.testing.assert_close(volume(image), flat(image), rtol=1e-5, atol=1e-5)


def test_an_encoder_of_patch_14_is_inflated_to_patches_that_thick_slices_can_halve():
    volume = inflate(plain(img_size=(28, 28), patch_size=14), (32, 28, 28))
    assert volume.patch_size == (16, 14, 14)
    for anisotropy, depth in enumerate((16, 8, 4, 2, 1)):
        assert volume(torch.zeros(1, 3, depth, 28, 28), anisotropy).shape == (1, 5, 32)


@pytest.mark.parametrize("size", [5, "abc", [16, 32], [16, 32, 30], [0, 32, 32], [16, 32, "a"]])
def test_a_volume_size_that_makes_no_encoder_is_refused(size):
    with pytest.raises(
        InputError, match=r"volume_size .* must be three multiples of \[8, 8, 8\], such as \[32, 32, 32\]"
    ):
        inflate(plain(), size)


@pytest.mark.parametrize("mode", ["average", "center"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope": "index", "pos_embed": "none"},
        {"reg_tokens": 2},
        {"pos_embed": "sincos"},
        {"no_embed_class": False},
    ],
)
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


def test_a_brain_in_thick_slices_gives_the_tokens_of_the_brain_at_one_millimetre():
    """The degree is read from each affine; a kernel that is even over depth cannot tell a slab from its mean."""
    load = Compose([LoadImage(ensure_channel_first=True), Orientation("SPL", labels=None), ScaleIntensity()])
    brain = CenterSpatialCrop((64, 96, 96))(load(sample_datalist()[0]["image"]))
    flat = randomised(ViT(1, (96, 96), 16, embed_dim=32, depth=2, num_heads=4, pos_embed="none"))
    encoder = inflate(flat, (64, 96, 96))
    expected = encoder(brain[None])
    assert expected[:, 1:].std(1).mean() > 0.01, "tokens of all places are alike, so nothing was compared"
    for thickness in (2, 4, 8):
        slices = brain.as_tensor().unflatten(1, (-1, thickness)).mean(2)
        affine = brain.affine @ torch.diag(torch.tensor([thickness, 1.0, 1.0, 1.0], dtype=torch.float64))
        thick = MetaTensor(slices, affine=affine)
        torch.testing.assert_close(encoder(thick[None]), expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_of_one_channel_sees_a_grey_image_as_its_model_saw_it_in_colour():
    colour = plain()
    grey = with_channels(colour, 1)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    again = with_channels(grey, 3)
    torch.testing.assert_close(again(image.expand(-1, 3, -1, -1)), grey(image), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="one of the two must be 1"):
        with_channels(colour, 4)


def test_the_example_of_a_source_in_the_documentation_reads_its_layout(tmp_path):
    guide = (Path(__file__).parents[2] / "docs/add-a-checkpoint-source.md").read_text()
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", guide, re.DOTALL).group(1))
    from_mine = runpy.run_path(tmp_path / "mine.py")["from_mine"]
    expected = plain(**DINOV2, norm_eps=1e-5)
    state = {
        "trunk." + re.sub(r"ls(\d)\.gamma", r"scale\1", name): value for name, value in timm_layout(expected).items()
    }
    encoder, left_out = from_mine(state | {"head.bias": ZERO}, num_heads=4)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(image), expected(image), rtol=1e-5, atol=1e-5)
    assert left_out == ["head.bias"]


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


@pytest.mark.parametrize(
    ("layout", "source", "message"),
    [
        ("EVA-02", "pumit", "patch kernels of 'pumit' have 5 axes, this one has 4. It looks like eva02 or pumit"),
        ("PUMIT", "eva02", "patch kernels of 'eva02' have 4 axes, this one has 5. It looks like eva02 or pumit"),
        ("DINOv2", "mae", r"not known in the layout 'mae': blocks\.0\.ls1\.gamma.* It looks like dinov2"),
        ("DINOv2", "dino", r"not known in the layout 'dino': blocks\.0\.ls1\.gamma.* It looks like dinov2"),
        ("timm without bias", "eva02", r"no blocks\.0\.attn\.q_bias in the checkpoint.* It looks like timm"),
        ("MAE", "dinov2", r"no blocks\.0\.ls1\.gamma in the checkpoint"),
        ("timm", "mocov3", r"no base_encoder\.patch_embed\.proj\.weight in the checkpoint"),
    ],
)
def test_a_near_relative_is_refused_too(layout, source, message):
    state = a_file_of(layout)
    section = next((state[name] for name in ("model", "module", "state_dict") if name in state), state)
    with pytest.raises(InputError, match=message):
        getattr(checkpoints, f"from_{source}")(section, num_heads=4)


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "norm.weight", "blocks.1.mlp.fc2.bias"])
def test_what_a_source_always_has_is_missed_by_its_name(name):
    state = timm_layout(plain())
    del state[name]
    with pytest.raises(InputError, match=f"no {re.escape(name)} in the checkpoint"):
        from_mae(state, num_heads=4)


@pytest.mark.parametrize("size", [(24, 40), (24, 32), (32, 48)])
def test_positions_that_are_no_square_need_the_size_they_were_made_for(size):
    expected = plain(img_size=size)
    state, image = timm_layout(expected), torch.randn(1, 3, *size)
    with pytest.raises(InputError, match=r"no grid of a square.* --img_size"):
        from_mae(state, num_heads=4)
    torch.testing.assert_close(from_mae(state, 4, size)[0](image), expected(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [32, "ab", [32], [32, 32, 32], [32.0, 32], [-32, -32], [36, 39], [], [0, 0], {}])
@pytest.mark.parametrize("options", [{}, {"pos_embed": "none"}])
def test_an_img_size_that_means_nothing_is_refused(size, options):
    with pytest.raises(InputError, match=r"img_size .* must be 2 multiples of the patch \[8, 8\]\. Correct --img_size"):
        from_timm(timm_layout(plain(**options)), 4, size)


def test_a_first_eva_has_another_mlp_and_is_refused():
    state = a_file_of("EVA-02 tiny")
    width = state["blocks.0.mlp.w3.weight"].shape[1]
    for n in range(3):
        for kind in ("weight", "bias"):
            state[f"blocks.{n}.mlp.w12.{kind}"] = state[f"blocks.{n}.mlp.w12.{kind}"][:width]
    with pytest.raises(InputError, match="networks of 'eva02' have swiglu_mlp True; this one would compute"):
        from_eva02(state, num_heads=4)


def test_a_dinov3_whose_mask_switches_off_something_else_is_refused():
    state = a_file_of("DINOv3")
    state["blocks.1.attn.qkv.bias_mask"] = torch.ones(96)
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.qkv\.bias_mask switches off something else"):
        from_dinov3(state, num_heads=4)


def test_the_periods_of_a_dinov3_tell_its_heads():
    with pytest.raises(InputError, match=r"periods are those of 4 heads\. Give --num_heads 4"):
        from_dinov3(a_file_of("DINOv3"), num_heads=8)


def test_registers_with_positions_are_refused_by_name():
    state = timm_layout(plain(reg_tokens=4, pos_antialias=True))
    state["reg_token"] = state.pop("register_tokens")
    state["pos_embed"] = torch.cat([state["pos_embed"], torch.zeros(1, 4, 32)], dim=1)
    with pytest.raises(InputError, match=r"21 positions are no grid .* Registers with positions of their own"):
        from_timm(state, num_heads=4)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("pos_embed", torch.zeros(()), "pos_embed is a single number"),
        ("pos_embed", torch.zeros(1, 0, 32), "positions are no grid"),
        ("pos_embed", torch.zeros(1, 1, 32), "positions are no grid"),
        ("blocks.0.mlp.fc2.weight", torch.zeros(32), "the last matrix of an MLP has 1 axes"),
        ("blocks.0.norm1.weight", torch.zeros(0), r"missing blocks\.0\.norm1\.weight|is \(0,\)"),
    ],
)
def test_damaged_tensors_are_refused(name, tensor, message):
    with pytest.raises(InputError, match=message):
        from_mae({**timm_layout(plain()), name: tensor}, num_heads=4)


@pytest.mark.parametrize(
    ("source", "width", "heads"), [("mocov3", 384, 12), ("mae", 384, 6), ("timm", 1152, 16), ("dinov3", 1280, 20)]
)
def test_the_published_networks_get_their_heads(source, width, heads):
    options = LAYOUTS["DINOv3"][2] if source == "dinov3" else {}
    encoder = plain(**{**options, "embed_dim": width, "depth": 1, "num_heads": heads})
    state = (dinov3_layout if source == "dinov3" else timm_layout)(encoder)
    if source == "dinov3":
        state["rope_embed.periods"] = 100 ** (torch.arange(16) / 16)
    state = prefixed(state, "base_encoder.") if source == "mocov3" else state
    assert getattr(checkpoints, f"from_{source}")(state)[0].arguments["num_heads"] == heads


def test_a_patch_kernel_that_is_no_convolution_is_refused():
    state = timm_layout(plain())
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    with pytest.raises(InputError, match="patch kernels of 'mae' have 4 or 5 axes, this one has 2"):
        from_mae(state, num_heads=4)


def test_a_matrix_of_another_shape_is_no_matrix_of_ours():
    state = timm_layout(plain())
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].T
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc1\.weight is \(32, 128\) instead of \(128, 32\)"):
        from_mae(state, num_heads=4)


def test_a_dinov3_that_computes_something_else_is_refused():
    state = a_file_of("DINOv3")
    with pytest.raises(InputError, match=r"not known in the layout 'dinov3': cls_norm\.bias"):
        from_dinov3(state | {"cls_norm.bias": ZERO}, num_heads=4)
    with pytest.raises(InputError, match="not those of base 100"):
        from_dinov3(state | {"rope_embed.periods": 1000 ** (torch.arange(2) / 2)}, num_heads=4)


def a_file_of(layout):
    source, wrap, options = LAYOUTS[layout]
    return wrap((dinov3_layout if source == "dinov3" else timm_layout)(plain(**options)))


@pytest.mark.parametrize(
    ("tensors", "source", "family"),
    [
        (lambda: huggingface("Dinov2").state_dict(), "timm", "huggingface"),
        (lambda: huggingface("DINOv3ViT", intermediate_size=64).state_dict(), "dinov3", "huggingface"),
        (lambda: MonaiViT(1, (16, 16), 8, num_layers=1, spatial_dims=2, **MONAI).state_dict(), "dinov2", "monai"),
        (lambda: a_file_of("timm"), "huggingface", "timm, mae or dino"),
        (lambda: a_file_of("timm"), "pumit", "timm, mae or dino"),
        (lambda: a_file_of("MAE")["model"], "timm", "mae, with its decoder"),
        (lambda: a_file_of("DINOv2"), "monai", "dinov2"),
        (lambda: a_file_of("DINOv3"), "dinov2", "dinov3"),
        (lambda: a_file_of("EVA-02")["module"], "mae", "eva02 or pumit"),
        (lambda: a_file_of("PUMIT")["state_dict"], "dino", "eva02 or pumit"),
        (lambda: named(a_file_of("MoCo v3")["state_dict"], ("module.", "")), "biovfm", "mocov3"),
    ],
)
def test_a_checkpoint_of_another_family_is_refused_with_the_name_of_its_own(tensors, source, family):
    with pytest.raises(InputError, match=f"the layout '.*It looks like {family}"):
        getattr(checkpoints, f"from_{source}")(tensors(), num_heads=4)


def test_of_two_networks_in_a_file_the_one_that_is_asked_for_is_taken(tmp_path, caplog):
    state = timm_layout(plain())
    average = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "model_ema": average, "epoch": torch.tensor(3)}, tmp_path / "two.pth")
    assert torch.equal(read_weights(tmp_path / "two.pth")["norm.bias"], state["norm.bias"])
    assert "two.pth: took 'model', not 'model_ema'" in caplog.text
    assert torch.equal(read_weights(tmp_path / "two.pth", "model_ema")["norm.bias"], average["norm.bias"])
    with pytest.raises(InputError, match=r"two\.pth: has no section 'teacher', but model, model_ema, epoch"):
        read_weights(tmp_path / "two.pth", "teacher")


def test_a_training_file_with_its_command_line_is_opened(tmp_path):
    state = timm_layout(plain())
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").keys() == state.keys()


def test_a_file_with_a_network_and_its_average_is_not_taken_for_one(tmp_path):
    state = timm_layout(plain())
    torch.save(state | prefixed(state, "module."), tmp_path / "two.pth")
    with pytest.raises(InputError, match=r"two\.pth: .* and another tensor are both 'cls_token'"):
        read_weights(tmp_path / "two.pth")


def test_a_tensor_that_only_some_blocks_have_is_missed():
    state = timm_layout(plain())
    del state["blocks.2.attn.qkv.bias"]
    with pytest.raises(InputError, match=r"missing blocks\.2\.attn\.qkv\.bias"):
        from_timm(state, num_heads=4)


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
    with pytest.raises(
        InputError,
        match=rf"^{re.escape(str(tmp_path))}/bad\.pth: cannot be opened without running code from it .*print",
    ):
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
    with pytest.raises(InputError, match=f"{name}: truncated, or no checkpoint.*again"):
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
    _, left_out = convert(
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
        (
            ("dinov5", "x.pth"),
            "source 'dinov5' is unknown. Give one of biovfm, dino, dinov2, dinov3, eva02, huggingface",
        ),
        (("timm", "x.pth"), r"x\.pth: no such checkpoint"),
    ],
)
def test_a_conversion_that_cannot_be_made_says_why(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        convert(arguments[0], tmp_path / arguments[1], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_option_that_a_source_does_not_take_is_refused_with_those_it_takes(tmp_path):
    with pytest.raises(
        InputError, match=r"--norm_eps is unknown for timm\. There are section, .*std, num_heads, img_size"
    ):
        convert("timm", tmp_path / "x.pth", tmp_path / "out.safetensors", norm_eps=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ViT", {"hidden_act": "relu"}, r"config\.json: hidden_act 'relu'"),
        ("DINOv3ViT", {"rope_theta": 1000.0}, r"config\.json: rope_theta 1000\.0"),
    ],
)
def test_a_network_that_computes_something_else_is_refused(tmp_path, kind, options, message):
    huggingface(kind, **options, intermediate_size=64).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        convert("huggingface", tmp_path, tmp_path / "out.safetensors")


def test_a_config_beside_the_file_is_read_as_the_folders_is(tmp_path):
    reference = huggingface("ViT", intermediate_size=64, layer_norm_eps=1e-3)
    reference.save_pretrained(tmp_path)
    encoder, _ = convert("huggingface", tmp_path / "model.safetensors", tmp_path / "out.safetensors")
    assert (encoder.arguments["num_heads"], encoder.arguments["norm_eps"]) == (4, 1e-3)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(InputError, match=r"config\.json: no readable config"):
        convert("huggingface", tmp_path, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": 0.5}, "--std None must be"),
        ({"mean": 0.5, "std": 0}, "--std 0 must be"),
        ({"mean": "abc", "std": 1}, "--mean 'abc' must be"),
        ({"mean": [0.4, 0.5], "std": [1, 1, 1]}, r"--mean \[0\.4, 0\.5\] must be one number or 3"),
        ({"num_heads": 0}, "num_heads must be a whole number above 0, got 0"),
        ({"num_heads": "abc"}, "num_heads must be a whole number above 0, got 'abc'"),
        ({"in_channels": True}, "in_channels must be a whole number above 0, got True"),
        ({"in_channels": 7}, "one of the two must be 1"),
        ({"inflation": "foo", "volume_size": (16, 32, 32)}, "inflation must be 'average' or 'center', got 'foo'"),
    ],
)
def test_options_that_mean_nothing_are_refused_and_no_file_is_written(tmp_path, options, message):
    torch.save(timm_layout(plain()), tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        convert("timm", tmp_path / "a.pth", tmp_path / "out.safetensors", **{"num_heads": 4, **options})
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_is_never_written_over(tmp_path):
    torch.save(timm_layout(plain()), tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises(InputError, match=r"a\.pth: is what is read, and would be lost"):
        convert("timm", tmp_path / "a.pth", tmp_path / "a.pth", num_heads=4)
    assert (tmp_path / "a.pth").read_bytes() == before


def test_the_help_of_the_command_line_names_every_source():
    sources = [name.removeprefix("from_") for name in checkpoints.__all__ if name.startswith("from_")]
    assert all(f" {name}" in cli.convert.__doc__ for name in sources)
