"""Which DICOM files make a volume, and in what order (DICOM PS3.3 C.7.6.2, the image plane module).

https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.7.6.2.html
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian

from biovfm_monai.data.headers import Header, checked, itk_spacing, readable
from biovfm_monai.errors import InputError

__all__ = [
    "DICOM", "Stack", "dicom_header", "image_headers", "is_dicom", "is_film", "is_image", "is_stack", "read_header",
    "sorted_slices", "volumes",
]  # fmt: skip

DICOM = (".dcm", ".dicom", ".ima")
"""Endings of the names of DICOM files; many have none, and are known by their content."""

_PLACE = ("ImagePositionPatient", "ImageOrientationPatient")
_SERIES = ("SeriesInstanceUID", "Rows", "Columns")
"""The tags that say where a slice lies in the body, and how it is turned."""

_TAGS = [
    "AcquisitionNumber", "BitsAllocated", "Columns", "GridFrameOffsetVector", "InstanceNumber", "Modality",
    "NumberOfFrames", "PatientID", "PhotometricInterpretation", "PixelRepresentation", "PixelSpacing", "RescaleSlope",
    "Rows", "SOPInstanceUID", "SamplesPerPixel", "SeriesInstanceUID",
    "SharedFunctionalGroupsSequence", "SpacingBetweenSlices", *_PLACE,
]  # fmt: skip
_DISTANCES = ("GridFrameOffsetVector", "SharedFunctionalGroupsSequence", "SpacingBetweenSlices")
_DERIVED = {"PR", "REG", "RTDOSE", "SEG"}
_DEFLATED = 2**20
_TOLERANCE = 0.02
_TURNED = 1e-3


def is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM file by its name or content."""
    return path.suffix.lower() in DICOM or pydicom.misc.is_dicom(path)


def read_header(path: Path) -> pydicom.Dataset:
    """The few tags of a DICOM file's header that are used, and no others.

    Raises:
        InputError: when the file is no DICOM file or cut short within the header.
    """
    with readable(path, "no readable DICOM file"), path.open("rb") as file:
        if DeflatedExplicitVRLittleEndian.encode() in file.read(1024) and path.stat().st_size > _DEFLATED:
            raise InputError(f"{path}: deflated DICOM files may unpack to any size. Save it in another syntax.")
        file.seek(0)
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
        if is_image(header):
            _check_numbers(path, header)
            _check_pixels(path, header, file)
        return header


def _check_numbers(path: Path, header: pydicom.Dataset) -> None:
    """Refuse a header whose numbers are none, or cannot be."""
    if int(header.get("SamplesPerPixel") or 1) > 1 and int(header.get("BitsAllocated", 8)) > 8:
        raise InputError(f"{path}: has colours of {header.BitsAllocated} bits. Save them with 8.")
    _count(header)
    if any(len(_numbers(header, tag)) != count for tag, count in zip(_PLACE, (3, 6), strict=True) if header.get(tag)):
        raise InputError(f"{path}: its place or direction is not complete. Repair or remove the file.")
    spacing = [float(size) for size in header.get("PixelSpacing") or ()]
    if not all(0 < size < math.inf for size in spacing):
        raise InputError(f"{path}: its header says a spacing of {spacing} mm. Correct it, or remove the file.")
    if float(1 if header.get("RescaleSlope") is None else header.RescaleSlope) == 0:
        raise InputError(f"{path}: its values are rescaled by zero. Correct it, or remove the file.")


def _check_pixels(path: Path, header: pydicom.Dataset, file: BinaryIO) -> None:
    """Refuse a file with less pixels than its header says; GDCM would show memory, or ask for all there is.

    Args:
        path: of the file.
        header: of an image.
        file: where its pixels begin.
    """
    syntax = header.file_meta.TransferSyntaxUID
    if syntax == DeflatedExplicitVRLittleEndian:
        return
    order, size = "<" if syntax.is_little_endian else ">", path.stat().st_size
    begin = file.read(8)
    if begin[4:6].isalpha():
        begin = begin[:4] + file.read(4)
    if len(begin) < 8:
        raise InputError(f"{path}: holds no pixels. Copy it again, or remove it.")
    (length,) = struct.unpack(f"{order}I", begin[4:])
    if length == 2**32 - 1:
        while (item := file.read(8))[:4] != b"\xfe\xff\xdd\xe0":
            (length,) = struct.unpack("<I", item[4:])
            if item[:4] != b"\xfe\xff\x00\xe0" or file.tell() + length > size:
                raise InputError(f"{path}: is cut short. Copy it again, or remove it.")
            file.seek(length, 1)
        return
    frames, bits = int(header.get("NumberOfFrames") or 1), int(header.get("BitsAllocated", 16))
    bits *= int(header.get("SamplesPerPixel") or 1)
    bits = bits * 2 // 3 if header.get("PhotometricInterpretation") == "YBR_FULL_422" else bits
    if min(length, size - file.tell()) < int(header.Rows) * int(header.get("Columns") or 0) * frames * bits // 8:
        raise InputError(f"{path}: holds less pixels than its header says. Copy it again, or remove it.")
    if not syntax.is_little_endian and int(header.get("BitsAllocated", 16)) > 16:
        raise InputError(f"{path}: numbers of 32 bits with the highest first are not read. Save them the other way.")


def is_image(header: pydicom.Dataset) -> bool:
    """Whether a DICOM file holds an image: no report, plan, signal, dose or segmentation."""
    return bool(header.get("Rows")) and header.get("Modality") not in _DERIVED


def image_headers(paths: Iterable[Path]) -> dict[Path, pydicom.Dataset]:
    """Headers of those DICOM files that hold an image (`is_image`).

    Raises:
        InputError: as `read_header`.
    """
    headers = {path: read_header(path) for path in paths}
    return {path: header for path, header in headers.items() if is_image(header)}


def is_film(header: pydicom.Dataset) -> bool:
    """Whether a file holds several frames that have no distance from each other in space."""
    return int(header.get("NumberOfFrames") or 1) > 1 and not any(header.get(tag) for tag in _DISTANCES)


def dicom_header(path: Path, header: pydicom.Dataset) -> Header:
    """Size, channels, type and spacing of the image in one DICOM file, or of one slice.

    Raises:
        InputError: when they cannot be read, or cannot be.
    """
    frames = int(header.get("NumberOfFrames") or 1)
    shape = (int(header.get("Columns") or 0), int(header.Rows), *([frames] if frames > 1 else []))
    sign = "" if header.get("PixelRepresentation") else "u"
    spacing = None if is_film(header) else itk_spacing(path)
    dtype = f"{sign}int{header.get('BitsAllocated', 16)}"
    samples = int(header.get("SamplesPerPixel") or 1)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        samples, dtype = 3, "uint8"
    return checked(path, Header(shape, samples, dtype, spacing))


def volumes(headers: Mapping[Path, pydicom.Dataset]) -> list[list[list[Path]]]:
    """Sort files into volumes, of one series, direction and size each.

    Args:
        headers: of images, by file.

    Returns:
        Per series, direction and size the files of each of its time points (echoes, diffusion directions), one list
        where slices do not come equally often; files without a place are a volume each.
    """
    series: dict[tuple[str, ...], list[list[Path]]] = {}
    for path, header in headers.items():
        placed = all(header.get(tag) for tag in _PLACE)
        groups = series.setdefault(tuple(str(header.get(tag)) for tag in _SERIES) if placed else (str(path),), [])
        group = next((group for group in groups if _turned_alike(headers[group[0]], header)), None)
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    return [_time_points({path: headers[path] for path in group}) for groups in series.values() for group in groups]


def _turned_alike(a: pydicom.Dataset, b: pydicom.Dataset) -> bool:
    return float(np.abs(_numbers(a, _PLACE[1]) - _numbers(b, _PLACE[1])).max()) <= _TURNED


def _time_points(headers: Mapping[Path, pydicom.Dataset]) -> list[list[Path]]:
    if len(headers) == 1:
        return [[*headers]]
    at: dict[tuple[float, ...], list[Path]] = {}
    for path in sorted(headers, key=lambda path: (*_count(headers[path]), path)):
        at.setdefault(tuple(_numbers(headers[path], _PLACE[0]).round(2).tolist()), []).append(path)
    times = {len(paths) for paths in at.values()}
    return [list(files) for files in zip(*at.values(), strict=True)] if len(times) == 1 else [[*headers]]


def _count(header: pydicom.Dataset) -> tuple[int, int]:
    return int(header.get("AcquisitionNumber") or 0), int(header.get("InstanceNumber") or 0)


def _numbers(header: pydicom.Dataset, tag: str) -> np.ndarray:
    return np.array([float(value) for value in header[tag].value])


def is_stack(headers: Mapping[Path, pydicom.Dataset]) -> bool:
    """Whether files are slices of one volume: several of one series, each with its place and direction."""
    placed = all(header.get(tag) for header in headers.values() for tag in _PLACE)
    return placed and len(headers) > 1 and len({str(h.get("SeriesInstanceUID")) for h in headers.values()}) == 1


class Stack(NamedTuple):
    """The slices of one volume, in the order of their places."""

    paths: list[Path]
    #: mm from one to the next, across them.
    distance: float
    #: mm from one to the next, along them, in DICOM's axes; zero unless the gantry was tilted.
    shift: np.ndarray


def sorted_slices(headers: Mapping[Path, pydicom.Dataset]) -> Stack:
    """The slices of one volume in the order of their places, and how one lies to the next.

    Args:
        headers: of a stack (`is_stack`).

    Raises:
        InputError: when slices have different directions, share a place, are unequally spaced (one is missing) or
            unequally shifted against each other, naming two of them or their folder.
    """
    paths = list(headers)
    directions = np.array([_numbers(headers[p], _PLACE[1]) for p in paths])
    folder = paths[0].parent
    turned = np.abs(directions - directions[0]).max(axis=1) > _TURNED
    if turned.any():
        raise InputError(
            f"{folder}: {paths[0].name} and {paths[int(turned.argmax())].name} of one series have different "
            "directions. Give each direction a folder of its own."
        )
    places = np.array([_numbers(headers[p], _PLACE[0]) for p in paths])
    normal = np.cross(directions[0, :3], directions[0, 3:])
    order = np.argsort(places @ normal)
    paths, steps = [paths[n] for n in order], np.diff(places[order], axis=0)
    along = steps @ normal
    distance = float(np.median(along))
    if distance < 1e-3:
        raise InputError(
            f"{folder}: slices of one series share a place. Give each time point or echo a folder of its own."
        )
    uneven = np.abs(along - distance) > max(_TOLERANCE * distance, 1e-3)
    if uneven.any():
        n = int(uneven.argmax())
        raise InputError(
            f"{folder}: {paths[n].name} and {paths[n + 1].name} are {along[n]:.3f} mm apart, other slices "
            f"{distance:.3f} mm. Add the missing slices, or split the series into folders of equal distances."
        )
    return Stack(paths, distance, _shift(folder, steps - along[:, None] * normal, distance))


def _shift(folder: Path, shifts: np.ndarray, distance: float) -> np.ndarray:
    """By how much each slice of a tilted gantry is shifted against the last, and zero where that is next to nothing."""
    tilt = np.median(shifts, axis=0)
    if (np.linalg.norm(shifts - tilt, axis=1) > _TOLERANCE * distance).any():
        sizes = np.linalg.norm(shifts, axis=1)
        raise InputError(
            f"{folder}: slices are shifted by {sizes.min():.3f} to {sizes.max():.3f} mm against each other. Split the "
            "series into folders of equal shifts."
        )
    size = float(np.linalg.norm(tilt))
    if size > distance:
        raise InputError(
            f"{folder}: slices {distance:.3f} mm apart are shifted by {size:.3f} mm against each other, more than any "
            "gantry is tilted. Correct the places in their headers."
        )
    return tilt if size > _TOLERANCE * distance else np.zeros(3)
