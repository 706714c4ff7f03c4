"""Which image each sample number shows: a pure function of the seed and the number, without a list of what was drawn.

Images form groups by bucket, source and modality. A turn has as many samples of each group as its share says, in an
order that a keyed permutation gives (a Feistel network over two digits, walked until it stays inside, of Black and
Rogaway, https://doi.org/10.1007/3-540-45760-7_9); the images of a group take turns by another one. So with shares by
size each image comes once in a turn, and with others the images of a group come equally often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biovfm_monai.data.duplicates import weight_of
from biovfm_monai.errors import InputError

__all__ = ["Labels", "Mixture", "mixed", "permute", "subset"]

_ROUNDS = 8
_RESOLUTION = 100
_CHUNK = 1 << 20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Integers = NDArray[np.int64]


class Labels(NamedTuple):
    """A column of names: a whole number per image, and the names that the numbers stand for."""

    codes: NDArray[Any]
    names: list[str]

    @classmethod
    def of(cls, values: Sequence[str]) -> Labels:
        """Number the different names of a column in their alphabetical order."""
        names, codes = np.unique(np.asarray(values, dtype=str), return_inverse=True)
        return cls(codes.astype(np.int32), names.tolist())


def mixed(*numbers: ArrayLike) -> NDArray[np.uint64]:
    """One well-mixed number from several, element by element (splitmix64, https://doi.org/10.1145/2660193.2660195)."""
    result: NDArray[np.uint64] = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            z = result + np.asarray(number).astype(np.uint64) + _GOLDEN
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            result = z ^ (z >> np.uint64(31))
    return result


def permute(index: ArrayLike, size: ArrayLike, key: ArrayLike) -> Integers:
    """Where a keyed permutation of 0 ... size - 1 takes each index, with neither a table nor a walk from the start.

    Args:
        index, size, key: of one shape or broadcast to it; 0 <= index < size.
    """
    x, size, key = np.broadcast_arrays(
        np.asarray(index, dtype=np.uint64), np.asarray(size, dtype=np.uint64), np.asarray(key, dtype=np.uint64)
    )
    # Numbers of two digits, the bases of which are near the root of the size, so that few walks leave it.
    high_base = np.ceil(np.sqrt(size)).astype(np.uint64).ravel()
    size, result, first = size.ravel(), x.ravel().copy(), mixed(key).ravel()
    low_base = (size + high_base - np.uint64(1)) // high_base
    keys = [first + step for step in np.arange(_ROUNDS, dtype=np.uint64) * _GOLDEN]
    walking: Any = slice(None)
    while result[walking].size:
        of_high, of_low = high_base[walking], low_base[walking]
        high, low = np.divmod(result[walking], of_low)
        for number, one in enumerate(keys):
            if number % 2:
                low = (low + _hashed(high + one[walking])) % of_low
            else:
                high = (high + _hashed(low + one[walking])) % of_high
        result[walking] = high * of_low + low
        walking = np.flatnonzero(result >= size)
    return result.reshape(x.shape).astype(np.int64)


def _hashed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return z >> np.uint64(32)


class _Wheel:
    """Members that come up in given shares: in each turn as often as they should, in an order of the turn's own."""

    def __init__(self, shares: NDArray[np.float64], least: int, key: int) -> None:
        # Enough slots that the smallest share is met to a percent.
        exact = least * shares
        whole = np.allclose(exact, exact.round()) and exact.min() > 0.5
        count = least * (1 if whole else math.ceil(_RESOLUTION / max(float(exact.min()), 1e-12)))
        slots = np.floor(count * shares + 1e-6).astype(np.int64)
        remainder = count * shares - slots
        slots[np.argsort(-remainder, kind="stable")[: count - int(slots.sum())]] += 1
        self.slots, self.ends, self.key = slots, slots.cumsum(), key

    def draw(self, number: Integers) -> tuple[Integers, Integers]:
        """Which member each number brings up, and a number of its own for each time that it comes up."""
        count = int(self.ends[-1])
        turn, place = np.divmod(number, count)
        slot = permute(place, count, mixed(self.key, turn))
        member = np.searchsorted(self.ends, slot, side="right")
        slots = self.slots[member]
        before = np.asarray(turn * slots + slot - (self.ends[member] - slots), dtype=np.int64)
        return member, before


class Mixture:
    """Images mixed by source and modality, in batches of one bucket each.

    A source of n images has a share of all samples in proportion to n ** (1 / temperature) times its weight: by size at
    1, equal shares as temperature grows. Of k images that are alike each counts as (2k - 1) / k². A bucket, such as
    images of one size and degree of anisotropy, fills whole batches, as often as its images' share says.

    Args:
        source, modality, bucket: of each image; None where all have one.
        alike: how many images each one is nearly the same as, itself among them; None where all are different.
        batch_size: samples of one batch, which share a bucket; 1 without buckets.
        seed: of the order.
        temperature: of the sources' sizes, above 0.
        source_weights, modality_weights: name -> factor of its share, 1 for what is not named, 0 to leave it out.

    Raises:
        InputError: when there is no image, a weight or the temperature means nothing, or a name is not there.
    """

    def __init__(
        self,
        source: Labels,
        modality: Labels | None = None,
        bucket: Labels | None = None,
        alike: NDArray[Any] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        source_weights: Mapping[str, float] | None = None,
        modality_weights: Mapping[str, float] | None = None,
    ) -> None:
        if not len(source.codes):
            raise InputError("there is no image to sample from. Give others, or a larger share of them.")
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"temperature {temperature} must be above 0. Give 1 for shares by size, or more.")
        one = Labels(np.zeros(1, dtype=np.int8), [""])
        modality, bucket = modality or one, bucket or one
        likeness, weights = _likeness(alike)
        # Rows by bucket, then source, then modality, then likeness: each group is one stretch of them.
        present, counts, self._order = _stretches(_combined(len(source.codes), (bucket, source, modality, likeness)))
        rest, w = np.divmod(present, len(weights))
        rest, m = np.divmod(rest, len(modality.names))
        b, s = np.divmod(rest, len(source.names))
        sizes = np.bincount(s, counts * weights[w], minlength=len(source.names))
        share = counts * weights[w] * sizes[s] ** (1 / temperature - 1)
        share = share * _factors(source, source_weights, "source")[s]
        share = share * _factors(modality, modality_weights, "modality")[m]
        if not share.sum() > 0:
            raise InputError("all images have weight 0. Give one source and one modality a weight above 0.")
        self.batch_size, self.seed = batch_size, seed
        used = share > 0
        starts = counts.cumsum() - counts
        buckets = np.unique(b[used])
        self._groups = [
            (starts[used & (b == n)], counts[used & (b == n)], np.flatnonzero(used & (b == n))) for n in buckets
        ]
        totals = np.array([share[of].sum() for _, _, of in self._groups])
        self._batches = _Wheel(totals / share.sum(), len(buckets), int(mixed(seed, 1)))
        self._wheels = [
            _Wheel(share[of] / total, int(size.sum()), int(mixed(seed, 2, n)))
            for (_, size, of), total, n in zip(self._groups, totals, buckets, strict=True)
        ]

    def __len__(self) -> int:
        """Images that can come up."""
        return int(sum(size.sum() for _, size, _ in self._groups))

    def rows(self, numbers: ArrayLike, attempt: int = 0) -> Integers:
        """The image that each sample number shows.

        Args:
            numbers: any; those of one batch share a bucket.
            attempt: 1 for an image in place of the first one, 2 for one in place of that, and so on; each is drawn from
                the same bucket in the same shares.

        Returns:
            Rows of the columns given, one per number.
        """
        number = np.asarray(numbers, dtype=np.int64)
        batch, batch_of = np.unique(number // self.batch_size, return_inverse=True)
        buckets, turns = (drawn[batch_of] for drawn in self._batches.draw(batch))
        result = np.empty_like(number)
        for bucket in np.unique(buckets):
            of = buckets == bucket
            starts, sizes, groups = self._groups[bucket]
            drawn = turns[of] * self.batch_size + number[of] % self.batch_size
            if attempt:
                drawn = (mixed(self.seed, 6, number[of], attempt) >> np.uint64(16)).astype(np.int64)
            member, seen = self._wheels[bucket].draw(drawn)
            turn, place = np.divmod(seen, sizes[member])
            key = mixed(self.seed, 3, groups[member], turn)
            result[of] = self._order[starts[member] + permute(place, sizes[member], key)]
        return result


def subset(source: Labels, fraction: float, seed: int = 0, subject: Labels | None = None) -> NDArray[np.bool_]:
    """Which images belong to a share of every source; a smaller share lies inside a larger one of the same seed.

    Args:
        source: of each image.
        fraction: above 0, at most 1; every source keeps at least one image.
        seed: of the choice.
        subject: of each image, "" where it is unknown: the share is then one of subjects, with all their images; an
            image of no known subject is a subject of its own.

    Raises:
        InputError: when the fraction means nothing.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction {fraction} must be above 0 and at most 1. Give 0.1 for a tenth of the images.")
    if subject is not None:
        shown, number = _subjects(source, subject)
        return subset(Labels(source.codes[shown], source.names), fraction, seed)[number]
    order = np.argsort(source.codes, kind="stable").astype(np.uint32)
    sizes = np.bincount(source.codes, minlength=len(source.names))
    kept = np.zeros(len(order), dtype=bool)
    for code, (size, end) in enumerate(zip(sizes.tolist(), sizes.cumsum().tolist(), strict=True)):
        count = min(size, max(round(fraction * size), 1))
        for first in range(0, count, _CHUNK):
            chosen = permute(np.arange(first, min(first + _CHUNK, count)), size, mixed(seed, 4, code))
            kept[order[end - size + chosen]] = True
    return kept


def _subjects(source: Labels, subject: Labels) -> tuple[Integers, Integers]:
    """An image of each subject, in the order of their codes, and the number of each image's subject among them."""
    who = source.codes.astype(np.int64) * len(subject.names) + subject.codes
    unknown = np.array([not name for name in subject.names])[subject.codes]
    who[unknown] = len(source.names) * len(subject.names) + np.flatnonzero(unknown)
    _, first, number = np.unique(who, return_index=True, return_inverse=True)
    return first, number


def _likeness(alike: NDArray[Any] | None) -> tuple[Labels, NDArray[np.float64]]:
    """Of how many images that are alike each is one, as a column, and what an image of each kind weighs."""
    kinds = np.ones(1, dtype=np.int64) if alike is None else np.flatnonzero(_counted(alike))
    number = np.zeros(int(kinds.max()) + 1, dtype=np.int32)
    number[kinds] = np.arange(len(kinds))
    codes = np.zeros(1, dtype=np.int8) if alike is None or len(kinds) == 1 else number[alike]
    return Labels(codes, [str(kind) for kind in kinds]), weight_of(kinds)


def _combined(rows: int, columns: Sequence[Labels]) -> NDArray[np.int32]:
    """One number per row for the values of all columns, the first one the slowest."""
    if math.prod(len(column.names) for column in columns) >= 2**31:
        raise InputError("there are too many sources times modalities to mix. Join small sources into one.")
    code = np.zeros(rows, dtype=np.int32)
    for column in columns:
        if len(column.names) > 1:
            code *= len(column.names)
            code += column.codes
    return code


def _stretches(code: NDArray[np.int32]) -> tuple[Integers, Integers, NDArray[np.uint32]]:
    """The codes that occur, how often, and the rows sorted by code."""
    sizes = _counted(code)
    present = np.flatnonzero(sizes)
    # Small numbers are sorted by their digits, in a second for 20 million rows.
    number = np.zeros(len(sizes), dtype=np.uint16 if len(present) < 2**16 else np.uint32)
    number[present] = np.arange(len(present))
    return present, sizes[present], np.argsort(number[code], kind="stable").astype(np.uint32)


def _counted(numbers: NDArray[Any]) -> Integers:
    """How often each whole number occurs; numpy would first make 64 bits of all of them."""
    counts = np.zeros(int(numbers.max()) + 1, dtype=np.int64)
    for first in range(0, len(numbers), _CHUNK):
        counts += np.bincount(numbers[first : first + _CHUNK], minlength=len(counts))
    return counts


def _factors(labels: Labels, weights: Mapping[str, float] | None, kind: str) -> NDArray[np.float64]:
    weights = weights or {}
    for name, weight in weights.items():
        if name not in labels.names:
            raise InputError(f"there is no {kind} {name!r} to weigh. Give one of {', '.join(labels.names)}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"weight {weight} of {kind} {name!r} must be 0 or more. Correct it.")
    return np.array([weights.get(name, 1.0) for name in labels.names], dtype=np.float64)
