"""Degree of anisotropy, the one number that tells an encoder how thick an image's slices are: PUMIT / SPAD-Nets.

The rule is that of https://github.com/function2-llx/PUMIT: how often the in-plane spacing doubles before it reaches the
slice spacing.
"""

from __future__ import annotations

import math

import torch
from monai.data import MetaTensor
from torch import Tensor

from biovfm_monai.errors import InputError

__all__ = ["anisotropy_of", "draw_anisotropy", "spacing_of"]


def anisotropy_of(spacing: list[float]) -> int:
    """Degree of anisotropy, floor(log2(slice spacing / in-plane spacing)) from 0 (isotropic) to 5 (a 2D image).

    Headers round: what is less than a thousandth of a doubling below a degree counts as that degree.

    Args:
        spacing: mm per voxel along depth, height and width; or along height and width, for a 2D image.

    Raises:
        InputError: when a spacing is not positive and finite, or pixels are 1.5 times as high as wide or more.
    """
    return int(min(_doublings(spacing) + 1e-3, 5.0))


def draw_anisotropy(spacing: list[float], generator: torch.Generator | None = None) -> int:
    """Either degree next to log2(slice spacing / in-plane spacing), the nearer one more often.

    For training: the network then learns to be alike on both sides of a boundary, such as 1.99 and 2.01.

    Args:
        spacing: as for `anisotropy_of`.
        generator: source of randomness; None for torch's own.

    Raises:
        InputError: as `anisotropy_of`.
    """
    return int(_doublings(spacing) + torch.rand((), generator=generator).item())


def spacing_of(image: Tensor) -> list[float] | None:
    """Spacing in mm along depth, height and width that an image's affine states; None when it carries none.

    Args:
        image: C x D x H x W, or a batch of such, of one spacing.

    Raises:
        InputError: when the images of a batch have different spacings.
    """
    if not isinstance(image, MetaTensor):
        return None
    affine = image.affine if image.affine.ndim == 3 else image.affine[None]
    spacings = affine[:, :3, :3].double().norm(dim=1)
    if not torch.allclose(spacings, spacings[:1], rtol=1e-3):
        raise InputError(
            f"the images of a batch have spacings from {spacings.amin(0).tolist()} to {spacings.amax(0).tolist()} mm. "
            "Put images of one spacing into a batch, or give anisotropy."
        )
    return [float(value) for value in spacings[0]]


def _doublings(spacing: list[float]) -> float:
    valid = len(spacing) == 2 or len(spacing) == 3
    for value in spacing:
        valid = valid and math.isfinite(value) and value > 0
    if not valid:
        raise InputError(
            f"spacing {spacing} must be two or three positive numbers, mm along (depth,) height and width. Correct it."
        )
    height, width = float(spacing[-2]), float(spacing[-1])
    if max(height, width) >= 1.5 * min(height, width):
        raise InputError(
            f"spacing {spacing}: pixels are {height} mm high and {width} mm wide. Resample them to squares first."
        )
    if len(spacing) == 2:
        return 5.0
    return min(max(math.log(float(spacing[0]) / min(height, width)) / math.log(2.0), 0.0), 5.0)
