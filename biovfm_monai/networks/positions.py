"""Where a token is: fixed sine-cosine tables, learned grids at any size, and rotary angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["grid_coordinates", "interpolate_grid", "rotary_angles", "rotate", "sincos_positions"]


def grid_coordinates(grid_size: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
    """Numbers (z, y, x) of a grid's tokens, depth first: (depth * height * width) x 3, float64."""
    d, h, w = grid_size
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in (d, h, w)]
    z, y, x = torch.meshgrid(axes, indexing="ij")
    return torch.stack([z.flatten(), y.flatten(), x.flatten()], dim=1)


def sincos_positions(
    grid_size: tuple[int, int, int], embed_dim: int, spatial_dims: int, device: torch.device | None = None
) -> Tensor:
    """Fixed positions of a grid of tokens as in MAE (https://arxiv.org/abs/2111.06377), for any even width.

    The width is shared out in (sine, cosine) pairs, to x and y in 2D, to x, y and z in 3D, as evenly as it goes.
    In 2D this is MAE's table: the first half holds x, the second y, sines before cosines.

    Args:
        grid_size: tokens along depth, height and width; depth is 1 for a 2D image.
        embed_dim: width of a token; even.
        spatial_dims: 2 or 3, how many axes share the width.
        device: where the table is made, None for the CPU; a copy of it would make the host wait for a GPU.

    Returns:
        (depth * height * width) x embed_dim, float32.

    Raises:
        ValueError: when embed_dim is odd or too small for a pair per axis.
    """
    if embed_dim % 2 or embed_dim < 2 * spatial_dims:
        raise ValueError(f"embed_dim must be even and at least {2 * spatial_dims}, got {embed_dim}")
    coordinates = grid_coordinates(grid_size, device)
    pairs, rest = embed_dim // 2 // spatial_dims, embed_dim // 2 % spatial_dims
    parts = []
    for number in range(spatial_dims):
        count = pairs + int(number < rest)
        frequency = 10000.0 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)
        angle = coordinates[:, 2 - number, None] * frequency
        parts.append(angle.sin())
        parts.append(angle.cos())
    return torch.cat(parts, dim=1).float()


def interpolate_grid(grid: Tensor, grid_size: tuple[int, int, int], antialias: bool = False) -> Tensor:
    """Resample a learned grid, 1 x C x D x H x W, to another size: bicubic in the plane, linear along depth.

    With antialias as DINOv2 with registers does it (https://arxiv.org/abs/2309.16588).
    """
    d, h, w = grid_size
    if (h, w) != (grid.shape[3], grid.shape[4]):
        plane = F.interpolate(
            grid[0].transpose(0, 1), size=(h, w), mode="bicubic", align_corners=False, antialias=antialias
        )
        grid = plane.transpose(0, 1)[None]
    if d != grid.shape[2]:
        grid = F.interpolate(grid, size=(d, h, w), mode="trilinear", align_corners=False)
    return grid


def rotary_angles(
    grid_size: tuple[int, int, int],
    head_dim: int,
    scheme: str,
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: torch.device | None = None,
) -> Tensor:
    """Angles by which queries and keys are turned, one per pair of a head's numbers.

    Schemes "index" and "mm": PUMIT's (https://github.com/function2-llx/PUMIT, the formula), which at depth 0 is
    EVA-02's 2D one (https://arxiv.org/abs/2303.11331): y with half of the pairs, x with the other half, base 10000;
    depth adds to both halves with frequencies of its own, base 2333. "normalised": DINOv3's
    (https://arxiv.org/abs/2508.10104), y and x from -1 to 1 over the image, base 100; depth is not seen.

    Args:
        grid_size: tokens along depth, height and width.
        head_dim: width of a head; a multiple of 4.
        scheme: "index", "mm" or "normalised".
        scale: what a step from token to token counts along depth, height and width.
        device: where the table is made; None for the CPU.

    Returns:
        (depth * height * width) x (head_dim / 2), float32.

    Raises:
        ValueError: when head_dim is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need a head_dim that is a multiple of 4, got {head_dim}")
    count = head_dim // 4
    number = torch.arange(count, dtype=torch.float64, device=device)
    coordinates = grid_coordinates(grid_size, device)
    if scheme == "normalised":
        size = torch.tensor(grid_size, dtype=torch.float64, device=device)
        coordinates = (coordinates + 0.5) / size * 2 - 1
        frequency = 2 * math.pi * 100.0 ** (-number / count)
        depth = torch.zeros_like(coordinates[:, :1])
    else:
        coordinates = coordinates * torch.tensor(scale, dtype=torch.float64, device=device)
        frequency = 10000.0 ** (-number / count)
        depth = coordinates[:, :1] * 2333.0 ** (-(2 * number + 1) / (2 * count))
    plane = [coordinates[:, 1:2] * frequency + depth, coordinates[:, 2:3] * frequency + depth]
    return torch.cat(plane, dim=1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of numbers, B x heads x N x head_dim, by tables of B (or 1) x 1 x N x (head_dim / 2)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
