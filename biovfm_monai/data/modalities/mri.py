"""Magnetic resonance: no absolute units, so percentiles of the foreground; 8-bit images as they are, as in PUMIT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from monai.config import KeysCollection
from monai.transforms import Compose, Transform
from torch import Tensor

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["ForegroundPercentiles", "mri"]


class ForegroundPercentiles(Transform):
    """Scale two percentiles of the voxels above the image's minimum to 0 and 1, and clip."""

    def __init__(self, lower: float, upper: float) -> None:
        self.percentiles = (lower, upper)

    def __call__(self, image: Tensor) -> Tensor:
        """Scale one image of any shape."""
        minimum = image.min()
        foreground = image[image > minimum].numpy()
        low, high = np.percentile(foreground, self.percentiles) if foreground.size else (minimum, minimum)
        return ((image - float(low)) / max(float(high - low), 1e-6)).clamp(0, 1)


def mri(
    keys: KeysCollection, spacing: Sequence[float] | None = None, percentiles: tuple[float, float] = (0.5, 99.5)
) -> Compose:
    """The given percentiles of the foreground to [0, 1], clipped; C x depth x height x width."""
    return geometry(keys, spacing, EightBitd(keys, ForegroundPercentiles(*percentiles)))
