"""MedMNIST's archives: images, labels and the official split in one .npz file (https://doi.org/10.1038/s41597-022-01721-8)."""

from __future__ import annotations

import math
import os
import threading
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from biovfm_monai.data.headers import Header, array_headers, checked, is_colour, readable
from biovfm_monai.errors import InputError
from biovfm_monai.files import version_of

__all__ = ["describe_archive", "read_part"]

_IN_MEMORY = 2**30
_MOST, _LABELS = 2**22, 2**26

_SPLITS = {"train": "training", "val": "validation", "test": "test"}
_MODALITY = {
    "path": "pathology", "chest": "xray", "derma": "dermoscopy", "oct": "oct", "pneumonia": "xray", "retina": "fundus",
    "breast": "ultrasound", "blood": "microscopy", "tissue": "microscopy", "organ": "ct", "nodule": "ct",
    "adrenal": "ct", "fracture": "ct", "vessel": "mri", "synapse": "microscopy",
}  # fmt: skip


def describe_archive(path: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> list[dict[str, Any]]:
    """One item per image, with its label and split; the modality is that of the dataset's name.

    Args:
        path: of the archive.
        arrays: shapes and types of what is in it.

    Raises:
        InputError: when it is no archive of MedMNIST's form.
    """
    images = {name: of for name in _SPLITS if (of := arrays.get(f"{name}_images"))}
    if not images:
        raise InputError(f"{path}: holds no array train_images, as MedMNIST has it. Save its images as files.")
    name = path.name.lower().partition("mnist")[0]
    modality = next((modality for known, modality in _MODALITY.items() if name.startswith(known)), None)
    items = []
    for split, (shape, dtype) in images.items():
        if len(shape) not in (3, 4) or dtype.kind not in "uif" or 0 in shape[1:]:
            raise InputError(f"{path}: {split}_images of {dtype} {shape} are no images. Save each as a file.")
        if shape[0] > _MOST:
            raise InputError(f"{path}: {split}_images says {shape[0]} images, more than {_MOST}. Split the archive.")
        colour = is_colour(shape[1:])
        size = [int(n) for n in (shape[2:0:-1] if colour else shape[:0:-1])]
        checked(path, Header(tuple(size), shape[-1] if colour else 1, str(dtype)))
        said = arrays.get(f"{split}_labels")
        labels = None if said is None else _labels(path, f"{split}_labels", shape[0], *said)
        for number in range(shape[0]):
            item = {
                "image": f"{path}::{split}_images::{number}", "modality": modality, "shape": size,
                "channels": shape[-1] if colour else 1, "dtype": str(dtype), "anisotropy": 5 if len(size) == 2 else 0,
                "split": _SPLITS[split],
            }  # fmt: skip
            items.append(item if labels is None else item | {"label": labels[number]})
    if not items:
        raise InputError(f"{path}: holds no image. Remove the file.")
    return items


def read_part(path: Path, name: str, number: int) -> np.ndarray:
    """One image of an array in an archive.

    An array of up to 1 GiB is kept in memory until another one is asked for. Of a larger one the images before the one
    that is asked for are unpacked and forgotten, so it has to be gone through in its order: `biovfm pack` does.
    """
    # Processes that share an open file would move each other's place in it.
    return _opened(path, name, (*version_of(path), os.getpid()))[number]


@lru_cache(maxsize=1)
def _opened(path: Path, name: str, _version: tuple[int, ...]) -> Any:
    shape, dtype = array_headers(path)[name]
    if dtype.kind not in "uif":
        raise InputError(f"{path}: {name} of {dtype} {shape} are no images. Correct the name in the datalist.")
    checked(path, Header(shape[1:] or (1,), 1, str(dtype)))
    if math.prod(shape) * dtype.itemsize > _IN_MEMORY:
        return _Unpacked(path, name)
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays[name])


class _Unpacked:
    """The images of an array that is too large to be in memory, unpacked one by one."""

    def __init__(self, path: Path, name: str) -> None:
        self._member = zipfile.ZipFile(path).open(f"{name}.npy")  # noqa: SIM115 - as long as it is in use
        version = np.lib.format.read_magic(self._member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        (self._count, *self._shape), by_column, self._dtype = read(self._member)
        if by_column:
            raise InputError(f"{path}: {name} is too large to be read column by column. Save it in C order.")
        self._first = self._member.tell()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> np.ndarray:
        if number >= self._count:
            raise IndexError(f"index {number} is out of bounds, there are {self._count} images")
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        with self._lock:
            self._member.seek(self._first + number * size)
            return np.frombuffer(self._member.read(size), self._dtype).reshape(self._shape)


def _labels(path: Path, name: str, count: int, shape: tuple[int, ...], dtype: np.dtype) -> list[Any]:
    if shape[:1] != (count,) or math.prod(shape) * max(dtype.itemsize, 1) > _LABELS:
        raise InputError(
            f"{path}: labels cannot be used, {name} of {dtype} {shape} for {count} images. Give one or a few per "
            f"image, {_LABELS >> 20} MiB at most, or leave the array out."
        )
    with readable(path, "labels cannot be read"), np.load(path, allow_pickle=False) as arrays:
        labels = np.asarray(arrays[name]).reshape(count, -1)
    return list(labels[:, 0].tolist() if labels.shape[1] == 1 else labels.tolist())
