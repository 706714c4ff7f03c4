"""Microscopy: any bit depth, and any number of channels, each with a brightness of its own."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose, ScaleIntensityRangePercentiles

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["microscopy"]


def microscopy(
    keys: KeysCollection, spacing: Sequence[float] | None = None, percentiles: tuple[float, float] = (0.5, 99.5)
) -> Compose:
    """8-bit values by 255, others between percentiles of each channel, to [0, 1]; C x depth x height x width."""
    scale = ScaleIntensityRangePercentiles(*percentiles, 0.0, 1.0, clip=True, channel_wise=True)
    return geometry(keys, spacing, EightBitd(keys, scale))
