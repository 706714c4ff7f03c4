"""A packed store: prepared images in chunks that decode on their own, many to a file, and one table of them.

The files hold Blosc2 frames (https://www.blosc.org/c-blosc2/format/cframe_format.html), the table is Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from monai.data import MetaTensor
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from biovfm_monai.data.encoding import SHARE, Encoded, checksum_of, decode
from biovfm_monai.data.find import modality_names
from biovfm_monai.data.headers import readable
from biovfm_monai.data.mixture import Labels
from biovfm_monai.errors import InputError
from biovfm_monai.files import version_of

__all__ = [
    "ABOUT", "ALIGNMENT", "INDEX", "Store", "StoredImage", "is_store", "require_store", "shard_name", "table_name",
]  # fmt: skip

INDEX, ABOUT = "index.parquet", "store.json"
ALIGNMENT = 64
"""Bytes that an image's place in its file is a multiple of."""

_HANDLES, _PIECE = 256, 2**18
_NAMES = ("label", "modality", "source", "split", "subject")


@lru_cache(maxsize=_HANDLES)
def _open(path: Path, start: int, _version: tuple[int, ...]) -> blosc2.NDArray:
    return blosc2.open(str(path), mmap_mode="r", offset=start, dparams={"nthreads": 1})


class StoredImage:
    """An image in a store, C x D x H x W; only the chunks that a slice touches are read and decoded."""

    def __init__(self, path: Path, start: int, version: tuple[int, ...]) -> None:
        with readable(path, f"no image at byte {start}"):
            self._array = _open(path, start, version)
            self._meta = self._array.schunk.meta["image"]
        self.shape = torch.Size(self._array.shape)
        self.dtype: np.dtype = self._array.dtype
        self.eight_bit = self.dtype == np.uint8 and (self._meta["scale"], self._meta["offset"]) == (SHARE, 0)
        self.spacing: list[float] = self._meta["spacing"]
        self._path = path

    def __getitem__(self, box: Any) -> Tensor:
        """The values of a box, float32."""
        return decode(self._numbers(box), self._meta["scale"], self._meta["offset"], self._meta["unit"])

    def compact(self, box: Any) -> Tensor:
        """The values of a box: uint8 of what came in eight bits, else float32."""
        return torch.from_numpy(self._numbers(box)) if self.eight_bit else self[box]

    def _numbers(self, box: Any) -> NDArray[Any]:
        with readable(self._path, "an image cannot be decoded"):
            return self._array[box]

    def checksum(self) -> bytes:
        """Of all of it, to compare with the store's index."""
        scale, offset, unit = (self._meta[name] for name in ("scale", "offset", "unit"))
        return checksum_of(Encoded(self._numbers(...), scale, offset, unit))

    def whole(self) -> MetaTensor:
        """All of it, with its spacing."""
        affine = torch.diag(torch.tensor([*self.spacing, 1.0], dtype=torch.float64))
        return MetaTensor(self[...], affine=affine)


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, ready or not."""
    return (folder / ABOUT).is_file()


def require_store(folder: Path) -> None:
    """Refuse a folder that holds no store, or one that is not finished."""
    if not is_store(folder):
        raise InputError(f"{folder}: no store. Write one with `biovfm pack DATALIST --out {folder}`.")
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: the store is not finished. Run the same `biovfm pack` again.")


class Store(Sequence[dict[str, Any]]):
    """The images of one section of a store, as a sequence of samples {"image": StoredImage, "modality": ..., ...}.

    Opening reads columns, not rows, so that a store of 20 million images takes seconds and 100 MB.

    Args:
        path: folder that `pack` wrote.
        section: of the datalist it was packed from.
        modality: of the images, one or several, where not all are wanted.

    Raises:
        InputError: when the folder holds no store, one that is not finished, or no such section or modality.
    """

    def __init__(
        self, path: str | Path, section: str = "training", modality: str | Sequence[str] | None = None
    ) -> None:
        self.path = Path(path).expanduser().resolve()
        require_store(self.path)
        with readable(self.path / ABOUT, "cannot be read"):
            self.about: Mapping[str, Any] = json.loads((self.path / ABOUT).read_text(encoding="utf-8"))
        with readable(self.path / INDEX, "no index that can be read"):
            schema = pq.read_schema(self.path / INDEX)
            self._ends = np.cumsum(json.loads(schema.metadata[b"images"]))
            # Of the index, not of each shard: on shared file systems asking takes long.
            self._version = version_of(self.path / INDEX)
        chosen = self._where("split", section)
        if asked := modality_names(modality):
            chosen &= np.any([self._where("modality", name) for name in asked], axis=0)
        # A store of one section needs no list of its rows.
        self._rows = None if chosen.all() else np.flatnonzero(chosen)
        self._starts = self._column("start", np.uint32)
        self._cached: dict[str, Labels] = {}

    def _where(self, column: str, name: str) -> NDArray[np.bool_]:
        labels = self._labels(column)
        if name not in labels.names:
            raise InputError(f"{self.path}: has no {column} {name!r}, but {', '.join(labels.names)}. Name another.")
        return labels.codes == labels.names.index(name)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: Any) -> Any:
        """One sample; the keys beside "image", "modality" and "prepared" are those of a datalist item."""
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        sample = self.picture(row) | {"anisotropy": int(self.degree[row])}
        for name in ("source", "subject", "label"):
            column = self.labels(name)
            value = column.names[column.codes[row]]
            if value:
                sample[name] = json.loads(value) if name == "label" else value
        return sample

    def picture(self, row: int) -> dict[str, Any]:
        """What a crop needs of one sample: "image", "modality" and "prepared"."""
        row = range(len(self))[row]
        start = int(self._starts[row]) * ALIGNMENT
        shard = int(np.searchsorted(self._ends, row if self._rows is None else self._rows[row], side="right"))
        modality = self.labels("modality")
        name = modality.names[modality.codes[row]]
        image = StoredImage(self.path / shard_name(shard), start, self._version)
        return {"image": image, "modality": name, "prepared": self.prepared(name)}

    def prepared(self, modality: str) -> dict[str, Any]:
        """How images of a modality were prepared: the spacing asked for, and the options of their preset."""
        return {"spacing": self.about["spacing"], "options": self.about["presets"].get(modality, {})}

    def labels(self, name: str) -> Labels:
        """A column of names: "modality", "source", "subject" or "label" (as JSON), "" where there is none."""
        if name not in self._cached:
            labels = self._labels(name)
            self._cached[name] = labels if self._rows is None else Labels(labels.codes[self._rows], labels.names)
        return self._cached[name]

    @cached_property
    def degree(self) -> NDArray[Any]:
        """Degree of anisotropy of each image."""
        return self._column("anisotropy", np.int8)

    @cached_property
    def alike(self) -> NDArray[Any]:
        """How many images each one is nearly the same as, itself among them; counted to 65,535."""
        return self._column("alike", np.uint16)

    def size(self, axis: str) -> NDArray[Any]:
        """Voxels of each image along an axis, "depth", "height" or "width"; counted to 65,535."""
        return self._column(axis, np.uint16)

    def _column(self, name: str, dtype: DTypeLike) -> NDArray[Any]:
        """A column of numbers of this section, read a piece at a time into the smallest type."""
        column, most = np.empty(int(self._ends[-1]), dtype), np.iinfo(dtype).max
        for piece, values in self._pieces(name):
            column[piece] = np.minimum(values.to_numpy(), most)
        return column if self._rows is None else column[self._rows]

    def _labels(self, name: str) -> Labels:
        """A column of names, of all sections."""
        names: dict[str, int] = {}
        codes = np.zeros(int(self._ends[-1]), np.int8)
        for piece, values in self._pieces(name):
            known = values.dictionary.to_pylist()
            indices = values.indices
            if values.null_count:
                known, indices = [*known, ""], indices.fill_null(len(known))
            of = np.array([names.setdefault(one, len(names)) for one in known])
            while len(names) > np.iinfo(codes.dtype).max:
                codes = codes.astype({1: np.int16, 2: np.int32}[codes.itemsize])
            codes[piece] = of[indices.to_numpy()]
        return Labels(codes, [*names])

    def _pieces(self, name: str) -> Iterator[tuple[slice, pa.Array]]:
        first = 0
        with readable(self.path / INDEX, "no index that can be read"):
            names = [name] if name in _NAMES else None
            for batch in pq.ParquetFile(self.path / INDEX, read_dictionary=names).iter_batches(_PIECE, columns=[name]):
                yield slice(first, first + len(batch)), batch.column(0)
                first += len(batch)


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"shard-{number:06}.b2"


def table_name(number: int) -> str:
    """The table of a shard's images, until all are packed and joined into the index."""
    return f"{shard_name(number)}.parquet"
