"""Microscopy: any bit depth."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["microscopy"]


def microscopy(keys: KeysCollection, spacing: Sequence[float] | None = None) -> Compose:
    """8-bit values by 255, others by percentiles, to [0, 1]; C x depth x height x width."""
    return geometry(keys, spacing, EightBitd(keys))
