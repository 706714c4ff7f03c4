"""Radiographs: what the detector's maker meant to be seen, and bones white whatever the file's polarity.

The values of DICOM files are those for display already (`biovfm_monai.data.dicom_values`).
"""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["xray"]


def xray(keys: KeysCollection, spacing: Sequence[float] | None = None) -> Compose:
    """8-bit values by 255, others between their 0.5 and 99.5 percentiles, to [0, 1]; C x 1 x height x width.

    Left stays where it is: the heart tells a mirrored chest from an upright one.
    """
    return geometry(keys, spacing, EightBitd(keys))
