"""Positron emission tomography: standardised uptake where the header allows (https://doi.org/10.1118/1.3483293)."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose, ScaleIntensityRange, Transform
from torch import Tensor

from biovfm_monai.data.modalities.base import EightBitd, ForegroundPercentiles, geometry

__all__ = ["pet"]


class _Uptake(Transform):
    def __init__(self, window: tuple[float, float], percentiles: tuple[float, float]) -> None:
        self.of_uptake = ScaleIntensityRange(*window, 0.0, 1.0, clip=True)
        self.of_counts = ForegroundPercentiles(*percentiles)

    def __call__(self, image: Tensor) -> Tensor:
        known = getattr(image, "meta", {}).get("units") == "SUV"
        return self.of_uptake(image) if known else self.of_counts(image)


def pet(
    keys: KeysCollection,
    spacing: Sequence[float] | None = None,
    window: tuple[float, float] = (0.0, 20.0),
    percentiles: tuple[float, float] = (0.0, 99.9),
) -> Compose:
    """Uptake within `window` (g/ml by body weight) to [0, 1], clipped; C x depth x height x width.

    Where the uptake is not known (`read_image`), the given percentiles of the foreground become 0 and 1.
    """
    return geometry(keys, spacing, EightBitd(keys, _Uptake(window, percentiles)))
