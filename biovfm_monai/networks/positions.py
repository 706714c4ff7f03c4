"""Sine-cosine positions on a grid, as in MAE (https://arxiv.org/abs/2111.06377), for any width in 2D and 3D."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sincos_positions"]

_BASE = 10000.0


def sincos_positions(
    grid_size: tuple[int, int, int], embed_dim: int, spatial_dims: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Fixed positions of a grid of tokens, float32, shape (depth * height * width) x embed_dim.

    The width is shared out in (sine, cosine) pairs, to x and y in 2D, to x, y and z in 3D, as evenly as it goes.
    In 2D this is MAE's table: the first half holds x, the second y, sines before cosines.

    Args:
        grid_size: tokens along depth, height and width; depth is 1 for a 2D image.
        embed_dim: width of a token; even.
        spatial_dims: 2 or 3, how many axes share the width.
        device: where the table is made; a copy of it would make the host wait for a GPU.

    Raises:
        ValueError: when embed_dim is odd or too small for a pair per axis.
    """
    if embed_dim % 2 or embed_dim < 2 * spatial_dims:
        raise ValueError(f"embed_dim must be even and at least {2 * spatial_dims}, got {embed_dim}")
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=device) for n in grid_size), indexing="ij")
    axes = [x, y, z][:spatial_dims]
    pairs, rest = divmod(embed_dim // 2, spatial_dims)
    parts = []
    for number, position in enumerate(axes):
        count = pairs + (number < rest)
        frequency = _BASE ** (-torch.arange(count, dtype=torch.float64, device=device) / count)
        angle = position.flatten()[:, None] * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()
