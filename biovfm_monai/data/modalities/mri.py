"""Magnetic resonance: no absolute units, so percentiles of the foreground, as in PUMIT."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import CastToTyped, Compose, MapTransform

from biovfm_monai.data.modalities.base import geometry

__all__ = ["ForegroundPercentilesd", "mri"]


class ForegroundPercentilesd(MapTransform):
    """Scale two percentiles of the voxels above the image's minimum to 0 and 1, and clip."""

    def __init__(self, keys: KeysCollection, lower: float, upper: float) -> None:
        super().__init__(keys)
        self.percentiles = (lower, upper)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image = sample[key]
            minimum = image.min()
            foreground = image[image > minimum].numpy()
            low, high = np.percentile(foreground, self.percentiles) if foreground.size else (minimum, minimum)
            sample[key] = ((image - float(low)) / max(float(high - low), 1e-6)).clamp(0, 1)
        return sample


def mri(
    keys: KeysCollection, spacing: Sequence[float] | None = None, percentiles: tuple[float, float] = (0.5, 99.5)
) -> Compose:
    """The given percentiles of the foreground to [0, 1], clipped; C x depth x height x width."""
    return geometry(keys, spacing, Compose([CastToTyped(keys), ForegroundPercentilesd(keys, *percentiles)]))
