"""What the order and the kind of random crops depend on, one entry per image of a store or a datalist."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from biovfm_monai.data.mixture import Labels, subset
from biovfm_monai.data.preprocessing import crop_of_degree, degree_of
from biovfm_monai.data.store import Store
from biovfm_monai.errors import InputError

__all__ = ["Columns", "columns_of_items", "columns_of_store", "cut_degree", "least_size", "share_of"]

logger = logging.getLogger(__name__)


class Columns(NamedTuple):
    """What the order of images depends on, one entry per image."""

    source: Labels
    modality: Labels
    alike: NDArray[Any]
    degrees: NDArray[Any]
    usable: NDArray[np.bool_]


def columns_of_store(store: Store, crop_size: Sequence[int], zoom: float) -> Columns:
    """The columns of a store, in which only images that are large enough are usable."""
    depths = np.array([least_size(crop_size, degree, zoom)[0] for degree in range(6)])
    _, least_height, least_width = least_size(crop_size, 5, zoom)
    with ThreadPoolExecutor() as pool:
        labels = pool.map(store.labels, ("source", "modality"))
        sizes = pool.map(store.size, ("depth", "height", "width"))
        (source, modality), (depth, height, width) = labels, sizes
    usable = (height >= least_height) & (width >= least_width)
    degrees = np.full(len(store), 5, dtype=np.int8)
    if len(crop_size) == 3:
        deep = depth >= depths.astype(np.uint16)[store.degree]
        degrees[deep] = store.degree[deep]
        _note_thin(int((usable & ~deep).sum()), len(store))
    size = " x ".join(map(str, crop_size))
    if not usable.any():
        raise InputError(
            f"{store.path}: all {len(usable)} images are smaller than the crop {size}. Give a smaller --crop_size."
        )
    if not usable.all():
        logger.warning(
            "%s: %d of %d images are smaller than the crop %s, and are left out", store.path, (~usable).sum(),
            len(usable), size,
        )  # fmt: skip
    return Columns(source, modality, store.alike, degrees, usable)


def columns_of_items(
    items: Sequence[dict[str, Any]], volumes: Sequence[dict[str, Any]], crop_size: Sequence[int], zoom: float
) -> Columns:
    """The columns of a datalist; of images that are cut as volumes the degrees of anisotropy, too."""
    degrees = np.full(len(items), 5, dtype=np.int8)
    if len(volumes):
        degrees[:] = [cut_degree(sample["image"], crop_size, zoom) for sample in volumes]
        _note_thin(sum(degree_of(sample["image"]) < 5 for sample in volumes) - int((degrees < 5).sum()), len(items))
    alike = np.array([item.get("alike", 1) for item in items], dtype=np.int32)
    everything = np.ones(len(items), dtype=bool)
    return Columns(labels_of(items, "source"), labels_of(items, "modality"), alike, degrees, everything)


def least_size(crop_size: Sequence[int], degree: int, zoom: float) -> NDArray[np.int64]:
    """The smallest depth, height and width of an image that a crop can be cut from."""
    target = np.array(crop_of_degree(crop_size, degree))
    scaled = np.maximum(np.rint(target * zoom), 1).astype(np.int64)
    if degree > 0 or target[0] == 1:
        scaled[0] = target[0]
    return scaled


def cut_degree(image: Tensor, crop_size: Sequence[int], zoom: float) -> int:
    """Degree of anisotropy by which an image is cut: 5 where its slices are too few for its own."""
    degree = degree_of(image)
    return degree if image.shape[1] >= least_size(crop_size, degree, zoom)[0] else 5


def _note_thin(count: int, of: int) -> None:
    if count:
        logger.info(
            "%d of %d images have fewer slices than a crop, or no distance between them: single slices are cut",
            count,
            of,
        )


def share_of(data: Sequence[dict[str, Any]], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images of a store or a datalist belong to a share of the subjects of each source, as in `subset`."""
    of = data.labels if isinstance(data, Store) else partial(labels_of, data)
    return subset(of("source"), fraction, seed, of("subject"))


def labels_of(data: Sequence[Mapping[str, Any]], key: str) -> Labels:
    """A field of all items; empty where one has none."""
    return Labels.of([str(item.get(key, "")) for item in data])
