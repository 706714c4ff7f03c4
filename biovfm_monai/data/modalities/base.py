"""Steps that several modality presets share: slices first, field of view, unit range, bounded size."""

from __future__ import annotations

import itertools
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
    SpatialCrop,
    SpatialResample,
    Transform,
)
from monai.transforms.utils import generate_spatial_bounding_box, get_largest_connected_component_mask
from skimage.morphology import convex_hull_image, isotropic_dilation, isotropic_erosion
from torch import Tensor

from biovfm_monai.data.headers import APART
from biovfm_monai.errors import InputError

__all__ = [
    "CropToFieldd", "EightBitd", "ForegroundPercentiles", "Resampled", "ShrinkInPlaned", "SlicesFirstd",
    "Straightened", "geometry",
]  # fmt: skip

# Which way the depth, height and width of a slice stack run: as a radiologist looks at axial, coronal, sagittal slices.
_VIEWS = {"S": "SPL", "I": "SPL", "A": "PIL", "P": "PIL", "R": "LIP", "L": "LIP"}
_THICK = 1.5
_COLOUR = 0.1
_SPECK = 0.01
_SLANT = 0.01


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
                affine = image.affine[:, [2, 1, 0, 3]]
                about = {name: value for name, value in image.meta.items() if name != "affine"}
                sample[key] = MetaTensor(image.as_tensor().transpose(1, 2)[:, None], affine=affine, meta=about)
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
    """Resample volumes, slices first, to a spacing in mm (depth, height, width); 2D images and films stay.

    MONAI's own dictionary transform fails on samples with keys such as "image_id".

    Args:
        keys: of the images.
        spacing: None for an axis to keep its own, such as [None, 1.5, 1.5] for thick and thin slices.

    Raises:
        InputError: when spacing is not three positive numbers.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float | None]) -> None:
        super().__init__(keys)
        if len(spacing) != 3 or any(value is not None and value <= 0 for value in spacing):
            raise InputError(f"spacing {spacing} must be three positive numbers, mm along depth, height and width.")
        # For MONAI a number that is none of a spacing keeps the image's.
        self.resample = Spacing(pixdim=[-1.0 if value is None else value for value in spacing], mode="bilinear")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            if sample[key].shape[1] > 1 and sample[key].pixdim[0] < APART:
                sample[key] = self.resample(sample[key])
        return sample


class Straightened(MapTransform):
    """Resample volumes, slices first, to a grid of right angles where theirs is none, as of a tilted gantry.

    Each slice stays one, and is shifted within its plane; the grid holds all of them.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        self.resample = SpatialResample(mode="bilinear", padding_mode="border")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Straighten one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            if sample[key].shape[1] > 1 and self._slants(np.asarray(sample[key].affine)):
                sample[key] = self._straight(sample[key])
        return sample

    @staticmethod
    def _slants(affine: np.ndarray) -> bool:
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        return bool(np.abs(axes.T @ axes - np.eye(3)).max() > _SLANT)

    def _straight(self, image: MetaTensor) -> Tensor:
        affine = np.array(image.affine, dtype=float)
        turn, steps = np.linalg.qr(affine[:3, 2::-1])
        straight = affine.copy()
        straight[:3, 2::-1] = turn * np.diag(steps)
        corners = np.array([*itertools.product(*((0, n - 1) for n in image.shape[1:]))])
        places = (corners @ np.linalg.solve(straight[:3, :3], affine[:3, :3]).T).round(3)
        low, high = np.floor(places.min(0)), np.ceil(places.max(0))
        straight[:3, 3] += straight[:3, :3] @ low
        return self.resample(image, dst_affine=straight, spatial_size=(high - low + 1).astype(int).tolist())


class ShrinkInPlaned(MapTransform):
    """Shrink height and width together until the shorter one is at most `short_side` pixels (PUMIT's 512).

    Args:
        keys: images, C x depth x height x width.
        short_side: pixels.
        volumes: False leaves images of several slices as they are.
    """

    def __init__(self, keys: KeysCollection, short_side: int = 512, volumes: bool = True) -> None:
        super().__init__(keys)
        self.short_side, self.volumes = short_side, volumes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Shrink one sample's images, C x depth x height x width."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image = sample[key]
            depth, *plane = image.shape[1:]
            if min(plane) > self.short_side and (depth == 1 or self.volumes):
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


class CropToFieldd(MapTransform):
    """Crop height and width to the field of view: the largest bright region, as of a fundus camera or a probe.

    A pixel is bright if it is so in any channel and slice. Strokes thinner than a fiftieth of the image, such as text
    and rulers, are no region, nor are specks of less than 1 % of it. An image without a region stays as it is.

    Args:
        keys: images in [0, 1], C x depth x height x width.
        threshold: brightness above which a pixel is of the field.
        grey: count pixels without colour only, as those of a scan beside coloured menus.
        mask: blacken what lies outside the region's convex hull.
    """

    def __init__(self, keys: KeysCollection, threshold: float = 0.06, grey: bool = False, mask: bool = False) -> None:
        super().__init__(keys)
        self.threshold, self.grey, self.mask = threshold, grey, mask

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image = sample[key]
            field = self._field(image)
            if field is None:
                continue
            (top, left), (bottom, right) = generate_spatial_bounding_box(field[None])
            if self.mask:
                image = image * torch.from_numpy(convex_hull_image(field))
            sample[key] = SpatialCrop(roi_start=(0, top, left), roi_end=(image.shape[1], bottom, right))(image)
        return sample

    def _field(self, image: Tensor) -> np.ndarray | None:
        """Which pixels of height x width are of the largest region; None without any."""
        light = image.as_tensor() if isinstance(image, MetaTensor) else image
        if self.grey:
            light = light * (light.amax(0) - light.amin(0) < _COLOUR)
        bright = (light.amax((0, 1)) > self.threshold).numpy()
        radius = min(bright.shape) / 100
        # What is bright at the image's edge goes on beyond it, and somewhere it is dark, which distances need.
        beyond = int(2 * radius) + 2
        core = isotropic_erosion(np.pad(np.pad(bright, beyond, mode="reflect"), 1), radius)
        if not core.any():
            return None
        opened = isotropic_dilation(core, radius)[beyond + 1 : -beyond - 1, beyond + 1 : -beyond - 1]
        field = np.asarray(get_largest_connected_component_mask(opened))
        return field if field.sum() >= _SPECK * field.size else None


def geometry(keys: KeysCollection, spacing: Sequence[float | None] | None, *steps: Transform) -> Compose:
    """A preset: slices first, the modality's own steps, a straight grid of the spacing asked for, within the limit."""
    size = [] if spacing is None else [Resampled(keys, spacing)]
    return Compose(
        [SlicesFirstd(keys), *steps, Straightened(keys), *size, ShrinkInPlaned(keys, volumes=spacing is None)]
    )
