"""A bundle's configurations run in this process, as MONAI's own tools do, and small data for them."""

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from monai.bundle import ConfigWorkflow

from biovfm_monai.errors import reason_of

KINDS = {"train": "train", "evaluate": "infer", "inference": "infer"}


def workflow(root, verb, *overlays, **overrides):
    """The configuration of a verb, with overlays of configs/ on top, after its `initialize`."""
    files = [str(root / f"configs/{verb}.json"), *(str(ROOT / f"configs/{name}.json") for name in overlays)]
    made = ConfigWorkflow(files, workflow_type=KINDS[verb], logging_file=False, bundle_root=str(root), **overrides)
    made.initialize()
    return made


def run(root, verb, *overlays, **overrides):
    made = workflow(root, verb, *overlays, **overrides)
    made.run()
    made.finalize()
    return made


def refusal(root, verb, **overrides):
    """The line that tells why it does not run."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it
        run(root, verb, **overrides)
    return reason_of(caught.value)


def write_volume(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def write_subjects(folder, count=5, size=(26, 30, 28)):
    """Two boxes of other brightness, each its own class, somewhere else in every volume."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image, label = rng.uniform(0, 100, size).astype(np.float32), np.zeros(size, np.uint8)
        for value in (1, 2):
            x, y, z = rng.integers(2, 12, 3)
            label[x : x + 10, y : y + 10, z : z + 10] = value
        image += np.float32(300) * label
        write_volume(folder / f"images/subject_{number}.nii.gz", image)
        write_volume(folder / f"labels/subject_{number}.nii.gz", label)
    return folder
