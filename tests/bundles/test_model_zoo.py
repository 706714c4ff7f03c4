"""The checks of the model zoo's continuous integration, in its order, over every folder in bundles/.

They are those of https://github.com/Project-MONAI/model-zoo/blob/dev/ci/verify_bundle.py, which is no package.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser, ckpt_export, onnx_export, verify_metadata, verify_net_in_out

from biovfm_monai.checkpoints import save_embedder, save_encoder, save_tokenizer
from biovfm_monai.networks import SoftTokenizer, vit_tiny
from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle_zoo")
SUPERVISED = ("_segmentation", "_classification")
NAMES = sorted(p.parent.name for p in (ROOT / "bundles").glob("*/configs"))


def write_weights(root):
    """What a training would leave in models/, of weights as they were drawn."""
    if root.name.endswith("_embedding"):
        encoder = vit_tiny(1, (64, 64), 8, depth=2)
        save_encoder(encoder, root / "models/encoder.safetensors", {"mean": 0.5, "std": 0.5}, {})
        save_embedder(encoder, root / "models/model.pt")
        return
    parser = ConfigParser()
    parser.read_config(str(root / "configs/train.json"))
    if "encoder" not in parser or root.name.endswith(SUPERVISED):
        network = parser.get_parsed_content("network_def")
        (root / "models").mkdir()
        torch.save({"model": network.state_dict()}, root / "models/model.pt")
        return
    encoder = parser.get_parsed_content("encoder")
    if isinstance(encoder, SoftTokenizer):
        save_tokenizer(encoder, root / "models/tokenizer.safetensors")
        torch.save({"model": parser.get_parsed_content("network_def").state_dict()}, root / "models/model.pt")
        return
    save_encoder(encoder, root / "models/encoder.safetensors", {"mean": 0.5, "std": 0.5}, {})
    save_embedder(encoder, root / "models/model.pt")


@pytest.fixture(scope="module", params=NAMES)
def root(request, tmp_path_factory):
    root = copy_bundle(request.param, tmp_path_factory.mktemp("a folder"))
    write_weights(root)
    return root


def test_its_folder_has_what_is_necessary_and_preferred(root):
    for file in ("configs/metadata.json", "LICENSE", "models/model.pt", "configs/inference.json"):
        assert (root / file).is_file(), file
    assert sum(path.stat().st_size > 25e6 for path in root.rglob("*")) == 0, "belongs into large_files.yml"


def test_its_version_is_in_its_changelog(root):
    metadata = json.loads((root / "configs/metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]


def test_its_metadata_passes_monais_check(root):
    schema = shutil.copy(Path(__file__).parent / "meta_schema_20240725.json", root / "schema.json")
    verify_metadata(str(root / "configs/metadata.json"), filepath=schema)


def test_its_network_takes_and_gives_what_the_metadata_say_and_becomes_torchscript(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verify_net_in_out("network_def", **configurations(root))
    script = str(tmp_path / "model.ts")
    image = blank(root)
    # Networks of the pretraining bundles are in the zoo's list of those that cannot be scripted, and are traced.
    how = {} if root.name.endswith(SUPERVISED) else {"use_trace": True, "input_shape": list(image.shape)}
    ckpt_export("network_def", filepath=script, **weights(root), **how, **configurations(root))
    with torch.inference_mode():
        found = torch.jit.load(script).eval()(image)
        torch.testing.assert_close(found, trained_network(root)(image), rtol=1e-4, atol=1e-4)


# One of each kind of network; the others have the same ones in other sizes.
KINDS = (
    "biovfm_mae_pretraining", "brain_mri_segmentation", "image_embedding", "medmnist_classification",
    "spad_tokenizer_pretraining", "vessel_fundus_segmentation",
)  # fmt: skip


@pytest.mark.parametrize(
    "root", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES], indirect=True
)
def test_its_network_becomes_onnx_by_monais_own_export(root, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    monkeypatch.chdir(tmp_path)
    image = blank(root)
    file = str(tmp_path / "model.onnx")
    onnx_export("network_def", filepath=file, input_shape=list(image.shape), **weights(root), **configurations(root))
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), trained_network(root)(image), rtol=1e-4, atol=1e-4)


def configurations(root):
    return {
        "meta_file": str(root / "configs/metadata.json"), "config_file": str(root / "configs/inference.json"),
        "bundle_root": str(root),
    }  # fmt: skip


def weights(root):
    return {"ckpt_file": str(root / "models/model.pt"), "key_in_ckpt": "model"}


def trained_network(root):
    parser = ConfigParser()
    parser.read_config(str(root / "configs/inference.json"))
    parser["bundle_root"] = str(root)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(root / "models/model.pt", weights_only=True)["model"])
    return network


def blank(root):
    """An image of four patches along each axis."""
    metadata = json.loads((root / "configs/metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    shape = [8 * int(str(size).split("*")[0]) if "*" in str(size) else int(size) for size in metadata["spatial_shape"]]
    return torch.randn(1, metadata["num_channels"], *shape)
