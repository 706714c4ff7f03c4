"""PUMIT's two stages: the literal commands of their READMEs, one after the other, on 2D images and volumes at once."""

import csv
import json
import shlex
import shutil

import pytest
import torch
from conftest import ROOT
from monai.bundle import verify_net_in_out
from PIL import Image
from programs import run_python
from workflows import workflow

from biovfm_monai.checkpoints import encoder_info, load_encoder, load_tokenizer, save_tokenizer
from biovfm_monai.errors import InputError
from biovfm_monai.networks import SoftTokenizer
from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle_stages")
STAGES = "spad_tokenizer_pretraining", "spad_mim_pretraining"
# With this seed crops of all three kinds are among the first ten.
SMALL = {
    "img_size": [16, 32, 32], "crop_size": [16, 32, 32], "batch_size": 2, "max_epochs": 1, "steps_per_epoch": 5,
    "seed": 4,
}  # fmt: skip


def commands(stage, verb):
    lines = (ROOT / "bundles" / stage / "docs/README.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith("    python -m monai") and f"configs/{verb}.json" in line]


def run(root, command, overrides):
    words = [*shlex.split(command)[1:]]
    words += [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
    done = run_python(words, root, TMPDIR=str(root))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def roots(tmp_path_factory, samples):
    """Both bundles after the first two commands of the second one's README."""
    made = [copy_bundle(stage, tmp_path_factory.getbasetemp() / "a folder") for stage in STAGES]
    sections = json.loads((samples / "datalist.json").read_text())
    sections |= {name: items[::10] for name, items in sections.items() if name.startswith("place")}
    for root in made:
        shutil.copytree(samples, root / "samples")
        (root / "samples/datalist.json").write_text(json.dumps(sections))
    for command in commands(STAGES[1], "train")[:2]:
        run(made[1], command, SMALL)
    return made


def log(root):
    return [json.loads(line) for line in (root / "eval/log.jsonl").read_text().splitlines()]


def test_the_first_stage_leaves_a_tokenizer_and_a_picture_and_the_second_an_encoder(roots):
    first, second = roots
    assert encoder_info(first / "models/tokenizer.safetensors")["training"]["method"] == "SPADTokenizer"
    assert Image.open(first / "eval/reconstruction.png").width > 3 * 192
    assert {"l1", "usage", "entropy", "discriminator"} <= set(log(first)[-1])
    assert encoder_info(second / "models/encoder.safetensors")["training"]["method"] == "MaskedTokenModeling"
    assert {"loss", "kl", "marginal_entropy"} <= set(log(second)[-1])
    assert load_encoder(second / "models/encoder.safetensors").patch_size[0] == 8
    assert (second / "models/model.pt").is_file()


@pytest.mark.parametrize("stage", [0, 1])
def test_thin_and_thick_slices_and_2d_images_come_in_one_run_and_never_in_one_batch(roots, stage):
    root = roots[stage]
    dataset = workflow(root, "train", **SMALL).parser.get_parsed_content("train#dataset")
    seen = encoder_info(next((root / "models").glob("*.safetensors")))["training"]["samples_seen"]
    degrees = torch.tensor([dataset[number]["anisotropy"] for number in range(seen)]).view(-1, SMALL["batch_size"])
    assert set(degrees[:, 0].tolist()) == {0, 3, 5}
    assert (degrees == degrees[:, :1]).all()


def test_inference_of_a_tokenizer_writes_the_share_of_each_code_in_an_image(roots):
    first = roots[0]
    run(first, commands(STAGES[0], "inference")[0], {"img_size": [16, 32, 32]})
    rows = list(csv.reader((first / "eval/codes.csv").open()))
    items = json.loads((first / "samples/datalist.json").read_text())["mixed"]
    assert len(rows) == len(items)
    for row in rows:
        assert len(row) == 1 + 256
        assert sum(map(float, row[1:])) == pytest.approx(1, abs=1e-3)


def test_evaluation_of_a_tokenizer_writes_what_is_lost_and_which_codes_are_used(roots):
    first = roots[0]
    run(
        first,
        commands(STAGES[0], "evaluate")[0],
        {"probe::num_crops": 12, "probe::crop_size": [16, 32, 32], "probe::seed": 4},
    )
    scores = json.loads((first / "eval/tokenizer.json").read_text())
    with Image.open(first / "eval/tokenizer.png") as picture:
        assert picture.height > 192 * sum(name.startswith("anisotropy") for name in scores)
    assert scores["all"]["crops"] == 12
    assert {"anisotropy 0", "anisotropy 3", "anisotropy 5", "mri"} <= set(scores)
    assert 0 < scores["all"]["l1"] < 1
    codes = scores["codes"]
    assert codes["likeliest"] <= codes["count"] == 256
    assert 1 <= codes["perplexity"] <= 256
    assert 0 <= codes["token_entropy"] <= codes["marginal_entropy"]


@pytest.mark.parametrize("verb", ["inference", "evaluate"])
def test_the_second_stages_encoder_is_used_as_that_of_any_bundle(roots, verb):
    second = roots[1]
    run(second, commands(STAGES[1], verb)[0], {})
    assert (second / "eval" / {"inference": "embeddings.csv", "evaluate": "knn.json"}[verb]).is_file()


@pytest.mark.parametrize(("stage", "kind"), [(0, "train"), (0, "inference"), (1, "train"), (1, "inference")])
def test_no_required_property_is_missing(roots, stage, kind):
    assert workflow(roots[stage], kind).check_properties() == []


@pytest.mark.parametrize("stage", [0, 1])
def test_the_networks_output_is_as_the_metadata_say(roots, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = roots[stage] / "configs"
    verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        bundle_root=str(roots[stage]),
    )


def cause(error):
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return str(error)


def refusal(root, **overrides):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it
        workflow(root, "train", **SMALL, **overrides).parser.get_parsed_content("method")
    return cause(caught.value)


def test_a_missing_tokenizer_is_named_with_the_command_to_run_first(tmp_path):
    message = refusal(copy_bundle(STAGES[1], tmp_path))
    for words in ("spad_tokenizer_pretraining/models/tokenizer.safetensors: no such", "Train one first: python -m"):
        assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("strides", "channels", "words"),
    [((4, 4), 3, ["tokens are 16 voxels wide", "(8, 8, 8)", "--patch_size 16"]), ((4, 2), 1, ["--in_channels 1"])],
)
def test_a_tokenizer_that_does_not_fit_is_named_with_rule_value_and_remedy(tmp_path, strides, channels, words):
    path = tmp_path / "other.safetensors"
    save_tokenizer(SoftTokenizer(channels, (8, 16), strides, 16), path)
    message = refusal(ROOT / "bundles" / STAGES[1], tokenizer_path=str(path))
    assert all(word in message for word in [f"{path}: ", "must", *words]), message


def test_the_tokenizer_of_a_run_gives_images_of_all_kinds_back_in_their_size(roots):
    tokenizer = load_tokenizer(roots[0] / "models/tokenizer.safetensors")
    for degree, depth in ((0, 16), (3, 2), (5, 1)):
        image = torch.zeros(1, 3, depth, 32, 32)
        assert tokenizer.decode(tokenizer(image, degree).softmax(1), degree).shape == image.shape
