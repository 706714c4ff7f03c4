"""Bundles on data of all kinds: volumes of thick and thin slices, stores, worker processes, two Gloo processes."""

import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from programs import run_python, run_together
from skimage import data as photographs

from biovfm_monai.checkpoints import encoder_info
from biovfm_monai.data import index, pack
from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle_data")


def write_volume(path, shape, thickness):
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(-900, 900, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([1, 1, thickness, 1])), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thin and thick slices, photographs and radiographs."""
    root = tmp_path_factory.mktemp("data") / "a folder"
    for modality in ("ct", "mri"):
        write_volume(root / modality / "thin.nii.gz", (112, 112, 56), 1)
        write_volume(root / modality / "thick.nii.gz", (112, 112, 14), 5)
    for modality, photo in (("pathology", photographs.immunohistochemistry()), ("xray", photographs.coins())):
        (root / modality).mkdir()
        Image.fromarray(photo[:200, :200]).save(root / modality / "a.png")
        Image.fromarray(photo[60:260, 60:260]).save(root / modality / "b.png")
    return root


@pytest.fixture(scope="module")
def store(folder):
    index([folder], folder.with_name("list") / "datalist.parquet")
    pack(folder.with_name("list") / "datalist.parquet", folder.with_name("store"), num_workers=1)
    return folder.with_name("store")


def run(root, verb, *overrides, cwd, processes=1):
    configs = f"['{root}/configs/{verb}.json'" + (f",'{ROOT}/configs/smoke.json']" if verb == "train" else "]")
    command = ["-m", "monai.bundle", "run", "--config_file", configs, "--bundle_root", root, *overrides]
    if processes > 1:
        return run_together(processes, command, cwd)
    done = run_python(command, cwd, TMPDIR=str(cwd))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def losses(root):
    return [json.loads(line)["loss"] for line in (root / "eval/log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("modality", ["ct", "mri", "xray", "pathology"])
def test_the_bundle_of_a_modality_trains_on_its_images_among_others(folder, tmp_path, modality):
    root = copy_bundle(f"{modality}_mae_pretraining", tmp_path / "a folder")
    printed = run(root, "train", "--dataset_dir", folder, cwd=tmp_path)
    assert f"6 of 8 images are of another modality than {modality}" in printed
    assert len(losses(root)) == 2
    channels = encoder_info(root / "models/encoder.safetensors")["network"]["in_channels"]
    assert channels == (3 if modality == "pathology" else 1)
    if modality == "ct":
        run(root, "inference", "--dataset_dir", folder, cwd=tmp_path)
        lines = (root / "eval/embeddings.csv").read_text().splitlines()
        assert len(lines) == 2
        assert all(len(line.split(",")) == 193 for line in lines)


def test_the_bundle_of_radiographs_asks_for_some(tmp_path):
    root = copy_bundle("xray_mae_pretraining", tmp_path)
    with pytest.raises(AssertionError, match="no folder of images is given"):
        run(root, "train", cwd=tmp_path)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    root = copy_bundle("mri_mae_pretraining", folder)
    run(root, "train", "--dataset_dir", store, "--steps_per_epoch", "4", cwd=folder)
    return losses(root)


@pytest.mark.parametrize("how", [("--num_workers", "2"), ("processes", 2)])
def test_workers_and_processes_see_the_same_crops_views_and_masks(store, alone, tmp_path, how):
    root = copy_bundle("mri_mae_pretraining", tmp_path)
    options, processes = (how, 1) if how[0] == "--num_workers" else ((), 2)
    run(root, "train", "--dataset_dir", store, "--steps_per_epoch", "4", *options, cwd=tmp_path, processes=processes)
    assert losses(root) == pytest.approx(alone, rel=1e-4)
