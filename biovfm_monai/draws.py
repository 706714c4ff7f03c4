"""Random numbers of a sample that depend on its key alone: the same on any process, worker and device.

The generator is splitmix64 (https://doi.org/10.1145/2660193.2660195), in whole numbers, so that devices cannot differ.
"""

from __future__ import annotations

from enum import IntEnum, unique

import torch
from torch import Tensor

__all__ = ["Use", "forked", "random_keys", "uniform"]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


@unique
class Use(IntEnum):
    """What a sample's random numbers are for; each use has numbers of its own."""

    VIEW = 0
    MASK = 1
    CHANGE = 2
    STRENGTH = 3
    FLIP = 4
    ORDER = 5
    SIZE = 6
    BLOCK = 7
    TARGET = 8
    CONTEXT = 9
    SLICE = 10
    SHARE = 11
    DIRECTION = 12
    PROBE = 13


def random_keys(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys from torch's own generator, for samples that have none."""
    return torch.randint(2**62, (count,), device=device)


def forked(keys: Tensor, number: int) -> Tensor:
    """Other keys for each of several uses of one sample, such as its views."""
    return _shifted(_mixed(_mixed(keys) + number), 1)


def uniform(keys: Tensor, count: int, use: Use) -> Tensor:
    """Uniform random numbers in [0, 1), float32.

    Args:
        keys: int64, one per sample.
        count: numbers per sample.
        use: what they are for.

    Returns:
        B x count.
    """
    base = _mixed(keys + _signed((use + 1) * _GOLDEN))
    steps = torch.arange(1, count + 1, device=keys.device) * _signed(_GOLDEN)
    return _shifted(_mixed(base[:, None] + steps), 40).float() * 2.0**-24


def _signed(number: int) -> int:
    """A 64-bit number as torch has it."""
    return (number + 2**63) % 2**64 - 2**63


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling with zeros as numbers without a sign do."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
