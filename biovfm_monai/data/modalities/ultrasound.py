"""Ultrasound: display values, 8 bit; the scanned field without the frame of text and scales around it."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import CropToFieldd, EightBitd, geometry

__all__ = ["ultrasound"]


def ultrasound(keys: KeysCollection, spacing: Sequence[float] | None = None) -> Compose:
    """Display values of the scanned field to [0, 1], what lies outside it black; C x frames x height x width."""
    return geometry(keys, spacing, EightBitd(keys), CropToFieldd(keys, 0.03, grey=True, mask=True))
