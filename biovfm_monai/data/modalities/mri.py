"""Magnetic resonance: no absolute units, so percentiles of the foreground; 8-bit images as they are, as in PUMIT."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, NormalizeIntensityd

from biovfm_monai.data.modalities.base import EightBitd, ForegroundPercentiles, geometry

__all__ = ["BiasFieldd", "mri"]


class BiasFieldd(MapTransform):
    """Divide by the slowly varying field that the coils leave (N4, https://doi.org/10.1109/TMI.2010.2046908).

    The field is estimated on every `shrink`-th voxel of what is above Otsu's threshold. 8-bit images, whose contrast
    was changed for display, stay as they are.
    """

    def __init__(self, keys: KeysCollection, shrink: int = 4) -> None:
        super().__init__(keys)
        self.shrink = shrink

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Correct one sample's images, C x depth x height x width."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image: MetaTensor = sample[key]
            if image.dtype != torch.uint8:
                corrected = np.stack([self._correct(channel) for channel in image.as_tensor().numpy()])
                sample[key] = MetaTensor(torch.from_numpy(corrected), meta=image.meta)
        return sample

    def _correct(self, values: np.ndarray) -> np.ndarray:
        flat = values[0] if len(values) == 1 else values
        image = sitk.GetImageFromArray(flat.astype(np.float32) - min(float(flat.min()), 0.0))
        small = sitk.Shrink(image, [min(self.shrink, max(size // 4, 1)) for size in image.GetSize()])
        mask = sitk.OtsuThreshold(small, 0, 1, 200)
        corrector = sitk.N4BiasFieldCorrectionImageFilter()
        corrector.Execute(small, mask)
        field = sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image))
        return np.asarray(values / np.exp(field), dtype=np.float32)


def mri(
    keys: KeysCollection,
    spacing: Sequence[float] | None = None,
    percentiles: tuple[float, float] = (0.5, 99.5),
    bias_field: bool = False,
    z_score: bool = False,
) -> Compose:
    """The given percentiles of the foreground to [0, 1], clipped; C x depth x height x width.

    Args:
        keys: of the images.
        spacing: mm along depth, height and width to resample to; None to keep it.
        percentiles: of the voxels above the image's minimum.
        bias_field: first correct the bias field, which takes seconds per volume.
        z_score: then bring the foreground to mean 0 and standard deviation 1, as networks for segmentation like it.
    """
    steps = [EightBitd(keys, ForegroundPercentiles(*percentiles))]
    before = [BiasFieldd(keys)] if bias_field else []
    after = [NormalizeIntensityd(keys, nonzero=True, channel_wise=True)] if z_score else []
    return geometry(keys, spacing, *before, *steps, *after)
