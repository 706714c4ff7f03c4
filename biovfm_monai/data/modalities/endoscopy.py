"""Endoscopy: colour, 8 bit; what the scope sees, without the black mask and the text around it."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import CropToFieldd, EightBitd, geometry

__all__ = ["endoscopy"]


def endoscopy(keys: KeysCollection, spacing: Sequence[float] | None = None) -> Compose:
    """Colours of the field of view to [0, 1], the shorter side at most 512 pixels; C x frames x height x width."""
    return geometry(keys, spacing, EightBitd(keys), CropToFieldd(keys))
