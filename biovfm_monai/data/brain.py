"""A labelled brain from what ships with nilearn: the MNI152 T1 with its grey and white matter, cut into slabs.

The template: https://doi.org/10.1016/j.neuroimage.2010.07.033.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from biovfm_monai.data.samples import brain_box, lay_out, sample_datalist

__all__ = ["TISSUES", "write_brain"]

TISSUES = ["background", "grey matter", "white matter"]
"""Classes of the label maps."""

_PARTS = ("training", "test", "training", "validation", "training", "test")
_GAP = 4


def write_brain(folder: str | Path) -> str:
    """Lay the MNI152 brain out as six coronal slabs with label maps; a folder that has a datalist is left as it is.

    From back to front the slabs are for training, test, training, validation, training and test; four slices
    between two are left out. They run from left to right, since one side of the symmetric template shows the other. A
    voxel is of the tissue that is likelier there than anything else. Of several processes only the main one writes.

    Returns:
        The folder.

    Raises:
        InputError: when the folder holds something else.
    """
    return lay_out(Path(folder), _slabs)


def _slabs(folder: Path) -> dict[str, list[dict[str, str]]]:
    brain = sample_datalist()[0]
    image, grey, white = (nib.load(path) for path in (brain["image"], *brain["label"]))
    first, second = (np.asarray(tissue.dataobj).astype(np.int32) for tissue in (grey, white))
    classes = np.stack([255 - first - second, first, second]).argmax(0).astype(np.uint8)
    label = nib.Nifti1Image(classes, image.affine)
    x, y, z = brain_box(np.asarray(image.dataobj))
    ends = np.linspace(y.start, y.stop + _GAP, len(_PARTS) + 1).round().astype(int)
    sections: dict[str, list[dict[str, str]]] = {part: [] for part in _PARTS}
    for number, part in enumerate(_PARTS):
        place = (x, slice(int(ends[number]), int(ends[number + 1]) - _GAP), z)
        item = {"image": f"mni152_slab{number}.nii.gz", "label": f"mni152_slab{number}_tissue.nii.gz"}
        nib.save(image.slicer[place], folder / item["image"])
        nib.save(label.slicer[place], folder / item["label"])
        sections[part].append({**item, "modality": "mri", "subject": f"mni152 slab {number}"})
    return sections
