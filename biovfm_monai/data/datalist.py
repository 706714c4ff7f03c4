"""Find images on disk and describe each one as a datalist item, the way MONAI's datalist files do.

Format of the file: https://github.com/Project-MONAI/tutorials/blob/main/auto3dseg/README.md (sections of items).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import pydicom
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError

from biovfm_monai.data import modalities
from biovfm_monai.data.reading import NIFTI, PHOTO, suffix
from biovfm_monai.errors import InputError

__all__ = ["DATALIST", "find_images", "load_datalist"]

logger = logging.getLogger(__name__)

DATALIST = "datalist.json"
"""Name of the file that, in a dataset folder, takes precedence over looking for images."""

_VOLUME = (".nrrd", ".mha", ".mhd")
_DICOM = (".dcm", ".dicom", ".ima")
_MODALITY = {
    "CT": "ct", "MR": "mri", "PT": "pet", "CR": "xray", "DX": "xray", "MG": "mammography", "US": "ultrasound",
    "SM": "pathology", "GM": "microscopy", "OP": "fundus", "OPT": "oct", "XC": "dermoscopy", "ES": "endoscopy",
}  # fmt: skip


def load_datalist(
    dataset_dir: str | Path, section: str = "training", modality: str | None = None
) -> list[dict[str, Any]]:
    """Items of a dataset folder: those of its datalist.json, or else all images found below it.

    Args:
        dataset_dir: folder with images, or with a datalist.json whose paths are relative to it.
        section: which list of datalist.json; a folder without that file is all "training".
        modality: modality of every item, whatever headers and folders say.

    Returns:
        Dicts with "image" (absolute path), "modality", and "spacing", "subject", "source", "label" where known.

    Raises:
        InputError: when the folder is missing or empty, or an item has no file or no modality.
    """
    folder = Path(dataset_dir).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give the folder that holds your images as --dataset_dir.")
    if (folder / DATALIST).is_file():
        items = _with_modality(_read_section(folder, section), modality)
    elif section == "training":
        items = find_images(folder, modality)
    else:
        raise InputError(f"{folder}: without {DATALIST} all its images are 'training'. Write one to have {section!r}.")
    if not items:
        raise InputError(f"{folder}: no image found for {section!r}. Supported: {_endings()}.")
    return items


def find_images(folder: str | Path, modality: str | None = None) -> list[dict[str, Any]]:
    """Describe every image below a folder, or one file; a folder of DICOM slices of one series is one image.

    Only headers are read. Modality and patient come from a DICOM header (the patient's identifier is hashed), the
    modality else from the nearest enclosing folder that is named after one, the spacing in mm from the header.

    Args:
        folder: what is looked through.
        modality: modality of every image, whatever headers and folders say.

    Raises:
        InputError: when a header cannot be read, an image has no modality, or slices of several series share a folder.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.exists():
        raise InputError(f"{folder}: no such file or folder. Correct the path.")
    items, ignored = [], 0
    for parent, files in _files_by_folder(folder):
        slices = [p for p in files if suffix(p) in _DICOM]
        plain = [p for p in files if suffix(p) in (*NIFTI, *PHOTO, *_VOLUME) and suffix(p) != ".img"]
        ignored += len(files) - len(slices) - len(plain)
        items += [_describe(path, folder) for path in plain]
        items += _describe_dicom(parent, slices, folder)
    if ignored:
        logger.info("%s: left out %d file(s) that are no image by their ending", folder, ignored)
    return _with_modality(items, modality)


def _with_modality(items: list[dict[str, Any]], modality: str | None) -> list[dict[str, Any]]:
    for item in items:
        item["modality"] = modality or item.get("modality")
        if item["modality"] is None:
            raise InputError(
                f"{item['image']}: cannot tell the modality. Put the file into a folder named after it "
                f"({', '.join(modalities.__all__)}), or give one --modality for all files."
            )
    return items


def _files_by_folder(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    if root.is_file():
        yield root.parent, [root]
        return
    for parent in [root, *sorted(p for p in root.rglob("*") if p.is_dir() and not _hidden(p, root))]:
        yield parent, sorted(p for p in parent.iterdir() if p.is_file() and not p.name.startswith("."))


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _endings() -> str:
    return " ".join((*NIFTI, *_VOLUME, *_DICOM, *PHOTO))


def _read_section(folder: Path, section: str) -> list[dict[str, Any]]:
    path = folder / DATALIST
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no valid JSON ({error}). Correct the file.") from error
    if not isinstance(sections, dict) or not isinstance(sections.get(section), list):
        names = ", ".join(sections) if isinstance(sections, dict) else "no sections at all"
        raise InputError(f"{path}: has no list {section!r}, but {names}. Add it, or name another.")
    entries = sections[section]
    items = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise InputError(f'{path}: item {number} of {section!r} has no "image". Write {{"image": "path", ...}}.')
        items.append({**entry, "image": str(folder / entry["image"])})
    return items


def _describe(path: Path, root: Path) -> dict[str, Any]:
    item: dict[str, Any] = {"image": str(path), "modality": _folder_modality(path, root)}
    if suffix(path) not in PHOTO:
        item["spacing"] = _spacing(path)
    return item


def _describe_dicom(parent: Path, slices: list[Path], root: Path) -> Iterator[dict[str, Any]]:
    if not slices:
        return
    headers = {path: _dicom_header(path) for path in slices}
    series = {str(header.get("SeriesInstanceUID", path)) for path, header in headers.items()}
    if len(series) == 1 and len(slices) > 1:
        yield _dicom_item(parent, headers, root)
        return
    if len(series) < len(slices):
        raise InputError(f"{parent}: holds slices of {len(series)} DICOM series. Give each series a folder of its own.")
    for path, header in headers.items():
        yield _dicom_item(path, {path: header}, root)


def _dicom_item(image: Path, headers: dict[Path, pydicom.Dataset], root: Path) -> dict[str, Any]:
    first, header = next(iter(headers.items()))
    spacing = _spacing(first)
    places = [h.ImagePositionPatient for h in headers.values() if h.get("ImagePositionPatient")]
    if len(places) > 1:
        # The header of one slice does not tell the distance to the next.
        spacing[2] = min(math.dist(places[0], place) for place in places[1:])
    modality = _MODALITY.get(str(header.get("Modality", ""))) or _folder_modality(first, root)
    item = {"image": str(image), "modality": modality, "spacing": spacing}
    if header.get("PatientID"):
        item["subject"] = hashlib.sha256(str(header.PatientID).encode()).hexdigest()[:12]
    return item


def _dicom_header(path: Path) -> pydicom.Dataset:
    try:
        tags = ["Modality", "PatientID", "SeriesInstanceUID", "ImagePositionPatient"]
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: no readable DICOM file ({error}). Repair or remove it.") from error


def _spacing(path: Path) -> list[float]:
    """Millimetres per voxel as the header says; nibabel for NIfTI, whose sheared grids SimpleITK refuses."""
    try:
        if suffix(path) in NIFTI:
            return [float(size) for size in nib.load(path).header.get_zooms()[:3]]
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return list(reader.GetSpacing())
    except (RuntimeError, OSError, EOFError, ImageFileError) as error:
        reason = (str(error).strip() or "empty").splitlines()[-1]
        raise InputError(f"{path}: header cannot be read ({reason}). Repair or remove the file.") from error


def _folder_modality(path: Path, root: Path) -> str | None:
    for parent in path.parents:
        if parent.name.lower() in _MODALITY.values():
            return parent.name.lower()
        if parent == root:
            break
    return None
