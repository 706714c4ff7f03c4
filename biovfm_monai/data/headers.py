"""What a file's header says of the image in it: size, channels, type, spacing; no pixel is read."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image

from biovfm_monai.data.upright import orientation_of, orientation_of_tiff, upright_size
from biovfm_monai.errors import InputError, UnreadableError

__all__ = [
    "APART", "ARRAYS", "NIFTI", "PHOTO", "TIFF", "VOLUME", "Header", "array_headers", "checked", "header_of",
    "is_colour", "itk_spacing", "nifti_unit", "readable", "suffix", "tiff_axes",
]  # fmt: skip

NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
VOLUME = (".nrrd", ".nhdr", ".mha", ".mhd")
TIFF = (".tif", ".tiff")
PHOTO = (".png", ".jpg", ".jpeg", ".bmp")
ARRAYS = (".npz",)

APART = 1e8
"""Millimetres between slices that have no place beside each other, such as the frames of a film (PUMIT's number)."""

_LARGEST = 8 * 2**30
_DEFLATE = 1032
"""What a byte can unpack to at most."""
_PHOTOS = ("PNG", "JPEG", "BMP", "TIFF")
_MILLIMETRES = {"mm": 1.0, "micron": 1e-3, "um": 1e-3, "µm": 1e-3, "\\u00B5m": 1e-3, "nm": 1e-6}
_IN_PAGES = "ZIQRT"
_VECTORS = (1006, 1007, 1008)


class Header(NamedTuple):
    """An image by its header.

    Attributes:
        shape: voxels along x, y and z; two numbers without depth.
        channels: of each voxel.
        dtype: in numpy's words, as stored.
        spacing: mm along x, y, z; None where the header tells none.
        volumes: images of that shape in the file, such as time points.
    """

    shape: tuple[int, ...]
    channels: int
    dtype: str
    spacing: list[float] | None = None
    volumes: int = 1


def suffix(path: Path) -> str:
    """The ending of a file's name in lower case, ".nii.gz" as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn what a library raises at a broken file into an InputError that names the file."""
    try:
        yield
    except (MemoryError, InputError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        message = f"{path}: {what} ({type(error).__name__}: {reason}). Repair or remove the file."
        raise UnreadableError(message) from error


def header_of(path: Path) -> Header:
    """Read the header of an image file other than DICOM.

    Raises:
        InputError: when it cannot be read, or what it says cannot be: no voxels, a spacing that is not positive, more
            than 8 GiB.
    """
    ending = suffix(path)
    with readable(path, "header cannot be read"):
        if not path.stat().st_size:
            raise InputError(f"{path}: the file is empty. Copy it again, or remove it.")
        if ending in NIFTI:
            header = _nifti(path)
        elif ending in VOLUME:
            header = _itk(path)
        elif ending in TIFF:
            header = _tiff(path)
        else:
            header = _photo(path)
    return checked(path, header)


def checked(path: Path, header: Header) -> Header:
    """Refuse a header that says what cannot be.

    Raises:
        InputError: as `header_of`.
    """
    if not header.shape or min(header.shape) < 1 or header.volumes < 1:
        raise InputError(
            f"{path}: its header says size {header.shape}, {header.volumes} times. Repair or remove the file."
        )
    if header.spacing is not None and not all(0 < size < math.inf for size in header.spacing):
        raise InputError(f"{path}: its header says a spacing of {header.spacing} mm. Correct it, or remove the file.")
    size = math.prod(header.shape) * header.channels * 4
    if size > _LARGEST:
        raise InputError(f"{path}: would take {size / 2**30:.0f} GiB of memory, more than {_LARGEST >> 30}. Cut it up.")
    return header


def _nifti(path: Path) -> Header:
    image = nib.load(path)
    header = image.header
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        raise InputError(f"{path}: voxels of type {dtype} are no image of one channel. Convert or remove the file.")
    if len(shape) < 2 or math.prod(shape[4:]) > 1:
        raise InputError(f"{path}: an array of size {shape} is no image, nor images over time. Remove the file.")
    if int(header.get("intent_code", 0)) in _VECTORS:
        raise InputError(f"{path}: holds displacements or vectors, no image. Remove the file.")
    raw = image.file_map.get("header", image.file_map["image"])
    with raw.get_prepare_fileobj("rb") as file:
        # nibabel has made one millimetre of what is zero.
        if not type(header).from_fileobj(file, check=False)["pixdim"][1 : min(len(shape), 3) + 1].all():
            raise InputError(f"{path}: its header says a spacing of zero. Correct it, or remove the file.")
    spacing = [float(size) * nifti_unit(header) for size in header.get_zooms()[:3]]
    found = checked(path, Header(tuple(shape[:3]), 1, str(dtype), spacing, shape[3] if len(shape) > 3 else 1))
    voxels = Path(image.file_map["image"].filename)
    _require_there(path, math.prod(shape) * dtype.itemsize, voxels, suffix(voxels) == ".nii.gz")
    return found


def _require_there(path: Path, size: int, voxels: Path, packed: bool) -> None:
    """Refuse a header that says more bytes than a file can hold; readers take the memory first."""
    if size > voxels.stat().st_size * (_DEFLATE if packed else 1):
        raise InputError(f"{path}: its header says more voxels than there are in the file. Repair or remove it.")


def nifti_unit(header: Any) -> float:
    """Millimetres that a NIfTI header counts in; NIfTI without a unit, and Analyze, are in millimetres."""
    return {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0) if "xyzt_units" in header else 1.0


def _information(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def itk_spacing(path: Path) -> list[float]:
    """Millimetres per voxel as ITK understands a header.

    Raises:
        InputError: when it cannot be read.
    """
    with readable(path, "header cannot be read"):
        return list(_information(path).GetSpacing())


def _itk(path: Path) -> Header:
    reader = _information(path)
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if len(size) > 3:
        raise InputError(f"{path}: holds {size[3]} volumes. Save each as a file.")
    dtype = sitk.GetPixelIDValueAsString(reader.GetPixelID()).removeprefix("vector of ")
    found = checked(path, Header(tuple(size), components, _DTYPES.get(dtype, dtype), list(reader.GetSpacing())))
    if suffix(path) in (".mha", ".nrrd"):
        _require_there(path, math.prod(size) * components, path, True)
    return found


_DTYPES = {
    f"{bits}-bit {sign} integer": f"{'u' if sign == 'unsigned' else ''}int{bits}"
    for bits in (8, 16, 32, 64)
    for sign in ("signed", "unsigned")
} | {"32-bit float": "float32", "64-bit float": "float64"}


def _photo(path: Path) -> Header:
    # Pillow would take a PostScript file of this name, and run a program on it.
    with Image.open(path, formats=_PHOTOS) as image:
        mode, frames = image.mode, getattr(image, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{path}: holds {frames} pictures, a film. Save each as a file.")
        dtype = {"I": "int32", "F": "float32"}.get(mode, "uint16" if mode.startswith("I;16") else "uint8")
        grey = mode in ("1", "L", "LA") or dtype != "uint8"
        size = upright_size(image.size, orientation_of(image))
        return Header(size, 1 if grey else 4 if mode == "RGBA" else 3, dtype)


def is_colour(shape: tuple[int, ...]) -> bool:
    """Whether an array of an archive holds one image with its colours last, and not a volume."""
    return len(shape) == 3 and shape[-1] in (3, 4)


def tiff_axes(path: Path, axes: str, shape: tuple[int, ...]) -> tuple[int, int, int | None, list[int]]:
    """Which axes of a TIFF's array are x, y, the pages, and the channels.

    Raises:
        InputError: when more than one axis runs over pages.
    """
    pages = [n for n, (axis, size) in enumerate(zip(axes, shape, strict=True)) if axis in _IN_PAGES and size > 1]
    strange = [axis for axis, size in zip(axes, shape, strict=True) if size > 1 and axis not in "XYCS" + _IN_PAGES]
    if len(pages) > 1 or strange:
        raise InputError(f"{path}: its axes {axes} of {shape} are more than a volume's. Save each volume as a file.")
    channels = [n for n, axis in enumerate(axes) if axis in "CS" and shape[n] > 1]
    return axes.index("X"), axes.index("Y"), pages[0] if pages else None, channels


def _tiff(path: Path) -> Header:
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        _require_all_pages(path, file)
        if series.dtype is None or series.dtype.kind not in "uifb":
            raise InputError(f"{path}: voxels of type {series.dtype} are no image. Convert or remove the file.")
        x, y, z, channels = tiff_axes(path, series.axes, series.shape)
        count = math.prod(series.shape[n] for n in channels)
        meaning = file.pages.first.photometric
        if z is None and meaning == tifffile.PHOTOMETRIC.PALETTE:
            count = 3
        elif z is not None and meaning not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB):
            raise InputError(
                f"{path}: has pages of {tifffile.PHOTOMETRIC(meaning).name} values. Save them as grey or RGB."
            )
        elif meaning == tifffile.PHOTOMETRIC.MINISWHITE and series.dtype.itemsize > 1:
            raise InputError(f"{path}: has {series.dtype} values of which zero is white. Save them as grey.")
        turn = orientation_of_tiff(file)
        size = upright_size((series.shape[x], series.shape[y]), turn)
        if z is None:
            return Header(size, count, str(series.dtype))
        spacing = _imagej_spacing(file) if series.axes[z] == "Z" else None
        spacing = spacing and [*upright_size(spacing, turn)]
        return Header((*size, series.shape[z]), count, str(series.dtype), spacing)


def _require_all_pages(path: Path, file: tifffile.TiffFile) -> None:
    """Refuse a file whose last page says that another one follows; tifffile only logs that."""
    last, handle, form = file.pages[-1], file.filehandle, file.tiff
    handle.seek(last.offset)
    (tags,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    handle.seek(last.offset + form.tagnosize + tags * form.tagsize)
    (after,) = struct.unpack(form.offsetformat, handle.read(form.offsetsize))
    if after >= handle.size:
        raise InputError(f"{path}: is cut short, pages are missing. Copy it again, or remove it.")


def _imagej_spacing(file: tifffile.TiffFile) -> list[float] | None:
    """Millimetres along x, y, z of a stack that ImageJ wrote with its unit; None without."""
    said = file.imagej_metadata or {}
    unit, resolution = _MILLIMETRES.get(str(said.get("unit"))), file.pages.first.resolution
    if unit is None or not said.get("spacing") or min(resolution) <= 0:
        return None
    return [unit / resolution[0], unit / resolution[1], unit * float(said["spacing"])]


def array_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and types of the arrays in an .npz file, from their headers.

    Raises:
        InputError: when the file cannot be read.
    """
    found = {}
    with readable(path, "header cannot be read"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                if not dtype.hasobject and math.prod(shape) * dtype.itemsize > info.file_size - member.tell():
                    raise InputError(f"{path}: {name} says more values than there are. Repair or remove the file.")
                found[name.removesuffix(".npy")] = (shape, dtype)
    return found
