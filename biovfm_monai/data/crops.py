"""Random crops of images in memory or in a store, each a pure function of its number."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from multiprocessing.dummy import DummyProcess
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Transform
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from biovfm_monai.anisotropy import spacing_of
from biovfm_monai.data.columns import columns_of_items, columns_of_store, cut_degree, least_size, share_of
from biovfm_monai.data.encoding import shares
from biovfm_monai.data.mixture import Labels, Mixture, mixed
from biovfm_monai.data.preprocessing import crop_of_degree, source_of
from biovfm_monai.data.store import Store, StoredImage
from biovfm_monai.errors import InputError, UnreadableError, is_unreadable, reason_of

__all__ = ["RandomCropDataset"]

logger = logging.getLogger(__name__)

_BLOCK = 1024
_ATTEMPTS, _SOME_UNREADABLE, _MOST_UNREADABLE = 100, 10, 0.01
_NEARLY, _SHARE, _STRETCH = 1.5, 0.3, 1.25


class RandomCropDataset(Dataset[dict[str, Any]]):
    """An endless stream of crops: crop number n depends on the seed and on n only.

    Every image gives one crop per pass, in an order of the pass's own, unless sources are weighed or images are nearly
    the same (`Mixture`). With a crop_size of three numbers images of all degrees of anisotropy are mixed, as in PUMIT
    (https://github.com/function2-llx/PUMIT): a batch has one degree and one shape, thick slices are cut to fewer, and
    2D images, films, and volumes with fewer slices than the crop to one.

    An image that cannot be read in the middle of a run is reported by name, and another one takes its place, drawn from
    the mixture, the same one in every run; those that are read in the beginning must all be good.

    Args:
        data: datalist items, or a `Store`, of which only what a crop shows is read.
        transform: deterministic, item to sample with "image" C x depth x height x width, uint8 or floats in [0, 1]; its
            results stay in memory. Of a store it is given crops, those of eight bits as uint8.
        crop_size: (height, width), cut from one slice, or (depth, height, width) of isotropic volumes.
        seed: of the order and of the crops' places.
        cache_rate: share of the images that is kept in memory; the others are read again for every crop.
        num_workers: threads that fill the memory.
        fraction: share of each source's subjects that is used, as in `subset`.
        zoom: least and largest number of the image's voxels per voxel of a crop, between which one is drawn for each
            crop, evenly by its logarithm; at most what the image holds. Thick slices are zoomed in their plane, and as
            far as their degree stays the same; nearly isotropic volumes along all axes, in three of ten crops up to
            1.25 times as much or as little across slices, as in PUMIT.
        batch_size: crops that share a degree of anisotropy, when crop_size has three numbers.
        **mixing: temperature, source_weights and modality_weights of `Mixture`.

    Raises:
        InputError: when there is no item, an image is too small, or a size, weight or share means nothing; later, when
            more than one in a hundred images, and more than ten or half of a few, cannot be read any more, as each
            worker counts them. Images of a store that are too small are left out, with a warning.
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
        zoom: tuple[float, float] = (1.0, 1.0),
        batch_size: int = 1,
        **mixing: Any,
    ) -> None:
        crop_of_degree(crop_size, 0)
        if not len(data):
            raise InputError("the datalist is empty. Give a --dataset_dir that holds images.")
        if len(zoom) != 2 or not 0 < zoom[0] <= zoom[1]:
            raise InputError(f"zoom {zoom} must be two numbers above 0, the lower one first. Give such as [0.75,2].")
        self.crop_size, self.zoom, self.seed = tuple(crop_size), tuple(zoom), seed
        self.volumes = len(crop_size) == 3
        self.images: Any
        self._transform: Callable[[Any], Any] | None
        if isinstance(data, Store):
            self.images, self._transform = data, transform
            columns = columns_of_store(data, self.crop_size, self.zoom[0])
            if fraction != 1:
                columns.usable[:] &= share_of(data, fraction, seed)
        else:
            items = data if fraction == 1 else list(compress(data, share_of(data, fraction, seed)))
            # MONAI takes a Compose inside another for random, and would keep nothing of it.
            checked = Compose([transform, _LargeEnough(self.crop_size, self.zoom[0])]).flatten()
            self.images, self._transform = _cached(items, checked, cache_rate, num_workers), None
            volumes = self.images if self.volumes else ()
            columns = columns_of_items(items, volumes, self.crop_size, self.zoom[0])
        self._degrees = columns.degrees
        # All of 20 million rows need no list of them.
        self._rows = None if columns.usable.all() else np.flatnonzero(columns.usable)
        of = slice(None) if self._rows is None else self._rows
        source, modality = (Labels(labels.codes[of], labels.names) for labels in (columns.source, columns.modality))
        bucket = Labels(columns.degrees[of], [str(degree) for degree in range(6)]) if self.volumes else None
        size = batch_size if self.volumes else 1
        self._mixture = Mixture(source, modality, bucket, columns.alike[of], size, seed, **mixing)
        self._drawn = (-1, np.empty(0, dtype=np.int64))
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        """Images, that is crops per pass; numbers beyond it go on with the next pass."""
        return len(self.images if self._rows is None else self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Crop of the given number: {"image": C x crop, "modality": name, "key": of its random numbers (`uniform`)}.

        "replaced" tells whether it is of another image, since its own cannot be read. Of volumes there is their degree
        of "anisotropy", too. Images of eight bits come as float16, in [0, 1].
        """
        return _floating(self._sample(number))

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The crops of a batch, as a DataLoader asks for them: uint8, which views scale, where all have eight bits."""
        samples = [self._sample(number) for number in numbers]
        if all(sample["image"].dtype == torch.uint8 for sample in samples):
            return samples
        return [_floating(sample) for sample in samples]

    def _sample(self, number: int) -> dict[str, Any]:
        for attempt in range(_ATTEMPTS):
            # Also one that is known to be unreadable, since other processes know others.
            row = self._row(number, attempt)
            try:
                return self._sample_of(row, number) | {"replaced": attempt > 0}
            except Exception as error:  # noqa: BLE001 - MONAI wraps what a transform raises
                self._set_aside(row, error)
        raise InputError(f"{_ATTEMPTS} images in a row cannot be read, see above. Repair or remove them.")

    def _set_aside(self, row: int, error: Exception) -> None:
        """Report an image that cannot be read; raise what is no such error, or when there are too many."""
        most = max(_MOST_UNREADABLE * len(self), min(_SOME_UNREADABLE, len(self) // 2))
        if most < 1 or not is_unreadable(error):
            raise error
        if row not in self._unreadable:
            self._unreadable.add(row)
            logger.warning("another image takes the place of one that cannot be read: %s", reason_of(error))
        if len(self._unreadable) > most:
            raise InputError(
                f"{len(self._unreadable)} of {len(self)} images cannot be read any more, the last one: "
                f"{reason_of(error)} See to the disk, or pack the images anew."
            ) from error

    def _sample_of(self, row: int, number: int) -> dict[str, Any]:
        sample = self.images.picture(row) if isinstance(self.images, Store) else self.images[row]
        degree = int(self._degrees[row])
        crop = self._cut(sample["image"], degree, np.random.default_rng((self.seed, number, 1)))
        if self._transform is not None:  # of a store, whose images are prepared
            crop = self._transform({**sample, "image": crop})["image"]
        result = {
            "image": crop,
            "modality": sample["modality"],
            "key": int(mixed(self.seed, 5, number) >> np.uint64(1)),
        }
        return result | {"anisotropy": degree} if self.volumes else result

    def _cut(self, image: Any, degree: int, generator: np.random.Generator) -> Tensor:
        """Cut a box of a drawn size at a drawn place, and resample it to the crop's size."""
        target, size = np.array(crop_of_degree(self.crop_size, degree)), np.array(image.shape[1:])
        box = target if self.zoom == (1, 1) else self._drawn_box(target, size, degree, _thickness(image), generator)
        start = generator.integers(size - box + 1)
        d, h, w = (slice(int(s), int(s) + int(n)) for s, n in zip(start, box, strict=True))
        part = (slice(None), d, h, w)
        crop = image.compact(part) if isinstance(image, StoredImage) else image[part]
        crop = crop.as_tensor() if isinstance(crop, MetaTensor) else crop
        return crop if (box == target).all() else _resampled(shares(crop), target)

    def _drawn_box(
        self,
        target: NDArray[np.int64],
        size: NDArray[np.int64],
        degree: int,
        thickness: float,
        generator: np.random.Generator,
    ) -> NDArray[np.int64]:
        scaled = slice(None) if target[0] > 1 and degree == 0 else slice(1, None)
        low, high = self.zoom
        if 0 < degree < 5:
            bounds = thickness / 2 ** (degree + 1) * 1.001, thickness / 2**degree
            low, high = np.clip(self.zoom, *bounds)
        high = min(high, float((size / target)[scaled].min()))
        drawn = np.exp(generator.uniform(np.log(min(low, high)), np.log(high)))
        zoom = np.ones(3)
        zoom[scaled] = drawn
        if degree == 0 and thickness <= _NEARLY and generator.random() < _SHARE:
            zoom[0] *= np.exp(generator.uniform(-1, 1) * np.log(_STRETCH))
        return np.clip(np.rint(target * zoom), 1, size).astype(np.int64)

    def _row(self, number: int, attempt: int) -> int:
        if attempt:
            row = int(self._mixture.rows([number], attempt)[0])
            return row if self._rows is None else int(self._rows[row])
        block, place = divmod(number, _BLOCK)
        if self._drawn[0] != block:
            rows = self._mixture.rows(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
            self._drawn = (block, rows if self._rows is None else self._rows[rows])
        return int(self._drawn[1][place])


def _floating(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "image": shares(sample["image"])}


def _cached(
    data: Sequence[dict[str, Any]], transform: Callable[[Any], Any], cache_rate: float, num_workers: int
) -> CacheDataset:
    try:
        return CacheDataset(
            data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=False,
            as_contiguous=False,  # grey images shown as colour are in memory once
        )  # fmt: skip
    except Exception as error:
        if not is_unreadable(error):
            raise
        remedy = "`biovfm pack` lists all such files, and leaves them out of its store, which can be trained on, too."
        raise UnreadableError(f"{reason_of(error)} {remedy}") from error
    finally:
        _wait_for_readers()


def _wait_for_readers() -> None:
    """After a bad file MONAI leaves its other threads at work, and torch aborts a process that ends meanwhile."""
    for thread in threading.enumerate():
        if isinstance(thread, DummyProcess):
            thread.join(timeout=60)


def _resampled(crop: Tensor, target: NDArray[np.int64]) -> Tensor:
    smaller = all(n <= m for n, m in zip(target.tolist(), crop.shape[1:], strict=True))
    way: dict[str, Any] = {"mode": "area"} if smaller else {"mode": "trilinear", "align_corners": False}
    return F.interpolate(crop[None].float(), target.tolist(), **way)[0].to(crop.dtype)


def _thickness(image: Any) -> float:
    """How many times as far apart slices are as pixels."""
    spacing = image.spacing if isinstance(image, StoredImage) else spacing_of(image)
    depth, *plane = spacing or (1.0, 1.0, 1.0)
    return float(depth / min(plane))


class _LargeEnough(Transform):
    """Refuses a sample that no crop can be cut from."""

    def __init__(self, crop_size: Sequence[int], zoom: float) -> None:
        self.crop_size, self.zoom = crop_size, zoom

    def __call__(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        image = sample["image"]
        least = least_size(self.crop_size, cut_degree(image, self.crop_size, self.zoom), self.zoom).tolist()
        if any(n < needed for n, needed in zip(image.shape[1:], least, strict=True)):
            size, needed = (" x ".join(str(n) for n in of) for of in (image.shape[1:], least))
            raise InputError(
                f"{source_of(image)}: size {size} is smaller than the crop {needed}. Remove the file, or give a "
                "smaller --crop_size."
            )
        return sample
