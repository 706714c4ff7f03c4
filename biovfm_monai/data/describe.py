"""What an item says of an image, by its header and by the folder it is in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pydicom

from biovfm_monai.anisotropy import anisotropy_of
from biovfm_monai.data import modalities
from biovfm_monai.data.dicom import dicom_header, sorted_slices
from biovfm_monai.data.headers import ARRAYS, Header, array_headers, header_of, suffix
from biovfm_monai.data.medmnist import describe_archive
from biovfm_monai.data.slides import describe_slide, is_slide
from biovfm_monai.errors import InputError

__all__ = ["Item", "describe_dicom", "describe_file", "folder_modality"]

Item = dict[str, Any]

_MODALITY = {
    "CT": "ct", "MR": "mri", "PT": "pet", "CR": "xray", "DX": "xray", "IO": "xray", "PX": "xray", "RF": "xray",
    "RG": "xray", "XA": "xray", "MG": "mammography", "US": "ultrasound", "SM": "pathology", "GM": "microscopy",
    "OP": "fundus", "OPT": "oct", "DMS": "dermoscopy", "XC": "dermoscopy", "ES": "endoscopy",
}  # fmt: skip


def describe_file(path: Path, root: Path) -> list[Item]:
    """The items of one file that is not DICOM: one, or one per volume.

    Raises:
        InputError: when its header cannot be used.
    """
    if suffix(path) == ".img":
        if not any(path.with_suffix(ending).exists() for ending in (".hdr", ".HDR")):
            raise InputError(f"{path}: has no .hdr file beside it. Copy it there, or remove the file.")
        return []  # the voxels of an .hdr file
    if is_slide(path):
        return describe_slide(path)
    if suffix(path) in ARRAYS:
        return describe_archive(path, array_headers(path))
    header = header_of(path)
    names = [str(path)] if header.volumes == 1 else [f"{path}::{n}" for n in range(header.volumes)]
    return [_item(name, folder_modality(path, root), header, header.volumes) for name in names]


def folder_modality(path: Path, root: Path) -> str | None:
    """The modality that the nearest enclosing folder, at most the root, is named after."""
    for parent in path.parents:
        if parent.name.lower() in modalities.__all__:
            return parent.name.lower()
        if parent == root:
            break
    return None


def _item(image: str | list[str], modality: str | None, header: Header, alike: int = 1) -> Item:
    """One item; of images that are nearly the same, such as time points, it says how many there are."""
    shape = [n for n, axis in zip(header.shape, "xyz", strict=False) if axis != "z" or n > 1]
    item: Item = {"image": image, "modality": modality, "shape": shape}
    item |= {"channels": header.channels, "dtype": header.dtype, "anisotropy": _degree(shape, header.spacing)}
    if header.spacing is not None:
        item["spacing"] = header.spacing
    if alike > 1:
        item["alike"] = alike
    return item


def _degree(shape: list[int], spacing: list[float] | None) -> int:
    """Degree of anisotropy of an image with these voxels, along x, y, z: that of its thickest axis.

    Five without depth or without spacing, when each slice stands for itself.
    """
    if len(shape) < 3 or spacing is None:
        return 5
    *plane, thick = sorted(spacing)
    return anisotropy_of([thick, plane[0], plane[0]])


def describe_dicom(whole: Path | None, headers: dict[Path, pydicom.Dataset], root: Path, alike: int) -> list[Item]:
    """The one item of a volume's slices, or of one file; `whole` is their folder if it holds nothing else."""
    slices = [*headers]
    distance = None
    if len(slices) > 1:
        slices, across, along = sorted_slices(headers)
        distance = math.hypot(across, *along)
    first = headers[slices[0]]
    header = dicom_header(slices[0], first)
    if distance is not None and header.spacing is not None:
        plane = header.spacing[:2]
        header = header._replace(shape=(*header.shape[:2], len(slices)), spacing=[*plane, distance])
    modality = _MODALITY.get(str(first.get("Modality", ""))) or folder_modality(slices[0], root)
    image = str(whole or slices[0]) if whole or len(slices) == 1 else [str(path) for path in slices]
    patient = {"patient": str(first.PatientID)} if first.get("PatientID") else {}
    return [_item(image, modality, header, alike) | patient]
