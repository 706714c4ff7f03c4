"""The segmentation bundles: the literal command, evaluation, inference on the file's grid, fine-tuning, bad input."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT
from monai.bundle import load
from PIL import Image
from programs import run_python
from workflows import KINDS, refusal, run, workflow, write_subjects, write_volume

from biovfm_monai.checkpoints import load_encoder, save_encoder
from biovfm_monai.errors import reason_of
from biovfm_monai.networks import spad_vit_tiny
from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle_segmentation")
BRAIN, HIPPOCAMPUS = "brain_mri_segmentation", "hippocampus_mri_segmentation"
NAMES = sorted(p.parent.name for p in (ROOT / "bundles").glob("*_segmentation/configs"))


def write_photographs(folder, count=5):
    """A bright box somewhere else in every picture, with a label map of 0 and 255."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels, label = rng.integers(40, 90, (150, 170, 3)).astype(np.uint8), np.zeros((150, 170), np.uint8)
        y, x = rng.integers(10, 90, 2)
        label[y : y + 50, x : x + 50] = 255
        pixels[label > 0] += 120
        for kind, array in (("images", pixels), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"picture_{number}.png")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("data") / "five photographs")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    return write_subjects(tmp_path_factory.mktemp("data") / "five subjects")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A copy of the brain bundle after the first command of its README, for one epoch, from another directory."""
    folder = tmp_path_factory.mktemp("a folder with a space")
    root = copy_bundle(BRAIN, folder)
    lines = (
        line.split() for line in (root / "docs/README.md").read_text().splitlines() if "configs/train.json" in line
    )
    places = {"configs/train.json": f"{root}/configs/train.json", ".": str(root)}
    command = [places.get(word, word) for word in next(lines)[1:]]
    command += ["--max_epochs", "1", "--validate::inferer::inferer::inferer::overlap", "0"]
    done = run_python(command, folder, TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    assert "val_mean_dice" in done.stdout
    return root


def test_training_leaves_weights_that_open_without_unpickling_and_a_log(trained):
    state = torch.load(trained / "models/model.pt", weights_only=True)
    assert any(name.startswith("encoder.") for name in state["model"])
    assert list((trained / "eval/tensorboard").iterdir())


def test_monai_bundle_load_gives_the_trained_network(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = load(BRAIN, bundle_dir=str(trained.parent), workflow_type="train", source="local", key_in_ckpt="model")
    expected = torch.load(trained / "models/model.pt", weights_only=True)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("verb", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_property_is_missing_before_there_are_weights(name, verb, subjects, photographs, tmp_path, monkeypatch):
    root = copy_bundle(name, tmp_path / "bundles")
    flat = json.loads((root / "configs/train.json").read_text())["spatial_dims"] == 2
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = workflow(root, verb, dataset_dir=str(photographs if flat else subjects))
    assert made.check_properties() == []
    assert list((tmp_path / "here").iterdir()) == []


def test_evaluation_writes_dice_per_image_and_class_and_a_picture(trained, subjects):
    run(trained, "evaluate", dataset_dir=str(subjects))
    rows = list(csv.DictReader((trained / "eval/val_mean_dice_raw.csv").open(), delimiter=","))
    assert [Path(row["filename"]).name for row in rows] == ["subject_4.nii.gz"]
    assert all(0 <= float(row[f"class{number}"]) <= 1 for row in rows for number in range(2))
    # One row of three pictures, 240 pixels wide.
    assert Image.open(trained / "eval/overlay.png").width == 3 * 244 + 4


def oblique():
    """Anisotropic, rotated, and left-handed."""
    turn = np.array(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.3, 0.25).GetMatrix()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, 0.9, 3.0])
    affine[:3, 3] = 11, -7, 30
    return affine


def threshold(path):
    """Weights of a 1 x 1 x 1 convolution that calls bright voxels class 1, and never says class 2."""
    weights = {"weight": torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1, 1, 1), "bias": torch.tensor([0.0, 0.0, -9.0])}
    torch.save({"model": weights}, path)
    return {
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1},
        "ckpt_path": str(path),
    }


def test_what_is_found_in_an_oblique_left_handed_thick_volume_lies_over_it(tmp_path):
    values = np.random.default_rng(0).uniform(0, 0.1, (40, 36, 16)).astype(np.float32)
    values[6:24, 5:20, 4:11] += 1
    write_volume(tmp_path / "mri/case.nii.gz", values, oblique())
    root = copy_bundle(BRAIN, tmp_path / "bundles")
    window = {"_target_": "monai.inferers.SlidingWindowInferer", "roi_size": "@crop_size"}
    options = {"section": "training", "inferer": window, **threshold(tmp_path / "model.pt")}
    run(root, "inference", dataset_dir=str(tmp_path / "mri"), **options)
    found = sitk.ReadImage(str(root / "eval/case/case_seg.nii.gz"))
    truth = sitk.ReadImage(str(tmp_path / "mri/case.nii.gz")) > 0.5
    assert found.GetSize() == truth.GetSize()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(truth, name)(), atol=1e-4)
    # In the world as well: both resampled to a grid of the scanner's axes.
    grid = sitk.Image(70, 70, 70, sitk.sitkUInt8)
    grid.SetOrigin([place - 35 for place in truth.TransformContinuousIndexToPhysicalPoint([20, 18, 8])])
    straight = [sitk.Resample(one, grid, sitk.Transform(), sitk.sitkNearestNeighbor) for one in (found, truth)]
    for pair in ((found, truth), straight):
        one, other = (sitk.GetArrayFromImage(each) > 0 for each in pair)
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.9


@pytest.mark.parametrize("verb", ["evaluate", "inference"])
@pytest.mark.parametrize(
    ("state", "words"),
    [(None, "no such file. Train first"), ({"other": torch.ones(1)}, "weights do not fit the network")],
)
def test_weights_that_are_missing_or_of_another_network_are_an_error_and_no_random_network(
    verb, state, words, subjects, tmp_path
):
    root = copy_bundle(BRAIN, tmp_path)
    if state is not None:
        (root / "models").mkdir()
        torch.save({"model": state}, root / "models/model.pt")
    assert words in refusal(root, verb, dataset_dir=str(subjects))


@pytest.mark.parametrize("verb", KINDS)
def test_without_images_a_bundle_says_what_to_put_where(verb, tmp_path):
    root = copy_bundle(HIPPOCAMPUS, tmp_path)
    made = workflow(root, verb)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it
        made.parser.get_parsed_content("train#dataset" if verb == "train" else "dataset")
    message = reason_of(caught.value)
    assert str(root / "data") in message
    assert "--dataset_dir" in message


def test_a_label_that_is_no_class_is_named_with_the_remedy(tmp_path):
    folder = write_subjects(tmp_path / "data")
    label = folder / "labels/subject_0.nii.gz"
    write_volume(label, np.asarray(nib.load(label).dataobj) * 3)
    root = copy_bundle(BRAIN, tmp_path / "bundles")
    message = refusal(root, "train", dataset_dir=str(folder), max_epochs=1)
    assert "subject_0.nii.gz: holds 3, 6; classes are 0 to 2" in message
    assert "--out_channels" in message


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    encoder = spad_vit_tiny(1, (24, 24, 24), [4, 4, 4], depth=2, embed_dim=48, num_heads=3)
    save_encoder(encoder, path, {"mean": 0.5, "std": 0.5})
    return path


def test_a_pretrained_encoder_is_what_training_begins_with_and_stays_so_while_frozen(encoder_path, subjects, tmp_path):
    root = copy_bundle(BRAIN, tmp_path)
    options = {"dataset_dir": str(subjects), "encoder_path": str(encoder_path), "max_epochs": 1, "fraction": 0.4}
    run(root, "train", frozen_epochs=1, **options)
    state = torch.load(root / "models/model.pt", weights_only=True)["model"]
    encoder = load_encoder(encoder_path).state_dict()
    assert all(torch.equal(state[f"encoder.{name}"], value) for name, value in encoder.items())
    run(root, "evaluate", dataset_dir=str(subjects), encoder_path=str(encoder_path), flips=[4])
    assert "weights do not fit" in refusal(root, "evaluate", dataset_dir=str(subjects))
    run(root, "train", adapter_rank=2, **options)
    state = torch.load(root / "models/model.pt", weights_only=True)["model"]
    changed = {name for name, value in encoder.items() if not torch.equal(state[f"encoder.{name}"], value)}
    assert changed
    assert all(name.endswith((".qkv.weight", ".proj.weight")) and ".attn." in name for name in changed)
    run(root, "evaluate", dataset_dir=str(subjects), encoder_path=str(encoder_path))
    run(root, "train", decoder="unetr", **options)
    assert "decoder.merges.0.first" in "".join(torch.load(root / "models/model.pt", weights_only=True)["model"])
    run(root, "evaluate", dataset_dir=str(subjects), encoder_path=str(encoder_path), decoder="unetr")


def test_overrides_as_monai_label_makes_them_go_on_from_the_weights(trained, subjects, tmp_path):
    root = tmp_path / BRAIN
    shutil.copytree(trained, root)
    handlers = json.loads((root / "configs/train.json").read_text())["train"]["handlers"]
    before = torch.load(root / "models/model.pt", weights_only=True)["model"]
    loader = {
        "_target_": "monai.handlers.CheckpointLoader", "load_path": str(root / "models/model.pt"),
        "load_dict": {"model": "$@network"},
    }  # fmt: skip
    items = [{key: str(subjects / f"{key}s/subject_{n}.nii.gz") for key in ("image", "label")} for n in range(2)]
    run(
        root, "train", device="cpu", learning_rate=1e-9,
        **{
            "train#trainer#max_epochs": 1, "train#dataset#data": items, "validate#dataset#data": items[:1],
            "train#handlers": [loader, *handlers],
        },
    )  # fmt: skip
    after = torch.load(root / "models/model.pt", weights_only=True)["model"]
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_photographs_are_learnt_and_label_maps_of_their_size_and_numbers_written(photographs, tmp_path):
    root = copy_bundle("nuclei_pathology_segmentation", tmp_path)
    small = {"crop_size": [1, 64, 64]}
    run(root, "train", dataset_dir=str(photographs), max_epochs=10, learning_rate=0.003, **small)
    run(root, "evaluate", dataset_dir=str(photographs))
    run(root, "inference", dataset_dir=str(photographs))
    (row,) = csv.DictReader((root / "eval/val_mean_dice_raw.csv").open())
    found = np.asarray(Image.open(root / "eval/picture_4/picture_4_seg.png"))
    truth = np.asarray(Image.open(photographs / "labels/picture_4.png"))
    assert found.shape == truth.shape
    assert set(np.unique(found)) <= {0, 255}
    dice = 2 * ((found > 0) & (truth > 0)).sum() / ((found > 0).sum() + (truth > 0).sum())
    assert dice == pytest.approx(float(row["class0"]), abs=1e-4)
    assert dice > 0.4  # that of one class for all pixels is 0.18


def test_thick_and_thin_slices_of_ct_train_and_are_segmented_with_one_network(tmp_path, caplog):
    for number in range(5):
        values, label = np.full((40, 40, 12), -1000, np.float32), np.zeros((40, 40, 12), np.uint8)
        values[8:30, 8:30, 2:10], label[8:30, 8:30, 2:10] = 100, 1 + number % 2
        affine = np.diag([1.5, 1.5, (1.5, 7.0)[number % 2], 1])
        write_volume(tmp_path / f"data/images/case_{number}.nii.gz", values, affine)
        write_volume(tmp_path / f"data/labels/case_{number}.nii.gz", label, affine)
    root = copy_bundle("multiorgan_ct_segmentation", tmp_path / "bundles")
    options = {"dataset_dir": str(tmp_path / "data"), "out_channels": 3, "crop_size": [8, 32, 32]}
    run(root, "train", max_epochs=1, samples_per_volume=2, **options)
    run(root, "inference", **options)
    assert nib.load(root / "eval/case_4/case_4_seg.nii.gz").shape == (40, 40, 12)
    assert "the network is one of" not in caplog.text
