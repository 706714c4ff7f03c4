"""Magnetic resonance: no absolute units, so percentiles of the foreground, as PUMIT scales it."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose, CropForegroundd, ScaleIntensityRangePercentilesd
from torch import Tensor

from biovfm_monai.data.modalities.base import geometry

__all__ = ["mri"]


def mri(
    keys: KeysCollection, spacing: Sequence[float] | None = None, percentiles: tuple[float, float] = (0.5, 99.5)
) -> Compose:
    """Crop the empty border, then scale the given percentiles to [0, 1], clipped; C x depth x height x width."""
    crop = [CropForegroundd(key, source_key=key, select_fn=_above_minimum, allow_smaller=True) for key in _tuple(keys)]
    scale = ScaleIntensityRangePercentilesd(keys, *percentiles, 0.0, 1.0, clip=True)
    return geometry(keys, spacing, Compose([*crop, scale]))


def _above_minimum(image: Tensor) -> Tensor:
    return image > image.min()


def _tuple(keys: KeysCollection) -> tuple:
    return (keys,) if isinstance(keys, str) else tuple(keys)  # type: ignore[arg-type]
