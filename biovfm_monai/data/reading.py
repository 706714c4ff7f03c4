"""A file to a tensor with its geometry, through MONAI's readers (https://monai.readthedocs.io/en/stable/data.html#image-reader)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import itk
import numpy as np
import pydicom
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor, NibabelReader, PILReader
from monai.data.image_reader import ImageReader
from monai.transforms import EnsureChannelFirst, MapTransform
from PIL import Image

from biovfm_monai.data.dicom import image_headers, is_dicom, is_stack, read_header, sorted_slices
from biovfm_monai.data.dicom_values import displayed, is_radiograph, measured, uptake_factor
from biovfm_monai.errors import InputError

__all__ = ["NIFTI", "PHOTO", "ReadImaged", "read_image", "suffix"]

NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
_KEPT = ("affine", "original_affine", "space", "spatial_shape", "original_channel_dim", "units")
PHOTO = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def suffix(path: Path) -> str:
    """The ending of a file's name in lower case, ".nii.gz" as one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def _plain_colours(image: Image.Image) -> Image.Image:
    """Colours in place of palette numbers, no exotic colour spaces, no transparency that hides nothing."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        return image.convert("RGB")
    return image.convert("L") if image.mode in ("1", "LA") else image


def _reader(path: Path) -> ImageReader:
    ending = suffix(path)
    if ending in NIFTI:
        return NibabelReader()
    if ending in PHOTO:
        return PILReader(converter=_plain_colours)
    return ITKReader()


def _refuse_pages(path: Path) -> None:
    with Image.open(path) as image:
        pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise InputError(f"{path}: holds {pages} pages, of which only the first would be read. Save each as a file.")


def _slices(folder: Path) -> dict[Path, pydicom.Dataset]:
    headers = image_headers(path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path))
    if not headers:
        raise InputError(f"{folder}: a folder without DICOM images is no image. Correct the datalist.")
    return headers


def _read_series(headers: Mapping[Path, pydicom.Dataset]) -> Any:
    """The slices of a volume, in the order of their places; MONAI's reader would leave some series' slices out."""
    if not is_stack(headers):
        folder = next(iter(headers)).parent
        raise InputError(f"{folder}: its DICOM files are not the slices of one volume. Name the files in the datalist.")
    return itk.imread([str(path) for path in sorted_slices(headers)[0]])


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


def read_image(path: str | Path | Sequence[str | Path]) -> MetaTensor:
    """Read an image file, a folder that holds one DICOM series, or the files of one in any order.

    Returns:
        C x X x Y (x Z): uint8 stays uint8, all else becomes float32; the affine is in RAS millimetres. Radiographs
        in DICOM have their values for display, PET the standardised uptake where the header allows, and then
        "units" of "SUV".

    Raises:
        InputError: when the file is missing, cannot be decoded, has several pages, or holds a value that is not finite,
            or the files of a series are not the slices of one volume.
    """
    files = [Path(path)] if isinstance(path, str | Path) else [Path(file) for file in path]
    path = files[0]
    for file in files:
        if not file.exists():
            raise InputError(f"{file}: no such file. Correct the path in the datalist.")
    try:
        headers = _slices(path) if path.is_dir() else {file: read_header(file) for file in files[1:] and files}
        files = [*headers] or files
        reader = _reader(files[0])
        if suffix(path) in PHOTO:
            _refuse_pages(path)
        array, meta = reader.get_data(reader.read(str(files[0])) if len(files) == 1 else _read_series(headers))
        if isinstance(reader, ITKReader):
            array, meta["units"] = _meaning(files[0], np.asarray(array))
    except (MemoryError, InputError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        raise InputError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {reason}). Repair or remove the file."
        ) from error
    array = np.asarray(array)
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(
                f"{path}: holds {(~np.isfinite(array)).sum()} NaN or infinite voxels. Repair or remove it."
            )
    # A header also names the patient.
    meta = {key: meta[key] for key in _KEPT if key in meta} | {"filename_or_obj": str(path)}
    image = MetaTensor.ensure_torch_and_prune_meta(torch.from_numpy(np.ascontiguousarray(array)), meta)
    return EnsureChannelFirst()(image, meta_dict=meta)


class ReadImaged(MapTransform):
    """Replace the path under each key by the image read from it, as `read_image` does."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the files of one datalist item."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = read_image(sample[key])
        return sample
