"""Images that are nearly the same, by their perceptual hashes (https://www.phash.org/docs/pubs/thesis_zauner.pdf).

Of n such images each weighs (2n - 1) / n², as in PUMIT, so that together they weigh a little less than two.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["count_alike", "perceptual_hash", "weight_of"]

_DISTANCE = 3
_ONES = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)
_SHIFTS = np.arange(0, 64, 16, dtype=np.uint64)
_BANDS = [np.uint64((1 << high) - (1 << low)) for low, high in pairwise((0, 13, 26, 39, 52, 64))]
_KEPT = [one | other for one, other in combinations(_BANDS, 2)]


def perceptual_hash(picture: NDArray[np.uint8]) -> int:
    """64 bits that hardly change when an image is scaled, compressed or made brighter.

    Args:
        picture: H x W x 3.
    """
    return int(str(imagehash.phash(Image.fromarray(picture))), 16)


def weight_of(alike: NDArray[Any]) -> NDArray[np.float64]:
    """The weight of images of which there are so many alike."""
    count = alike.astype(np.float64)
    return (2 * count - 1) / count**2


def count_alike(hashes: NDArray[np.uint64], others: NDArray[np.uint64] | None = None) -> NDArray[np.int32]:
    """How many hashes differ from each one in at most three bits.

    Args:
        hashes: of images.
        others: among which to count; by default the hashes themselves, each of which counts as its own.
    """
    if others is None:
        others = hashes
    # Black images, of which there may be very many, all have one hash.
    different, which = np.unique(hashes, return_inverse=True)
    known, times = np.unique(others, return_counts=True)
    counts = np.zeros(len(different), dtype=np.int64)
    _, of, among = np.intersect1d(different, known, assume_unique=True, return_indices=True)
    counts[of] = times[among]
    joined, total = np.union1d(different, known), np.zeros(len(different), dtype=np.int64)
    at, weight = np.searchsorted(different, joined), np.zeros(len(joined), dtype=np.int64)
    weight[np.searchsorted(joined, known)] = times
    inside = np.isin(joined, different, assume_unique=True)
    for a, b in _pairs(joined):
        for one, other in ((a, b), (b, a)):
            chosen = inside[one]
            np.add.at(total, at[one[chosen]], weight[other[chosen]])
    return (counts + total)[which].astype(np.int32)


def _pairs(hashes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of near hashes, each once: of five bands of bits, two at least are the same in both.

    Manku and others, https://doi.org/10.1145/1242572.1242592.
    """
    for number, kept in enumerate(_KEPT):
        key = hashes & kept
        order = np.argsort(key, kind="stable")
        key = key[order]
        first = np.arange(len(order) - 1)
        apart = 1
        while first.size:
            first = first[first + apart < len(order)]
            first = first[key[first] == key[first + apart]]
            a, b = order[first], order[first + apart]
            difference = hashes[a] ^ hashes[b]
            near = sum(_ONES[(difference >> shift).astype(np.uint16)] for shift in _SHIFTS) <= _DISTANCE
            for other in _KEPT[:number]:
                near &= (difference & other) != 0
            yield a[near], b[near]
            apart += 1
