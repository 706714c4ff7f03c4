"""Computed tomography: a window of Hounsfield units (https://radiopaedia.org/articles/windowing-ct)."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose, ScaleIntensityRange

from biovfm_monai.data.modalities.base import EightBitd, geometry
from biovfm_monai.errors import InputError

__all__ = ["WINDOWS", "ct"]

WINDOWS = {
    "wide": (-1000.0, 1000.0),
    "soft tissue": (-160.0, 240.0),
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "brain": (0.0, 80.0),
}
"""Name -> lowest and highest Hounsfield unit that is shown."""


def ct(keys: KeysCollection, spacing: Sequence[float] | None = None, window: str | Sequence[float] = "wide") -> Compose:
    """Hounsfield units within a window, one of `WINDOWS` or two numbers, to [0, 1]; C x depth x height x width.

    8-bit images hold no Hounsfield units and are divided by 255.

    Raises:
        InputError: when the window is neither.
    """
    ends = WINDOWS.get(window, ()) if isinstance(window, str) else tuple(window)
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise InputError(f"window {window!r} must be one of {', '.join(WINDOWS)}, or two numbers, the lower one first.")
    return geometry(keys, spacing, EightBitd(keys, ScaleIntensityRange(*ends, 0.0, 1.0, clip=True)))
