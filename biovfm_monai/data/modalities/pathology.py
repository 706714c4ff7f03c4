"""Histology: colour, 8 bit."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["pathology"]


def pathology(keys: KeysCollection, spacing: Sequence[float] | None = None) -> Compose:
    """Colours to [0, 1]; C x 1 x height x width."""
    return geometry(keys, spacing, EightBitd(keys))
