"""Each method's overlay trains, in this process, on the bundle of 2D images and on that of volumes."""

import inspect
import json
import shutil

import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from workflows import run

from biovfm_monai import methods
from biovfm_monai.checkpoints import load_encoder, load_tokenizer, save_tokenizer
from biovfm_monai.networks import SoftTokenizer
from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle")
METHODS = [
    "barlow_twins", "dinov2", "ijepa", "lejepa", "masked_tokens", "moco_v3", "simmim", "spad_tokenizer", "vicreg",
]  # fmt: skip
SMALL = {
    "moco_v3": {"method::hidden_dim": 64},
    "dinov2": {"method::hidden_dim": 64, "views::num_local": 2},
    "lejepa": {"method::projector_dims": [64, 16], "method::num_slices": 32, "views::num_local": 2},
}
BUNDLES = {"biovfm_mae_pretraining": [64, 64], "mri_mae_pretraining": [16, 32, 32]}


@pytest.fixture(scope="module", params=BUNDLES)
def root(request, tmp_path_factory, samples):
    """A copy of a bundle, its samples there, and a tokenizer that fits."""
    copy = copy_bundle(request.param, tmp_path_factory.mktemp("a folder"))
    shutil.copytree(samples, copy / "samples")
    channels = json.loads((copy / "configs/train.json").read_text())["in_channels"]
    tokenizer = SoftTokenizer(channels, widths=(16, 32), strides=(4, 2), num_codes=16)
    save_tokenizer(tokenizer, copy / "stage1/tokenizer.safetensors")
    return copy


@pytest.mark.parametrize("method", METHODS)
def test_an_overlay_of_a_method_trains_and_leaves_a_network(root, method):
    size = BUNDLES[root.name]
    options = SMALL.get(method, {}) | ({"encoder::depth": 1} if method != "spad_tokenizer" else {})
    if method == "masked_tokens":
        options["method::tokenizer::path"] = str(root / "stage1/tokenizer.safetensors")
    places = {"ckpt_dir": str(root / method)}
    run(root, "train", method, "smoke", img_size=size, crop_size=size, batch_size=4, **places, **options)
    if method == "spad_tokenizer":
        assert load_tokenizer(root / method / "tokenizer.safetensors").stride == 8
        return
    encoder = load_encoder(root / method / "encoder.safetensors")
    assert encoder(torch.zeros(1, encoder.in_channels, *size)).isfinite().all()
    lines = (root / "eval/log.jsonl").read_text().splitlines()
    assert torch.tensor(json.loads(lines[-1])["loss"]).isfinite()


OF_THE_DATA = [
    "section", "modality", "dataset_dir", "tokenizer_path", "batch_size", "in_channels", "img_size", "crop_size",
    "patch_size", "encoder", "train#dataset#zoom",
]  # fmt: skip
TAKING_OVERLAYS = sorted({path.name for path in ROOT.glob("bundles/*_pretraining")} - {"spad_tokenizer_pretraining"})


@pytest.mark.parametrize("bundle", TAKING_OVERLAYS)
@pytest.mark.parametrize("method", [*METHODS, "mae"])
def test_an_overlay_leaves_nothing_of_a_bundles_own_method(bundle, method):
    merged = []
    for name in (bundle, "biovfm_mae_pretraining"):
        parser = ConfigParser()
        parser.read_config([str(ROOT / f"bundles/{name}/configs/train.json"), str(ROOT / f"configs/{method}.json")])
        parser.update(dict.fromkeys(OF_THE_DATA))
        merged.append(parser.config)
    assert merged[0] == merged[1]


@pytest.mark.parametrize(
    ("bundle", "method", "own"),
    [
        ("biovfm_dinov2_pretraining", "dinov2", []),
        ("spad_tokenizer_pretraining", "spad_tokenizer", []),
        ("spad_mim_pretraining", "masked_tokens", ["method#tokenizer#path"]),
    ],
)
def test_an_overlay_makes_of_the_bundle_of_its_method_what_it_is(bundle, method, own):
    files = [str(ROOT / f"bundles/{bundle}/configs/train.json"), str(ROOT / f"configs/{method}.json")]
    found = []
    for given in (files[:1], files):
        parser = ConfigParser()
        parser.read_config(given)
        parser.update(dict.fromkeys(own))
        found.append(parser.config)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("bundle", "method"),
    [("biovfm_dinov2_pretraining", "mae"), ("spad_mim_pretraining", "dinov2"), ("spad_mim_pretraining", "moco_v3")],
)
def test_an_overlay_trains_on_the_bundle_of_another_method(tmp_path, samples, bundle, method):
    copy = copy_bundle(bundle, tmp_path)
    shutil.copytree(samples, copy / "samples")
    sizes = {} if bundle == "spad_mim_pretraining" else {"img_size": [32, 32], "crop_size": [32, 32]}
    run(copy, "train", method, "smoke", batch_size=4, **sizes, **SMALL.get(method, {}), **{"encoder::depth": 1})
    assert load_encoder(copy / "models/encoder.safetensors").embed_dim == 192


def test_an_overlay_lets_a_run_score_a_labelled_handful_after_each_epoch(tmp_path, samples):
    copy = copy_bundle("biovfm_dinov2_pretraining", tmp_path)
    sections = json.loads((samples / "datalist.json").read_text())
    handful = {name: items[::20] for name, items in sections.items() if name.startswith("place")}
    shutil.copytree(samples, copy / "samples")
    (copy / "samples/datalist.json").write_text(json.dumps({**sections, **handful}))
    options = SMALL["dinov2"] | {"encoder::depth": 1, "max_epochs": 2}
    run(copy, "train", "knn_probe", "smoke", img_size=[32, 32], crop_size=[32, 32], batch_size=4, **options)
    probes = [line.get("probe") for line in map(json.loads, (copy / "eval/log.jsonl").open())]
    assert probes[0] is None  # of the first step
    assert 0 < probes[-1] < 1


def test_every_method_has_an_overlay_and_a_section_in_the_docs():
    public = set(methods.__all__) - {"SSLMethod"}
    named = {}
    for path in (ROOT / "configs").glob("*.json"):
        target = json.loads(path.read_text()).get("method", {}).get("_target_")
        if target:
            named[target.rpartition(".")[2]] = path.stem
    assert set(named) == public
    assert set(METHODS) == set(named.values()) - {"mae"}
    text = (ROOT / "docs/methods.md").read_text()
    assert [stem for stem in named.values() if f"{stem}.json" not in text] == []


@pytest.mark.parametrize("name", sorted(set(methods.__all__) - {"SSLMethod"}))
def test_the_docs_have_each_methods_arguments_with_their_defaults(name):
    arguments = inspect.signature(getattr(methods, name)).parameters.values()
    given = (one.name if one.default is one.empty else f"{one.name}={one.default!r}" for one in arguments)
    assert f"{name}({', '.join(given)})" in " ".join((ROOT / "docs/methods.md").read_text().split())
