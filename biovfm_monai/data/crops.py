"""Random crops of cached images, each a pure function of its number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.dummy import DummyProcess
from typing import Any

import numpy as np
from monai.data import CacheDataset, MetaTensor
from torch.utils.data import Dataset

from biovfm_monai.data.mixture import Labels, Mixture, subset
from biovfm_monai.data.preprocessing import as_volume_size
from biovfm_monai.errors import InputError

__all__ = ["RandomCropDataset"]


_BLOCK = 1024


def _wait_for_readers() -> None:
    """After a bad file MONAI leaves its other threads at work, and torch aborts a process that ends meanwhile."""
    for thread in threading.enumerate():
        if isinstance(thread, DummyProcess):
            thread.join(timeout=60)


class RandomCropDataset(Dataset[dict[str, Any]]):
    """An endless stream of crops: crop number n depends on the seed and on n only.

    Every image gives one crop per pass, in an order of the pass's own, unless sources are weighed (`Mixture`).

    Args:
        data: datalist items.
        transform: deterministic, item to sample with "image" C x depth x height x width; its results stay in memory.
        crop_size: (height, width), cut from one slice, or (depth, height, width).
        seed: of the order and of the crops' places.
        cache_rate: share of the images that is kept in memory; the others are read again for every crop.
        num_workers: threads that fill the memory.
        fraction: share of each source's images that is used, as in `subset`.
        **mixing: temperature, source_weights and modality_weights of `Mixture`.

    Raises:
        InputError: when there is no item, or a weight or share means nothing.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        transform: Callable[[Any], Any],
        crop_size: Sequence[int],
        seed: int = 0,
        cache_rate: float = 1.0,
        num_workers: int = 2,
        fraction: float = 1.0,
        **mixing: Any,
    ) -> None:
        if not data:
            raise InputError("the datalist is empty. Give a --dataset_dir that holds images.")
        if fraction != 1:
            kept = subset(_column(data, "source"), fraction, seed)
            data = [item for item, keep in zip(data, kept, strict=True) if keep]
        self._mixture = Mixture(_column(data, "source"), _column(data, "modality"), seed=seed, **mixing)
        self._drawn = (-1, np.empty(0, dtype=np.int64))
        try:
            self.images = CacheDataset(
                data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=False,
                as_contiguous=False,  # grey images shown as colour are in memory once
            )  # fmt: skip
        finally:
            _wait_for_readers()
        self.crop_size = as_volume_size(crop_size)
        self.seed = seed

    def __len__(self) -> int:
        """Images, that is crops per pass; numbers beyond it go on with the next pass."""
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Crop of the given number: {"image": C x crop, "modality": name}."""
        sample = self.images[self._image(number)]
        image = sample["image"]
        room = [n - c + 1 for n, c in zip(image.shape[1:], self.crop_size, strict=True)]
        start = np.random.default_rng((self.seed, number, 1)).integers(room)
        d, h, w = (slice(int(s), int(s) + c) for s, c in zip(start, self.crop_size, strict=True))
        image = image.as_tensor() if isinstance(image, MetaTensor) else image
        return {"image": image[:, d, h, w], "modality": sample["modality"]}

    def _image(self, number: int) -> int:
        block, place = divmod(number, _BLOCK)
        if self._drawn[0] != block:
            self._drawn = (block, self._mixture.rows(np.arange(block * _BLOCK, (block + 1) * _BLOCK)))
        return int(self._drawn[1][place])


def _column(data: Sequence[Mapping[str, Any]], key: str) -> Labels:
    return Labels.of([str(item.get(key, "")) for item in data])
