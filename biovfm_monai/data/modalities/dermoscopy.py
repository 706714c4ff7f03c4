"""Dermoscopy: colour, 8 bit; lenses leave a dark ring in the corners, which is left as it is."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["dermoscopy"]


def dermoscopy(keys: KeysCollection, spacing: Sequence[float] | None = None) -> Compose:
    """Colours to [0, 1], the shorter side at most 512 pixels; C x 1 x height x width."""
    return geometry(keys, spacing, EightBitd(keys))
