"""Which DICOM files make a volume, and in what order (DICOM PS3.3 C.7.6.2, the image plane module).

https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.7.6.2.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pydicom

from biovfm_monai.errors import InputError

__all__ = ["DICOM", "image_headers", "is_dicom", "is_stack", "read_header", "sorted_slices"]

DICOM = (".dcm", ".dicom", ".ima")
"""Endings of the names of DICOM files; many have none, and are known by their content."""

_PLACE = ("ImagePositionPatient", "ImageOrientationPatient")
"""The tags that say where a slice lies in the body, and how it is turned."""

_TAGS = ["Modality", "PatientID", "Rows", "SeriesInstanceUID", *_PLACE]
_DERIVED = {"PR", "REG", "RTDOSE", "SEG"}
_TOLERANCE = 0.02


def is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM file by its name or content."""
    return path.suffix.lower() in DICOM or pydicom.misc.is_dicom(path)


def read_header(path: Path) -> pydicom.Dataset:
    """The few tags of a DICOM file's header that are used, and no others.

    Raises:
        InputError: when the file is no DICOM file or cut short within the header.
    """
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: no readable DICOM file ({error}). Repair or remove it.") from error


def image_headers(paths: Iterable[Path]) -> dict[Path, pydicom.Dataset]:
    """Headers of those DICOM files that hold an image: no report, plan, signal, dose or segmentation.

    Raises:
        InputError: as `read_header`.
    """
    headers = {path: read_header(path) for path in paths}
    return {path: h for path, h in headers.items() if h.get("Rows") and h.get("Modality") not in _DERIVED}


def is_stack(headers: Mapping[Path, pydicom.Dataset]) -> bool:
    """Whether files are slices of one volume: several of one series, each with its place and direction."""
    placed = all(header.get(tag) for header in headers.values() for tag in _PLACE)
    return placed and len(headers) > 1 and len({str(h.get("SeriesInstanceUID")) for h in headers.values()}) == 1


def sorted_slices(headers: Mapping[Path, pydicom.Dataset]) -> tuple[list[Path], float]:
    """The slices of one volume in the order of their places, and their distance in mm.

    Args:
        headers: of a stack (`is_stack`).

    Raises:
        InputError: when slices have different directions, share a place, are unequally spaced (one is missing) or are
            shifted against each other (a tilted gantry), naming two of them or their folder.
    """
    paths = list(headers)
    directions = np.array([[float(v) for v in headers[p].ImageOrientationPatient] for p in paths])
    folder = paths[0].parent
    turned = np.abs(directions - directions[0]).max(axis=1) > 1e-3
    if turned.any():
        raise InputError(
            f"{folder}: {paths[0].name} and {paths[int(turned.argmax())].name} of one series have different "
            "directions. Give each direction a folder of its own."
        )
    places = np.array([[float(v) for v in headers[p].ImagePositionPatient] for p in paths])
    normal = np.cross(directions[0, :3], directions[0, 3:])
    order = np.argsort(places @ normal)
    paths, steps = [paths[n] for n in order], np.diff(places[order], axis=0)
    along = steps @ normal
    distance = float(np.median(along))
    if distance < 1e-3:
        raise InputError(
            f"{folder}: slices of one series share a place. Give each time point or echo a folder of its own."
        )
    shift = np.abs(steps - along[:, None] * normal).max(axis=1)
    if (shift > _TOLERANCE * distance).any():
        raise InputError(
            f"{folder}: slices are shifted by {shift.max():.3f} mm against each other (a tilted gantry). "
            "Straighten the series, for instance with dcm2niix."
        )
    uneven = np.abs(along - distance) > max(_TOLERANCE * distance, 1e-3)
    if uneven.any():
        n = int(uneven.argmax())
        raise InputError(
            f"{folder}: {paths[n].name} and {paths[n + 1].name} are {along[n]:.3f} mm apart, other slices "
            f"{distance:.3f} mm. Add the missing slices, or split the series into folders of equal distances."
        )
    return paths, distance
