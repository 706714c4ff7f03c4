"""Mammography: display values as of radiographs; the air around the breast tells nothing, and is not counted.

The values of DICOM files are those for display already (`biovfm_monai.data.dicom_values`).
"""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose

from biovfm_monai.data.modalities.base import EightBitd, ForegroundPercentiles, geometry

__all__ = ["mammography"]


def mammography(
    keys: KeysCollection, spacing: Sequence[float] | None = None, percentiles: tuple[float, float] = (0.5, 99.5)
) -> Compose:
    """8-bit values by 255, others between percentiles of the breast, to [0, 1]; C x 1 x height x width.

    Neither turned nor mirrored: which side a breast lies on belongs to the finding.
    """
    return geometry(keys, spacing, EightBitd(keys, ForegroundPercentiles(*percentiles)))
