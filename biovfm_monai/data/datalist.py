"""Find images on disk and describe each one as a datalist item, the way MONAI's datalist files do.

Format of the file: https://github.com/Project-MONAI/tutorials/blob/main/auto3dseg/README.md (sections of items).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import pydicom
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from biovfm_monai.data import modalities
from biovfm_monai.data.dicom import DICOM, image_headers, is_dicom, is_stack, sorted_slices
from biovfm_monai.data.reading import NIFTI, PHOTO, suffix
from biovfm_monai.errors import InputError

__all__ = ["DATALIST", "find_images", "load_datalist"]

logger = logging.getLogger(__name__)

DATALIST = "datalist.json"
"""Name of the file that, in a dataset folder, takes precedence over looking for images."""

_VOLUME = (".nrrd", ".mha", ".mhd")
_MODALITY = {
    "CT": "ct", "MR": "mri", "PT": "pet", "CR": "xray", "DX": "xray", "IO": "xray", "PX": "xray", "RF": "xray",
    "RG": "xray", "XA": "xray", "MG": "mammography", "US": "ultrasound", "SM": "pathology", "GM": "microscopy",
    "OP": "fundus", "OPT": "oct", "DMS": "dermoscopy", "XC": "dermoscopy", "ES": "endoscopy",
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
        Dicts with "image" (absolute path, or those of a volume's slices), "modality", and "spacing", "subject",
        "source", "label" where known.

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
    """Describe every image below a folder, or one file; DICOM files in one folder that are a volume's slices are one.

    The "image" of such a volume is their folder, or, where several series share it, the list of the slices. Only
    headers are read. Modality and patient come from a DICOM header (patients are numbered, their identifiers not kept),
    the modality else from the nearest enclosing folder that is named after one, the spacing in mm, along x, y and z,
    from the header.

    Args:
        folder: what is looked through.
        modality: modality of every image, whatever headers and folders say.

    Raises:
        InputError: when a header cannot be read, or an image has no modality.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.exists():
        raise InputError(f"{folder}: no such file or folder. Correct the path.")
    items: list[dict[str, Any]] = []
    ignored, patients = 0, dict[str, int]()
    for parent, files in _files_by_folder(folder):
        plain = [p for p in files if suffix(p) in (*NIFTI, *PHOTO, *_VOLUME) and suffix(p) != ".img"]
        slices = image_headers(p for p in files if p not in plain and is_dicom(p))
        ignored += len(files) - len(slices) - len(plain)
        items += [_describe(path, folder) for path in plain]
        items += _describe_dicom(parent, slices, folder, patients)
    if ignored:
        logger.info("%s: left out %d file(s) that are no images", folder, ignored)
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
    """Files of each folder below a root, links followed, nothing visited twice and nothing hidden."""
    if root.is_file():
        yield root.parent, [root]
        return
    seen: set[Path] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real = Path(parent).resolve()
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield Path(parent), sorted(Path(parent) / name for name in files if not name.startswith("."))
        seen.add(real)


def _endings() -> str:
    return " ".join((*NIFTI, *_VOLUME, *DICOM, *PHOTO))


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
    items: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        image = entry.get("image") if isinstance(entry, dict) else None
        paths: Any = [image] if isinstance(image, str) else image
        if not (isinstance(paths, list) and paths and all(isinstance(one, str) for one in paths)):
            raise InputError(f'{path}: item {number} of {section!r} has no "image". Write {{"image": "path", ...}}.')
        files = [folder / one for one in paths]
        given = str(files[0]) if isinstance(image, str) else [str(file) for file in files]
        items.append({"modality": _folder_modality(files[0], folder), **entry, "image": given})
    return items


def _describe(path: Path, root: Path) -> dict[str, Any]:
    item: dict[str, Any] = {"image": str(path), "modality": _folder_modality(path, root)}
    if suffix(path) not in PHOTO:
        item["spacing"] = _spacing(path)
    return item


def _describe_dicom(
    parent: Path, found: dict[Path, pydicom.Dataset], root: Path, patients: dict[str, int]
) -> Iterator[dict[str, Any]]:
    series: dict[str, dict[Path, pydicom.Dataset]] = {}
    for path, header in found.items():
        series.setdefault(str(header.get("SeriesInstanceUID")), {})[path] = header
    for headers in series.values():
        if is_stack(headers):
            slices, distance = sorted_slices(headers)
            image = parent if len(series) == 1 else [str(path) for path in slices]
            item = _dicom_item(image, headers[slices[0]], slices[0], root, patients)
            yield item | {"spacing": [*_spacing(slices[0])[:2], distance]}
        else:
            for path, header in headers.items():
                yield _dicom_item(path, header, path, root, patients)


def _dicom_item(
    image: Path | list[str], header: pydicom.Dataset, file: Path, root: Path, patients: dict[str, int]
) -> dict[str, Any]:
    modality = _MODALITY.get(str(header.get("Modality", ""))) or _folder_modality(file, root)
    named = image if isinstance(image, list) else str(image)
    item = {"image": named, "modality": modality, "spacing": _spacing(file)}
    if header.get("PatientID"):
        item["subject"] = f"patient-{patients.setdefault(str(header.PatientID), len(patients) + 1)}"
    return item


def _spacing(path: Path) -> list[float]:
    """Millimetres per voxel as the header says; nibabel for NIfTI, whose sheared grids SimpleITK refuses."""
    try:
        if suffix(path) in NIFTI:
            return [float(size) for size in nib.load(path).header.get_zooms()[:3]]
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return list(reader.GetSpacing())
    except (RuntimeError, OSError, EOFError, ImageFileError, HeaderDataError) as error:
        reason = (str(error).strip() or "empty").splitlines()[-1]
        raise InputError(f"{path}: header cannot be read ({reason}). Repair or remove the file.") from error


def _folder_modality(path: Path, root: Path) -> str | None:
    for parent in path.parents:
        if parent.name.lower() in _MODALITY.values():
            return parent.name.lower()
        if parent == root:
            break
    return None
