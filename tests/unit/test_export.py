"""Weights on their way out: read by the networks they were made for, and read back."""

import json
import logging

import pytest
import torch
from monai.networks.nets import ViT as MonaiViT
from safetensors.torch import load_file, save_file

from biovfm_monai import checkpoints, cli
from biovfm_monai.checkpoints import convert, export, load_encoder, read_weights, save_encoder
from biovfm_monai.checkpoints.state import state_name, write_state
from biovfm_monai.errors import InputError
from biovfm_monai.methods import MAE
from biovfm_monai.networks import Embedder, ViT

transformers = pytest.importorskip("transformers", reason="the reference networks are not installed (extra 'test')")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")


def encoder_file(folder, **options):
    """An encoder with random weights everywhere, and its file."""
    torch.manual_seed(0)
    sizes = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    encoder = ViT(**{"in_channels": 3, **sizes, **options}).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    save_encoder(encoder, folder / "encoder.safetensors")
    return encoder, folder / "encoder.safetensors"


LEARNED = {"pos_embed": "learn", "no_embed_class": False}
DINOV3 = {"rope": "normalised", "pos_embed": "none", "k_bias": False, "init_values": 1.0, "norm_eps": 1e-5}
HUGGING_FACE = {
    "ViT": ("ViTModel", {"pos_embed": "learn"}),
    "ViT with fixed positions": ("ViTModel", {}),
    "ViT without bias": ("ViTModel", {"qkv_bias": False}),
    "Dinov2": ("Dinov2Model", {"pos_embed": "learn", "init_values": 1.0}),
    "Dinov2 with SwiGLU": ("Dinov2Model", {"init_values": 1.0, "swiglu_mlp": True, "mlp_ratio": 2.75}),
    "Dinov2 with registers": ("Dinov2WithRegistersModel", {"init_values": 1.0, "reg_tokens": 4, "pos_antialias": True}),
    "DINOv3": ("DINOv3ViTModel", {**DINOV3, "reg_tokens": 4}),
    "DINOv3 with SwiGLU": ("DINOv3ViTModel", {**DINOV3, "swiglu_mlp": True}),
}


@pytest.mark.parametrize(("name", "options"), HUGGING_FACE.values(), ids=HUGGING_FACE.keys())
def test_hugging_face_reads_an_encoder_and_gives_its_tokens(tmp_path, name, options):
    encoder, path = encoder_file(tmp_path, **options)
    export("huggingface", path, tmp_path / "their model")
    extra = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, loading = getattr(transformers, name).from_pretrained(
        tmp_path / "their model", output_loading_info=True, **extra
    )
    assert not any(loading.values()), loading
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model(pixel_values=image).last_hidden_state
        torch.testing.assert_close(tokens, encoder(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (16, 32, 24)])
@pytest.mark.parametrize("options", [{"class_token": False}, LEARNED, {"qkv_bias": False}])
def test_monai_reads_an_encoder_and_gives_its_tokens(tmp_path, size, options):
    encoder, path = encoder_file(tmp_path, img_size=size, norm_eps=1e-5, **options)
    export("monai", path, tmp_path / "vit.pt")
    model = MonaiViT(
        3, size, 8, hidden_size=32, mlp_dim=128, num_layers=2, num_heads=4, spatial_dims=len(size),
        qkv_bias=encoder.arguments["qkv_bias"], classification=encoder.arguments["class_token"],
    ).eval()  # fmt: skip
    exported = torch.load(tmp_path / "vit.pt", weights_only=True)
    missing = model.state_dict().keys() - exported.keys()
    assert all("cross_attn" in name or "classification_head" in name for name in missing)
    model.load_state_dict(model.state_dict() | exported)
    model.classification_head = torch.nn.Identity()
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model.norm(run_blocks(model, image))
        torch.testing.assert_close(encoder(image), expected, rtol=1e-5, atol=1e-5)


def run_blocks(model, image):
    """MONAI's ViT up to its final norm; its forward gives the class token alone when it has one."""
    x = model.patch_embedding(image)
    if hasattr(model, "cls_token"):
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    for block in model.blocks:
        x = block(x)
    return x


TOKEN = {"global_pool": "token"}
REGISTERS = {**TOKEN, "reg_tokens": 4, "pos_antialias": True}
PUMIT = {
    **TOKEN, "img_size": (16, 32, 32), "pos_embed": "learn", "rope": "index", "swiglu_mlp": True, "scale_mlp": True,
    "k_bias": False, "norm_eps": 1e-5,
}  # fmt: skip
ROUND_TRIPS = {
    "timm": ("timm", "timm", {**LEARNED, **TOKEN}),
    "timm with registers": ("timm", "timm", {**REGISTERS, "pos_embed": "learn"}),
    "MAE": ("timm", "mae", LEARNED),
    "DINOv2": ("dinov2", "dinov2", {**LEARNED, **TOKEN, "init_values": 1.0}),
    "DINOv2 with registers and SwiGLU": (
        "dinov2", "dinov2", {**LEARNED, **REGISTERS, "init_values": 1.0, "swiglu_mlp": True},
    ),
    "MONAI": ("monai", "monai", {"pos_embed": "learn", "img_size": (16, 16, 16), "norm_eps": 1e-5}),
    "PUMIT": ("pumit", "pumit", PUMIT),
    "Hugging Face's ViT": ("huggingface", "huggingface", {**LEARNED, **TOKEN}),
    "Hugging Face's Dinov2": ("huggingface", "huggingface", {**LEARNED, **TOKEN, "init_values": 1.0}),
    "Hugging Face's DINOv3": ("huggingface", "huggingface", {**DINOV3, **TOKEN, "reg_tokens": 4}),
}  # fmt: skip


@pytest.mark.parametrize(("target", "source", "options"), ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_out_and_in_and_out_again_is_the_same_file_bit_for_bit(tmp_path, target, source, options):
    encoder, path = encoder_file(tmp_path, **options)
    folder = target == "huggingface"
    first, second = (tmp_path / (name if folder else f"{name}.safetensors") for name in ("first", "second"))
    export(target, path, first)
    convert(source, first, tmp_path / "back.safetensors", num_heads=4)
    export(target, tmp_path / "back.safetensors", second)
    a, b = ((one / "model.safetensors" if folder else one) for one in (first, second))
    assert a.read_bytes() == b.read_bytes()
    if folder:
        assert (first / "config.json").read_text() == (second / "config.json").read_text()
    back = load_encoder(tmp_path / "back.safetensors")
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in back.state_dict().items())
    # LayerScale's first value is of training, and no longer to be seen.
    ignored = {"init_values", "img_size"} if "rope" in options and folder else {"init_values"}
    assert {k: v for k, v in back.arguments.items() if k not in ignored} == {
        k: v for k, v in encoder.arguments.items() if k not in ignored
    }


@pytest.mark.parametrize(("target", "options"), [("pumit", PUMIT), ("timm", REGISTERS), ("monai", {"norm_eps": 1e-5})])
def test_a_class_tokens_position_is_added_to_it_where_a_layout_has_no_place_for_one(tmp_path, target, options):
    encoder, path = encoder_file(tmp_path, **{**options, **LEARNED})
    export(target, path, tmp_path / "theirs.safetensors")
    back, _ = convert(target, tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", num_heads=4)
    assert back.cls_pos is None
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(back(image), encoder(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_the_authors_layout_comes_back_as_it_was(tmp_path, suffix):
    _, path = encoder_file(tmp_path, pos_embed="learn", init_values=1.0)
    export("dinov2", path, tmp_path / "theirs.safetensors")
    theirs = {name: torch.randn_like(t) for name, t in load_file(tmp_path / "theirs.safetensors").items()}
    theirs["mask_token"].zero_()
    save = save_file if suffix == "safetensors" else torch.save
    save(theirs, tmp_path / f"file.{suffix}")
    convert("dinov2", tmp_path / f"file.{suffix}", tmp_path / "encoder2.safetensors", num_heads=4)
    export("dinov2", tmp_path / "encoder2.safetensors", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_torchscript_gives_the_tokens_of_2d_images_and_thick_slices(tmp_path):
    encoder, path = encoder_file(tmp_path, img_size=(16, 32, 32), rope="index", reg_tokens=2)
    export("torchscript", path, tmp_path / "encoder.ts")
    script = torch.jit.load(tmp_path / "encoder.ts")
    for image, anisotropy in ((torch.randn(1, 3, 16, 40, 32), 0), (torch.randn(2, 3, 2, 32, 32), 2)):
        torch.testing.assert_close(script(image, anisotropy), encoder(image, anisotropy), rtol=1e-4, atol=1e-4)
    photo = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(script(photo), encoder(photo), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "anisotropy", "options"),
    [
        (None, None, {}),
        ([48, 32], None, {"pos_embed": "learn", "reg_tokens": 2, "pos_antialias": True}),
        ([2, 48, 32], 2, {"img_size": (16, 32, 32), "rope": "index", "swiglu_mlp": True, "pos_embed": "learn"}),
        ([32, 32], None, {"img_size": (16, 32, 32), "rope": "normalised"}),
    ],
)
def test_onnx_runtime_gives_the_tokens(tmp_path, capfd, size, anisotropy, options):
    encoder, path = encoder_file(tmp_path, **options)
    export("onnx", path, tmp_path / "encoder.onnx", size, anisotropy)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == logging.NOTSET
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    image = torch.randn(3, 3, *(size or (32, 32)))
    (tokens,) = session.run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(tokens), encoder(image, anisotropy), rtol=1e-4, atol=1e-4)


def test_a_bundles_model_and_the_tensors_alone_are_what_they_say(tmp_path):
    encoder, path = encoder_file(tmp_path)
    export("bundle", path, tmp_path / "models/model.pt")
    exported = torch.load(tmp_path / "models/model.pt", weights_only=True)
    Embedder(ViT(**encoder.arguments)).load_state_dict(exported["model"])
    export("safetensors", path, tmp_path / "tensors.safetensors")
    assert load_file(tmp_path / "tensors.safetensors").keys() == encoder.state_dict().keys()


def test_heads_come_out_with_everything_that_was_trained(tmp_path):
    encoder, _ = encoder_file(tmp_path)
    method = MAE(encoder, 0.75, 16, 1, 2)
    tensors = {f"method.{name}": x.clone() for name, x in method.state_dict().items()}
    tensors["optimizer.0.step"] = torch.ones(())
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    for number in (2, 3):
        write_state(tmp_path / state_name(number), tensors, shapes, {"step": number})
    for path in (tmp_path, tmp_path / state_name(2)):
        torch.nn.init.zeros_(method.mask_token)
        export("method", path, tmp_path / "all.safetensors")
        method.load_state_dict(load_file(tmp_path / "all.safetensors"))
        assert torch.equal(method.mask_token, tensors["method.mask_token"])


# Bad input


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("timm", {"img_size": (16, 32, 32)}, "spatial_dims 3 cannot be written as timm, which has 2"),
        ("timm", {"rope": "index"}, "rope 'index' cannot be written as timm"),
        ("timm", {"k_bias": False}, r"'timm' has no place for blocks\.0\.attn\.qv_bias"),
        ("monai", {"init_values": 1.0}, r"'monai' has no place for blocks\.0\.ls1\.gamma"),
        ("monai", {"final_norm": False}, r"without norm\.weight cannot be written as monai"),
        ("timm", {"norm_eps": 1e-3}, r"norm_eps 0\.001 cannot be written as timm"),
        ("dinov2", {}, r"LayerScale|init_values"),
        ("huggingface", {"pos_embed": "none"}, "pos_embed 'none' cannot be written as huggingface"),
        ("huggingface", {"init_values": 1.0, "reg_tokens": 4}, "pos_antialias False cannot be written"),
        ("onnx", {"rope": "mm"}, "rope 'mm' knows the spacing"),
        ("monai", {"reg_tokens": 2}, "reg_tokens 2 cannot be written as monai"),
        ("huggingface", {"qk_norm": True}, "qk_norm True cannot be written as huggingface"),
        ("huggingface", {"img_size": (32, 40)}, "made for squares"),
        ("huggingface", {"init_values": 1.0, "mlp_ratio": 3.5}, "no MLP with 112 hidden numbers at a width of 32"),
        ("pumit", {"img_size": (16, 32, 32), "pos_embed": "learn"}, "rope 'none' cannot be written as pumit"),
        ("monai", {"pos_embed": "none"}, "without pos_embed cannot be written as monai"),
        ("dinov2", {"pos_embed": "none", "init_values": 1.0}, "without pos_embed cannot be written as dinov2"),
        ("dinov2", {"class_token": False, "init_values": 1.0}, "without cls_token cannot be written as dinov2"),
        ("gguf", {}, "format 'gguf' is unknown. Give one of safetensors, torchscript, .* timm"),
    ],
)
def test_what_has_no_place_in_a_format_is_refused_and_nothing_is_written(tmp_path, target, options, message):
    _, path = encoder_file(tmp_path, **options)
    with pytest.raises(InputError, match=message):
        export(target, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("onnx", {"img_size": [30, 32]}, "must be a multiple of the patch .* Crop or pad"),
        ("onnx", {"anisotropy": 7}, r"anisotropy must be 0 .*, got 7\. Correct"),
        ("onnx", {"anisotropy": "abc"}, "anisotropy must be 0 .*, got 'abc'"),
        ("onnx", {"img_size": 32}, "img_size 32 must be two or three"),
        ("timm", {"anisotropy": 2}, "--img_size and --anisotropy are of onnx"),
    ],
)
def test_an_input_that_an_encoder_cannot_read_is_refused(tmp_path, target, arguments, message):
    _, path = encoder_file(tmp_path)
    with pytest.raises(InputError, match=message):
        export(target, path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_model_of_hugging_face_is_never_written_over(tmp_path):
    _, path = encoder_file(tmp_path)
    export("huggingface", path, tmp_path / "theirs")
    with pytest.raises(InputError, match="theirs holds a model already"):
        export("huggingface", path, tmp_path / "theirs")


def test_a_file_that_cannot_be_written_is_named_as_the_user_named_it(tmp_path):
    _, path = encoder_file(tmp_path)
    with pytest.raises(OSError, match="too long") as caught:
        export("safetensors", path, tmp_path / ("x" * 250))
    assert caught.value.filename == str(tmp_path / ("x" * 250))


def test_an_encoder_file_is_never_written_over(tmp_path):
    _, path = encoder_file(tmp_path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"encoder\.safetensors: is what is read, and would be lost"):
        export("timm", path, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, "a file", "{}", "no JSON", '{"format": 2, "tensors": {"method.a": [1]}}'])
def test_what_is_no_state_is_refused(tmp_path, content):
    path = tmp_path / state_name(3)
    if content == "a file":
        path.touch()
    elif content is not None:
        path.mkdir()
        (path / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"step-00000003: .*Give a.* run's models/state"):
        export("method", path, tmp_path / "out.safetensors")


def test_every_way_out_of_the_package_is_offered_and_documented():
    from pathlib import Path

    from biovfm_monai.checkpoints.export import formats

    table = (Path(__file__).parents[2] / "docs/weights.md").read_text()
    assert all(f"`{name}`" in table for name in formats())
    assert all(f'"{name}"' in export.__doc__ and f" {name}" in cli.export.__doc__ for name in formats())
    sources = [name.removeprefix("from_") for name in checkpoints.__all__ if name.startswith("from_")]
    assert all(f"`{name}`" in table for name in sources)


def test_a_config_names_the_model_that_hugging_face_opens(tmp_path):
    _, path = encoder_file(tmp_path, init_values=1.0)
    export("huggingface", path, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["Dinov2Model"]
    assert read_weights(tmp_path / "out")
