"""A file to a tensor with its geometry, through MONAI's readers (https://monai.readthedocs.io/en/stable/data.html#image-reader)."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pydicom
import tifffile
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor, NibabelReader, PILReader
from monai.transforms import EnsureChannelFirst, MapTransform
from PIL import Image

from biovfm_monai.data.dicom import image_headers, is_dicom, is_film, is_stack, read_header, sorted_slices
from biovfm_monai.data.dicom_values import displayed, is_radiograph, measured, uptake_factor
from biovfm_monai.data.headers import (
    APART,
    ARRAYS,
    NIFTI,
    PHOTO,
    TIFF,
    VOLUME,
    header_of,
    is_colour,
    nifti_unit,
    readable,
    suffix,
    tiff_axes,
)
from biovfm_monai.data.medmnist import read_part
from biovfm_monai.data.slides import is_slide, read_tile
from biovfm_monai.data.store import StoredImage
from biovfm_monai.data.upright import orientation_of_tiff, upright, upright_array
from biovfm_monai.errors import InputError, UnreadableError

__all__ = ["ReadImaged", "part_of", "read_image"]

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_KEPT = ("affine", "original_affine", "space", "spatial_shape", "original_channel_dim", "units")


def _plain_colours(image: Image.Image) -> Image.Image:
    """Colours in place of palette numbers, no exotic colour spaces, no transparency that hides nothing."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        return image.convert("RGB")
    return image.convert("L") if image.mode in ("1", "LA") else image


def _listed(path: Path) -> bool:
    """Whether a survey would take a file in a folder for a slice."""
    return not path.name.startswith(".") and path.is_file() and is_dicom(path)


def _slices(folder: Path) -> dict[Path, pydicom.Dataset]:
    headers = image_headers(path for path in sorted(folder.iterdir()) if _listed(path))
    if not headers:
        raise InputError(f"{folder}: a folder without DICOM images is no image. Correct the datalist.")
    return headers


def _read_series(headers: Mapping[Path, pydicom.Dataset]) -> tuple[np.ndarray, dict[str, Any]]:
    """The slices of a volume, in the order of their places; MONAI's reader would leave some series' slices out."""
    if not is_stack(headers):
        folder = next(iter(headers)).parent
        raise InputError(f"{folder}: its DICOM files are not the slices of one volume. Name the files in the datalist.")
    stack = sorted_slices(headers)
    array, meta = ITKReader().get_data(itk.imread([str(path) for path in stack.paths]))
    if stack.shift.any():
        # ITK's grids have right angles.
        affine = np.array(meta["affine"], dtype=float)
        across = affine[:3, 2] / np.linalg.norm(affine[:3, 2]) * stack.distance
        affine[:3, 2] = across + _LPS[:3, :3] @ stack.shift
        meta["affine"] = affine
    return array, meta


def _meaning(file: Path, values: np.ndarray) -> tuple[np.ndarray, str]:
    """Values for display of a radiograph, uptake of a PET image whose header tells it; and the unit, "" if unknown."""
    if not is_dicom(file):
        return values, ""
    header = pydicom.dcmread(file, stop_before_pixels=True)
    values = measured(values, header)
    if is_radiograph(header):
        return displayed(values, header), ""
    factor = uptake_factor(header) if header.get("Modality") == "PT" else None
    return (values, "") if factor is None else (values.astype(np.float32) * factor, "SUV")


def part_of(path: str | Path) -> tuple[Path, str | None]:
    """A file and which of its images is meant, where a name such as "cine.nii.gz::3" says it.

    Archives of arrays need a name and a number, as in "bloodmnist.npz::train_images::17".
    """
    pieces = str(path).split("::")
    for count in range(len(pieces), 0, -1):
        file = Path("::".join(pieces[:count]))
        if file.exists():
            return file, "::".join(pieces[count:]) or None
    return Path(pieces[0]), "::".join(pieces[1:]) or None


def _of_archive(path: Path, part: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    """One image out of an array of images, rows first as in MedMNIST: channels last, or slices first."""
    name, _, number = (part or "").partition("::")
    if not number.isdecimal():
        raise InputError(f"{path}: holds many images. Name one as {path.name}::train_images::0.")
    image = read_part(path, name, int(number))
    return image.T, {"affine": _LPS, "original_channel_dim": 0 if is_colour(image.shape) else "no_channel"}


def _of_nifti(path: Path, part: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    reader = NibabelReader()
    if suffix(path) == ".nii.gz":
        with gzip.open(path) as file:  # nibabel does not look at the checksum
            while file.read(2**20):
                pass
    image = reader.read(str(path))
    if part is not None:
        if not part.isdecimal() or image.ndim < 4 or int(part) >= image.shape[3]:
            raise InputError(f"{path}: has no volume {part!r} in its size {image.shape}. Correct the datalist.")
        image = nib.squeeze_image(image.slicer[..., int(part) : int(part) + 1])
    array, meta = reader.get_data(image)
    meta["affine"] = np.diag([*[nifti_unit(image.header)] * 3, 1.0]) @ np.asarray(meta["affine"], dtype=float)
    return array, meta


def _of_tiff(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """All pages of a TIFF file, as the slices of one volume; what Pillow does not know is read the same way."""
    header = header_of(path)
    array = tifffile.imread(path, key=None, series=0)
    with tifffile.TiffFile(path) as file:
        x, y, z, channels = tiff_axes(path, file.series[0].axes, file.series[0].shape)
        turn = orientation_of_tiff(file)
    rest = [n for n in range(array.ndim) if n not in (x, y, z, *channels)]
    array = array.transpose(*rest, *channels, x, y, *([] if z is None else [z]))
    array = upright_array(array.reshape(-1, *array.shape[-2 if z is None else -3 :]), turn, 1, 2)
    spacing = header.spacing or [1.0, 1.0, APART]
    return array, {"affine": _LPS @ np.diag([*spacing, 1.0]), "original_channel_dim": 0}


def _require_all_rows(path: Path) -> None:
    """Refuse a PNG whose pixels end before its last row; Pillow shows black there."""
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG") or content[28]:  # interlaced: rows of seven sizes
        return
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    packed, at = [], 8
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            packed.append(content[at + 8 : at + 8 + length])
        at += 12 + length
    row = 1 + -(-width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8)
    if len(zlib.decompressobj().decompress(b"".join(packed), row * height)) < row * height:
        raise InputError(
            f"{path}: cannot be read as an image, since it ends before its last row. Repair or remove the file."
        )


def _of_photo(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    if suffix(path) in TIFF:
        header = header_of(path)
        # Pillow would make eight bits of sixteen-bit colours.
        known = header.dtype == "uint8" or (header.channels == 1 and header.dtype in ("uint16", "int16", "float32"))
        known = known and len(header.shape) == 2
        try:
            with Image.open(path):
                pass
        except Image.UnidentifiedImageError:
            known = False
        if not known:
            return _of_tiff(path)
    _require_all_rows(path)
    # By its name Pillow would map a file into memory, and scramble some TIFFs that are to be turned.
    with path.open("rb") as file, Image.open(file) as image:
        return PILReader().get_data(_plain_colours(upright(image)))


def _of_itk(files: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
    """What ITK reads: NRRD, MetaImage, and DICOM in a file, a folder, or files that are the slices of a volume."""
    path = files[0]
    headers = _slices(path) if path.is_dir() else {file: read_header(file) for file in files if is_dicom(file)}
    files = [*headers] or files
    reader = ITKReader()
    array, meta = reader.get_data(reader.read(str(files[0]))) if len(files) == 1 else _read_series(headers)
    array, meta["units"] = _meaning(files[0], np.asarray(array))
    if len(files) == 1 and is_dicom(files[0]) and is_film(read_header(files[0])):
        affine = np.array(meta["affine"], dtype=float)
        affine[:3, 2] *= APART / np.linalg.norm(affine[:3, 2])
        meta["affine"] = affine
    return array, meta


def _read(files: Sequence[Path], part: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    """An array and what is known of it: "affine" and, in MONAI's words, "original_channel_dim"."""
    if files[0].is_dir():
        return _of_itk(files)
    ending = suffix(files[0])
    if ending in ARRAYS:
        return _of_archive(files[0], part)
    if is_slide(files[0]):
        return read_tile(files[0], part).transpose(0, 2, 1), {"affine": _LPS, "original_channel_dim": 0}
    if ending in (*NIFTI, *VOLUME, *TIFF, *PHOTO):
        header_of(files[0])
    if ending in NIFTI:
        return _of_nifti(files[0], part)
    return _of_photo(files[0]) if ending in (*TIFF, *PHOTO) else _of_itk(files)


def read_image(path: str | Path | Sequence[str | Path]) -> MetaTensor:
    """Read an image file, a folder that holds one DICOM series, or the files of one in any order.

    Args:
        path: of the file or folder, followed by "::" and a number where it holds several images (`part_of`); or those
            of a volume's slices.

    Returns:
        C x X x Y (x Z): uint8 stays uint8, all else becomes float32; the affine is in RAS millimetres, with slices
        `APART` of films and of pages whose distance is not known. Radiographs in DICOM have their values for display,
        PET the standardised uptake where the header allows, and then "units" of "SUV".

    Raises:
        InputError: when the file is missing, cannot be decoded, or holds a value that is not finite, or the files of a
            series are not the slices of one volume.
    """
    file, part = part_of(path) if isinstance(path, str | Path) else (Path(path[0]), None)
    files = [file] if isinstance(path, str | Path) else [Path(one) for one in path]
    for one in files:
        if not (one.is_file() or one.is_dir()):
            raise InputError(f"{one}: no such file. Correct the path in the datalist.")
    with readable(file, "cannot be read as an image"):
        array, meta = _read(files, part)
    array = np.asarray(array)
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(
                f"{file}: holds {(~np.isfinite(array)).sum()} NaN or infinite voxels. Repair or remove it."
            )
    affine = np.asarray(meta.get("affine", np.eye(4)), dtype=float)
    if not np.isfinite(affine).all() or np.linalg.det(affine) == 0:
        raise InputError(f"{file}: its header places the voxels nowhere. Correct it, or remove the file.")
    # A header also names the patient.
    meta = {key: meta[key] for key in _KEPT if key in meta} | {"filename_or_obj": str(path if part else file)}
    image = MetaTensor.ensure_torch_and_prune_meta(torch.from_numpy(np.ascontiguousarray(array)), meta)
    return EnsureChannelFirst()(image, meta_dict=meta)


class ReadImaged(MapTransform):
    """Replace the path under each key by the image read from it (`read_image`), and one in a store by all of it."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the files of one datalist item."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            if isinstance(sample[key], StoredImage):
                sample[key] = sample[key].whole()
            elif not isinstance(sample[key], torch.Tensor):
                try:
                    sample[key] = read_image(sample[key])
                except InputError as error:
                    # Other steps refuse what the user asks for, not a file.
                    raise UnreadableError(str(error)) from error
        return sample
