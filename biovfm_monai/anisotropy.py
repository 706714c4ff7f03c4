"""Degree of anisotropy, the one number that tells an encoder how thick an image's slices are: PUMIT / SPAD-Nets.

The rule is that of https://github.com/function2-llx/PUMIT: how often the in-plane spacing doubles before it reaches the
slice spacing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from biovfm_monai.errors import InputError

__all__ = ["anisotropy_of", "check_spacing", "degree_of_batch", "draw_anisotropy", "spacing_of"]


def anisotropy_of(spacing: list[float]) -> int:
    """Degree of anisotropy, floor(log2(slice spacing / in-plane spacing)) from 0 (isotropic) to 5 (a 2D image).

    Headers round: what is less than a thousandth of a doubling below a degree counts as that degree.

    Args:
        spacing: mm per voxel along depth, height and width; or along height and width, for a 2D image.

    Raises:
        InputError: when a spacing is not positive and finite, or pixels are 1.5 times as high as wide or more.
    """
    check_spacing(spacing)
    if len(spacing) == 2:
        return 5
    # A thousandth of a doubling is 1.0007. Comparisons, not a logarithm: a compiled encoder then need not be compiled
    # anew for each spacing.
    ratio = spacing[0] / min(spacing[1], spacing[2]) * 1.0007
    degree = 0
    for number in range(1, 6):
        degree += int(ratio >= 2.0**number)
    return degree


def degree_of_batch(batch: Mapping[str, Any]) -> int | None:
    """The degree of anisotropy that the images of a batch share; None where none is given.

    Raises:
        InputError: when they have several.
    """
    given = batch.get("anisotropy")
    degrees = [] if given is None else torch.as_tensor(given).unique().tolist()
    if len(degrees) > 1:
        raise InputError(f"the images of a batch have degrees of anisotropy {degrees}. Put one degree into a batch.")
    return int(degrees[0]) if degrees else None


def draw_anisotropy(spacing: list[float], generator: torch.Generator | None = None) -> int:
    """Either degree next to log2(slice spacing / in-plane spacing), the nearer one more often.

    For training: the network then learns to be alike on both sides of a boundary, such as 1.99 and 2.01.

    Args:
        spacing: as for `anisotropy_of`.
        generator: source of randomness; None for torch's own.

    Raises:
        InputError: as `anisotropy_of`.
    """
    check_spacing(spacing)
    if len(spacing) == 2:
        return 5
    doublings = min(max(math.log2(spacing[0] / min(spacing[1], spacing[2])), 0.0), 5.0)
    return int(doublings + torch.rand((), generator=generator).item())


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
    if spacings.isfinite().all() and not torch.allclose(spacings, spacings[:1], rtol=1e-3):
        raise InputError(
            f"the images of a batch have spacings from {spacings.amin(0).tolist()} to {spacings.amax(0).tolist()} mm. "
            "Put images of one spacing into a batch, or give anisotropy."
        )
    return [float(value) for value in spacings[0]]


def check_spacing(spacing: list[float]) -> None:
    """Refuse a spacing that means nothing.

    Raises:
        InputError: as `anisotropy_of`.
    """
    valid = len(spacing) == 2 or len(spacing) == 3
    for value in spacing:
        valid = valid and value > 0 and value < 1e9
    if not valid:
        raise InputError(
            f"spacing {spacing} must be two or three positive numbers, mm along (depth,) height and width. Correct it."
        )
    height, width = spacing[-2], spacing[-1]
    if max(height, width) >= 1.5 * min(height, width):
        raise InputError(
            f"spacing {spacing}: pixels are {height} mm high and {width} mm wide. Resample them to squares; or, if one "
            "of the two is the distance of slices, put the slices first."
        )
