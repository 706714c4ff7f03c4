"""Computed tomography: a window of Hounsfield units (https://radiopaedia.org/articles/hounsfield-unit)."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose, ScaleIntensityRange

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["ct"]


def ct(
    keys: KeysCollection, spacing: Sequence[float] | None = None, window: tuple[float, float] = (-1000.0, 1000.0)
) -> Compose:
    """Hounsfield units within `window` (from air to dense bone) to [0, 1], clipped; C x depth x height x width.

    8-bit images hold no Hounsfield units and are divided by 255.
    """
    return geometry(keys, spacing, EightBitd(keys, ScaleIntensityRange(*window, 0.0, 1.0, clip=True)))
