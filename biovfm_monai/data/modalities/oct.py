"""Optical coherence tomography of the retina: reflected light on a display's scale, 8 bit."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["oct"]


def oct(keys: KeysCollection, spacing: Sequence[float] | None = None) -> Compose:  # noqa: A001 - the modality's name
    """8-bit values by 255, others between percentiles, to [0, 1]; C x scans x height x width."""
    return geometry(keys, spacing, EightBitd(keys))
