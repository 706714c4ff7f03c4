"""Steps that several modality presets share: slices first, bounded size, unit range."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    MapTransform,
    Orientation,
    Resize,
    ScaleIntensityRangePercentiles,
    Spacing,
    Transform,
)

from biovfm_monai.errors import InputError

__all__ = ["EightBitd", "Resampled", "ShrinkInPlaned", "SlicesFirstd", "geometry"]

# Which way the depth, height and width of a slice stack run: as a radiologist looks at axial, coronal, sagittal slices.
_VIEWS = {"S": "SPL", "I": "SPL", "A": "PIL", "P": "PIL", "R": "LIP", "L": "LIP"}
_THICK = 1.5


class SlicesFirstd(MapTransform):
    """Turn C x X x Y (x Z) into C x depth x height x width, the axis of the slices first.

    The slices lie along the axis of size one, else along one whose spacing is 1.5 times the others', else along the
    body axis. An image without depth gets depth 1.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image: MetaTensor = sample[key]
            if image.ndim == 3:
                sample[key] = MetaTensor(image.as_tensor().transpose(1, 2)[:, None], meta=image.meta)
                continue
            image = Orientation(
                axcodes=_VIEWS[self._slice_direction(image)], labels=(("L", "R"), ("P", "A"), ("I", "S"))
            )(image)
            sample[key] = image
        return sample

    @staticmethod
    def _slice_direction(image: MetaTensor) -> str:
        directions = nib.orientations.aff2axcodes(np.asarray(image.affine))
        single = [axis for axis, size in enumerate(image.shape[1:]) if size == 1]
        if len(single) == 1:
            return str(directions[single[0]])
        spacing = np.asarray(image.pixdim)
        thick = int(spacing.argmax())
        if spacing[thick] > _THICK * np.delete(spacing, thick).max():
            return str(directions[thick])
        return "S"


class Resampled(MapTransform):
    """Resample volumes, slices first, to a spacing in mm (depth, height, width); 2D images have none and stay.

    MONAI's own dictionary transform fails on samples with keys such as "image_id".

    Raises:
        InputError: when spacing is not three positive numbers.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float]) -> None:
        super().__init__(keys)
        if len(spacing) != 3 or min(spacing) <= 0:
            raise InputError(f"spacing {spacing} must be three positive numbers, mm along depth, height and width.")
        self.resample = Spacing(pixdim=spacing, mode="bilinear")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            if sample[key].shape[1] > 1:
                sample[key] = self.resample(sample[key])
        return sample


class ShrinkInPlaned(MapTransform):
    """Shrink height and width together until the shorter one is at most `short_side` pixels (PUMIT's 512)."""

    def __init__(self, keys: KeysCollection, short_side: int = 512) -> None:
        super().__init__(keys)
        self.short_side = short_side

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Shrink one sample's images, C x depth x height x width."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image = sample[key]
            depth, *plane = image.shape[1:]
            if min(plane) > self.short_side:
                ratio = self.short_side / min(plane)
                sample[key] = Resize((depth, *(round(n * ratio) for n in plane)), mode="area")(image)
        return sample


class EightBitd(MapTransform):
    """Scale to [0, 1]: 8-bit images, which were made for display, by 255; all others by another rule.

    Args:
        keys: what to scale.
        otherwise: rule for float images; by default their 0.5 and 99.5 percentiles become 0 and 1.
    """

    def __init__(self, keys: KeysCollection, otherwise: Transform | None = None) -> None:
        super().__init__(keys)
        self.otherwise = otherwise or ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image = sample[key]
            sample[key] = image.float() / 255 if image.dtype == torch.uint8 else self.otherwise(image)
        return sample


def geometry(keys: KeysCollection, spacing: Sequence[float] | None, intensity: Transform) -> Compose:
    """A preset: slices first, the modality's intensity rule, then the spacing asked for, or else the size limit."""
    size = ShrinkInPlaned(keys) if spacing is None else Resampled(keys, spacing)
    return Compose([SlicesFirstd(keys), intensity, size])
