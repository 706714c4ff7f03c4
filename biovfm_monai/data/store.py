"""A packed store: prepared images in chunks that decode on their own, many to a file, and one table of them.

Chunks and codecs are those of Blosc2 (https://www.blosc.org/c-blosc2/format/cframe_format.html), the table is Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from monai.data import MetaTensor
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from biovfm_monai.data.headers import readable
from biovfm_monai.data.mixture import Labels
from biovfm_monai.errors import InputError

__all__ = ["ALIGNMENT", "INDEX", "Encoded", "Store", "StoredImage", "decode", "encode", "frame_of", "is_store"]

INDEX, ABOUT = "index.parquet", "store.json"
ALIGNMENT = 64
"""Bytes that an image's place in its file is a multiple of."""

_LEVELS, _PROBE, _ROUNDING = 2**16, 1 << 16, 2e-6
_HANDLES = 256


class Encoded(NamedTuple):
    """An image as numbers for storage: value = number * scale + offset, and within [0, 1] if `unit`."""

    numbers: NDArray[Any]
    scale: float
    offset: float
    unit: bool


def encode(image: NDArray[np.float32], eight_bit: bool) -> Encoded:
    """Whole numbers for values that came of whole numbers, else float16.

    Args:
        image: of any shape, as a preset gives it.
        eight_bit: whether it was stored in eight bits before: then it is again, off by at most half a grey level where
            its size was changed.

    Returns:
        uint8 or int16 that give the values back to 2e-6, where they lie on at most 65,536 even steps in [0, 1]; else
        float16, good to a part in 2,048.
    """
    unit = bool(image.min() >= 0 and image.max() <= 1)
    if unit and eight_bit:
        return Encoded(np.rint(image * 255).astype(np.uint8), 1 / 255, 0.0, True)
    steps = _steps(image) if unit else None
    if steps is None:
        return Encoded(image.astype(np.float16), 1.0, 0.0, unit)
    lowest, step = steps
    # The ends are values that were clipped, which decoding clips again.
    numbers = np.rint((image - lowest) / step)
    numbers[image == 0] = first = np.floor(-lowest / step + 1e-3)
    numbers[image == 1] = last = np.ceil((1 - lowest) / step - 1e-3)
    levels = int(last - first) + 1
    dtype, least = (np.uint8, 0) if levels <= 256 else (np.int16, -(2**15) if levels > 2**15 else 0)
    return Encoded((numbers - first + least).astype(dtype), step, float(lowest + (first - least) * step), True)


def _steps(image: NDArray[np.float32]) -> tuple[float, float] | None:
    """The lowest value inside (0, 1) and the step that all others are whole multiples away from it; None without."""
    inside = image[(image > 0) & (image < 1)].astype(np.float64)
    if not inside.size:
        return 0.0, 1.0
    values = np.unique(inside[:: max(inside.size // _PROBE, 1)])
    if values.size < 2:
        return float(values[0]), 1.0
    lowest, span = float(values[0]), float(values[-1] - values[0])
    gap = _common_divisor(np.unique(np.diff(values).round(7)))
    # A gap is known to a few digits, all of them together to many.
    step = span / max(round(span / gap), 1)
    if 1 / step > _LEVELS - 2:
        return None
    away = (inside - lowest) / step
    return (lowest, step) if np.abs(away - np.rint(away)).max() * step < _ROUNDING else None


def _common_divisor(gaps: NDArray[np.float64]) -> float:
    """The largest number that all gaps are whole multiples of, to rounding (Euclid)."""
    divisor = 0.0
    for gap in gaps[gaps > _ROUNDING]:
        a, b = float(gap), divisor
        while b > 1 / _LEVELS / 4:
            # A remainder just below the divisor is a rounded zero.
            a, b = b, abs(a - b * round(a / b))
        divisor = a
    return divisor or _ROUNDING


def decode(numbers: NDArray[Any], scale: float, offset: float, unit: bool) -> Tensor:
    """The float32 values that `encode` was given."""
    values = torch.from_numpy(numbers).float()
    if scale != 1 or offset != 0:
        values = values.mul_(scale).add_(offset)
    return values.clamp_(0, 1) if unit else values


def frame_of(encoded: Encoded, degree: int, spacing: Sequence[float]) -> bytes:
    """A Blosc2 frame of an image, C x D x H x W, in chunks of about 100,000 voxels that are as cubic as they can be.

    Args:
        encoded: the image.
        degree: of its anisotropy, which makes chunks flat.
        spacing: mm along depth, height and width.
    """
    channels, depth, height, width = encoded.numbers.shape
    side = (64, 64, 128, 128, 256, 256)[degree]
    chunks = (channels, min(depth, 32 >> degree or 1), min(height, side), min(width, side))
    blocks = (channels, -(-chunks[1] // 2), min(chunks[2], max(side // 4, 32)), min(chunks[3], max(side // 4, 32)))
    eight = encoded.numbers.dtype == np.uint8
    array = blosc2.asarray(
        np.ascontiguousarray(encoded.numbers),
        chunks=chunks,
        blocks=blocks,
        cparams={
            "codec": blosc2.Codec.LZ4, "clevel": 5, "nthreads": 1,
            "filters": [blosc2.Filter.BITSHUFFLE if eight else blosc2.Filter.SHUFFLE],
        },
        meta={"image": {**encoded._asdict(), "numbers": None, "spacing": [float(size) for size in spacing]}},
    )  # fmt: skip
    return bytes(array.to_cframe())


@lru_cache(maxsize=_HANDLES)
def _open(path: Path, start: int) -> blosc2.NDArray:
    return blosc2.open(str(path), mmap_mode="r", offset=start, dparams={"nthreads": 1})


class StoredImage:
    """An image in a store, C x D x H x W; only the chunks that a slice touches are read and decoded."""

    def __init__(self, path: Path, start: int) -> None:
        with readable(path, f"no image at byte {start}"):
            self._array = _open(path, start)
            self._meta = self._array.schunk.meta["image"]
        self.shape = torch.Size(self._array.shape)
        self.dtype: np.dtype = self._array.dtype
        self.spacing: list[float] = self._meta["spacing"]
        self._path = path

    def __getitem__(self, box: Any) -> Tensor:
        """The values of a box, float32."""
        with readable(self._path, "an image cannot be decoded"):
            numbers = self._array[box]
        return decode(numbers, self._meta["scale"], self._meta["offset"], self._meta["unit"])

    def whole(self) -> MetaTensor:
        """All of it, with its spacing."""
        affine = torch.diag(torch.tensor([*self.spacing, 1.0], dtype=torch.float64))
        return MetaTensor(self[...], affine=affine)


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, ready or not."""
    return (folder / ABOUT).is_file()


class Store(Sequence[dict[str, Any]]):
    """The images of one section of a store, as a sequence of samples {"image": StoredImage, "modality": ..., ...}.

    Opening reads columns, not rows, so that a store of 20 million images takes seconds and 100 MB.

    Args:
        path: folder that `pack` wrote.
        section: of the datalist it was packed from.

    Raises:
        InputError: when the folder holds no store, one that is not finished, or no such section.
    """

    def __init__(self, path: str | Path, section: str = "training") -> None:
        self.path = Path(path).expanduser().resolve()
        if not is_store(self.path):
            raise InputError(f"{self.path}: no store. Write one with `biovfm pack DATALIST --out {self.path}`.")
        if not (self.path / INDEX).is_file():
            raise InputError(f"{self.path}: the store is not finished. Run the same `biovfm pack` again.")
        with readable(self.path / ABOUT, "cannot be read"):
            self.about: Mapping[str, Any] = json.loads((self.path / ABOUT).read_text(encoding="utf-8"))
        split = self._labels("split")
        if section not in split.names:
            raise InputError(f"{self.path}: has no section {section!r}, but {', '.join(split.names)}. Name another.")
        whole = len(split.names) == 1
        self._rows = slice(None) if whole else np.flatnonzero(split.codes == split.names.index(section))
        self._starts = self._column("start")[self._rows]
        self._shards = self._column("shard")[self._rows]
        self._cached: dict[str, Labels] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: Any) -> Any:
        """One sample; the keys beside "image", "modality" and "prepared" are those of a datalist item."""
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        path = self.path / shard_name(int(self._shards[row]))
        sample: dict[str, Any] = {
            "image": StoredImage(path, int(self._starts[row]) * ALIGNMENT),
            "anisotropy": int(self.degree[row]),
        }
        for name in ("modality", "source", "subject", "label"):
            column = self.labels(name)
            value = column.names[column.codes[row]] if column.names else ""
            if value:
                sample[name] = json.loads(value) if name == "label" else value
        return sample | {"prepared": self.prepared(sample["modality"])}

    def prepared(self, modality: str) -> dict[str, Any]:
        """How images of a modality were prepared: the spacing asked for, and the options of their preset."""
        return {"spacing": self.about["spacing"], "options": self.about["presets"].get(modality, {})}

    def labels(self, name: str) -> Labels:
        """A column of names: "modality", "source", "subject" or "label" (as JSON), "" where there is none."""
        if name not in self._cached:
            labels = self._labels(name)
            self._cached[name] = Labels(labels.codes[self._rows], labels.names)
        return self._cached[name]

    @cached_property
    def degree(self) -> NDArray[np.int8]:
        """Degree of anisotropy of each image."""
        return np.asarray(self._column("anisotropy")[self._rows], dtype=np.int8)

    @cached_property
    def alike(self) -> NDArray[np.int32]:
        """How many images each one is nearly the same as, itself among them."""
        return np.asarray(self._column("alike")[self._rows], dtype=np.int32)

    def at_least(self, size: ArrayLike) -> NDArray[np.bool_]:
        """Which images have at least this depth, height and width."""
        fits = []
        with readable(self.path / INDEX, "no index that can be read"):
            for batch in pq.ParquetFile(self.path / INDEX).iter_batches(2**18, columns=["shape"]):
                shapes = batch.column(0).values.to_numpy().reshape(-1, 4)
                fits.append((shapes[:, 1:] >= np.asarray(size)).all(axis=1))
        return np.asarray(np.concatenate(fits)[self._rows])

    def _column(self, name: str) -> NDArray[Any]:
        with readable(self.path / INDEX, "no index that can be read"):
            return np.asarray(pq.read_table(self.path / INDEX, columns=[name]).column(0).to_numpy())

    def _labels(self, name: str) -> Labels:
        with readable(self.path / INDEX, "no index that can be read"):
            table = pq.read_table(self.path / INDEX, columns=[name], read_dictionary=[name]).unify_dictionaries()
        column = table.column(0)
        if column.null_count:
            column = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
        chunks = column.chunks
        names = chunks[0].dictionary.to_pylist() if chunks else []
        kind = np.int8 if len(names) < 128 else np.int32
        codes = [np.asarray(chunk.indices.to_numpy(zero_copy_only=False), dtype=kind) for chunk in chunks]
        return Labels(np.concatenate(codes) if codes else np.empty(0, kind), names)


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"shard-{number:06}.b2"
