"""Affine resampling of a batch of images, several views of each at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai.data.encoding import shares

__all__ = ["sampled"]


def sampled(image: Tensor, maps: Tensor, axes: list[Tensor]) -> Tensor:
    """What affine maps show of a batch; beyond an image, its mirror image.

    Args:
        image: B x C x D x H x W in [0, 1], or whole numbers of eight bits.
        maps: V B x dims x (dims + 1), on the CPU, from view to source in [-1, 1] coordinates (x, y(, z)).
        axes: places along (depth,) height and width of a view.

    Returns:
        float32, V B x C x D x H x W.
    """
    # As float16 in between, which a batch with other images is in: a view must not depend on what else there is.
    image = shares(image).float().flatten(2, 5 - len(axes))
    grid = _grid(maps.to(image.device, non_blocking=True), axes)
    # Only what is turned shows what lies beyond the source, whose mirror image torch's own mode gives more slowly.
    reach = (maps[:, :, :-1].abs().sum(2) + maps[:, :, -1].abs()).amax()
    if reach > 3:
        grid = grid.add_(1).remainder_(4).sub_(2).abs_().neg_().add_(1)
    elif reach > 1:
        grid = grid.lerp_(grid.clamp(-1, 1), 2)
    # Several views of an image are sampled as one that is as many times as long.
    tall = grid.unflatten(0, (len(image), -1)).flatten(1, 2)
    view = F.grid_sample(image, tall, mode="bilinear", padding_mode="border", align_corners=False)
    view = view.unflatten(2, (-1, len(axes[0]))).movedim(2, 1).flatten(0, 1)
    return view.unsqueeze(2) if len(axes) == 2 else view


def _grid(maps: Tensor, axes: list[Tensor]) -> Tensor:
    """As `F.affine_grid` of B x dims x (dims + 1), at places along (depth,) height, width, many times as fast."""
    size = [len(places) for places in axes]
    if len(size) == 2:
        # As complex numbers, x and y are added in one go.
        x, y, centre = torch.view_as_complex(maps.transpose(1, 2).contiguous()).unbind(1)
        rows = torch.addcmul(centre[:, None], y[:, None], axes[0])
        return torch.view_as_real(rows[:, :, None] + (x[:, None] * axes[1])[:, None])
    grid = maps.new_empty(len(maps), *size, len(size))
    for row in range(len(size)):
        # Coordinates come as x, y(, z), axes as (depth,) height, width.
        parts = []
        for number, places in enumerate(axes):
            shape = [-1 if axis == number else 1 for axis in range(len(size))]
            parts.append(maps[:, row, len(size) - 1 - number].view(-1, *[1] * len(size)) * places.view(1, *shape))
        parts[0] = parts[0] + maps[:, row, -1].view(-1, *[1] * len(size))
        torch.add(sum(parts[1:-1], parts[0]), parts[-1], out=grid[..., row])
    return grid
