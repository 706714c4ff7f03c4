"""Prepared images as numbers for storage, in Blosc2's chunks (https://www.blosc.org/c-blosc2/format/cframe_format.html)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import blosc2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SHARE", "Encoded", "checksum_of", "decode", "eight_bits", "encode", "frame_of", "shares"]

_LEVELS, _PROBE, _ROUNDING = 2**16, 1 << 16, 2e-6
SHARE = 1 / 255
"""What one grey level of eight bits counts."""


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
        return Encoded(eight_bits(torch.from_numpy(image)).numpy(), SHARE, 0.0, True)
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
    encoded = Encoded((numbers - first + least).astype(dtype), step, float(lowest + (first - least) * step), True)
    exact = np.abs(decode(*encoded).numpy() - image).max() <= _ROUNDING
    return encoded if exact else Encoded(image.astype(np.float16), 1.0, 0.0, unit)


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


def checksum_of(encoded: Encoded) -> bytes:
    """16 bytes that are the same for images of the same size and values (BLAKE2b)."""
    digest = blake2b(str((encoded.numbers.shape, *encoded[1:])).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(encoded.numbers).data)
    return digest.digest()


def eight_bits(image: Tensor) -> Tensor:
    """Values in [0, 1] as whole numbers of eight bits, off by at most half a grey level."""
    return (image * 255).round().byte()


def shares(image: Tensor) -> Tensor:
    """Whole numbers of eight bits as float16 in [0, 1]; floats as they are."""
    return image.float().mul_(SHARE).half() if image.dtype == torch.uint8 else image


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
