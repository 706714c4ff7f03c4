"""Which tokens are hidden, and picking tokens by number: uniform random masks as in MAE (https://arxiv.org/abs/2111.06377).

Blocks as in BEiT (https://arxiv.org/abs/2106.08254), SimMIM (https://arxiv.org/abs/2111.09886) and I-JEPA
(https://arxiv.org/abs/2301.08243) are here, too. A mask depends on the image's key alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from biovfm_monai.draws import Use, uniform
from biovfm_monai.errors import InputError
from biovfm_monai.networks.positions import grid_coordinates

__all__ = ["block_mask", "block_size", "context_and_targets", "cube_mask", "random_mask", "take_tokens"]


def random_mask(keys: Tensor, num_tokens: int, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Draw, for each image on its own, which tokens stay visible and which are hidden.

    Args:
        keys: of the images' random numbers, as `uniform` takes them.
        num_tokens: tokens per image, prefix tokens not counted.
        mask_ratio: share that is hidden; at least one token stays visible and at least one is hidden.

    Returns:
        keep (B x visible) and hidden (B x hidden): token numbers, ascending, together every token once.

    Raises:
        InputError: when there are fewer than two tokens or the ratio is not between 0 and 1.
    """
    if num_tokens < 2:
        raise InputError(f"masking needs 2 tokens of an image, there is {num_tokens}. Give larger images.")
    if not 0 < mask_ratio < 1:
        raise InputError(f"mask_ratio {mask_ratio} must be between 0 and 1. Correct it.")
    # 1 - 0.55 is a little less than 0.45, and 500 tokens would lose one of their 225.
    visible = min(max(int(num_tokens * (1 - mask_ratio) + 1e-6), 1), num_tokens - 1)
    order = uniform(keys, num_tokens, Use.MASK).argsort(dim=1)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


def cube_mask(
    keys: Tensor, grid_size: tuple[int, int, int], cube_size: tuple[int, int, int], mask_ratio: float
) -> tuple[Tensor, Tensor]:
    """Hide cubes of a lattice, drawn for each image on its own.

    Args:
        keys: of the images' random numbers, as `uniform` takes them.
        grid_size: tokens along depth, height and width.
        cube_size: tokens of a cube; each divides the grid's.
        mask_ratio: share of cubes that is hidden, as in `random_mask`.

    Returns:
        mask (B x L, True where a token is hidden) and hidden (B x hidden, the numbers of those tokens, ascending).

    Raises:
        InputError: when the cubes do not fill the grid, or it has fewer than two of them.
    """
    lattice = [n // c for n, c in zip(grid_size, cube_size, strict=True)]
    if any(n % c for n, c in zip(grid_size, cube_size, strict=True)) or math.prod(lattice) < 2:
        raise InputError(
            f"a grid of {grid_size} tokens must be two or more blocks of {cube_size}. Give the method a smaller "
            "mask_size, or larger images."
        )
    _, cubes = random_mask(keys, math.prod(lattice), mask_ratio)
    mask = _marked(cubes, math.prod(lattice)).view(-1, *lattice)
    for axis, size in enumerate(cube_size):
        mask = mask.repeat_interleave(size, dim=axis + 1)
    mask = mask.flatten(1)
    hidden = mask.int().argsort(dim=1, descending=True, stable=True)[:, : cubes.shape[1] * math.prod(cube_size)]
    return mask, hidden


def block_mask(
    keys: Tensor, grid_size: tuple[int, int, int], count: int | Tensor, num_blocks: int = 4, max_aspect: float = 10 / 3
) -> Tensor:
    """Hide exactly `count` tokens of each image, in a few boxes that may overlap.

    Boxes of random centre, relative size and proportions grow together until they cover as many tokens. A side that
    would be one token too many is hidden in part, first tokens first.

    Args:
        keys: of the images' random numbers, as `uniform` takes them.
        grid_size: tokens along depth, height and width; a box spans as much of the depth as of the plane.
        count: tokens to hide, 0 to all; one number, or a tensor of one per image on the keys' device.
        num_blocks: boxes per image.
        max_aspect: largest ratio of a box's height to its width, and of its width to its height.

    Returns:
        B x L, True where a token is hidden.

    Raises:
        ValueError: when a single count is more than there are tokens, or negative.
    """
    length = math.prod(grid_size)
    if isinstance(count, int) and not 0 <= count <= length:
        raise ValueError(f"count must be 0 to {length}, the tokens of a grid of {grid_size}, got {count}")
    depth, height, width = grid_size
    drawn = uniform(keys, 5 * num_blocks, Use.BLOCK).double().view(-1, num_blocks, 5, 1)
    z, y, x, size, shape = drawn.unbind(2)
    places, stretch = grid_coordinates(grid_size, keys.device), max_aspect ** (shape - 0.5)
    # From whole slices, so that of a single one no box is far.
    across = (places[:, 0] - (z * depth).floor()).abs() * (math.sqrt(height * width) / depth)
    down, along = (places[:, 1] - y * height + 0.5).abs() / stretch, (places[:, 2] - x * width + 0.5).abs() * stretch
    distance = torch.maximum(torch.maximum(across, down), along) * 4 ** (0.5 - size)
    rank = distance.amin(1).argsort(dim=1, stable=True).argsort(dim=1)
    return rank < (count if isinstance(count, int) else count[:, None])


def block_size(
    grid_size: tuple[int, int, int], scale: float, aspect: float, rounding: Callable[[float], int]
) -> tuple[int, int, int]:
    """Tokens along depth, height and width of a block that is a share of a grid, and spans as much of its depth.

    Args:
        grid_size: tokens along depth, height and width.
        scale: share of all tokens, 0 to 1.
        aspect: height over width.
        rounding: `math.floor` for at most that share (but a token at least), `math.ceil` for at least that share.
    """
    depth = max(round(grid_size[0] * scale ** (1 / 3)), 1)
    area = scale * math.prod(grid_size) / depth
    height = min(max(round(math.sqrt(area * aspect)), math.ceil(area / grid_size[2]), 1), grid_size[1])
    return depth, height, min(max(rounding(area / height), 1), grid_size[2])


def context_and_targets(
    keys: Tensor,
    grid_size: tuple[int, int, int],
    context_size: tuple[int, int, int],
    target_size: tuple[int, int, int],
    num_targets: int,
) -> tuple[Tensor, Tensor]:
    """Place a context block and target blocks, for each image on its own, and take the targets out of the context.

    Targets may overlap, so contexts differ in length. The paper's code cuts all of a batch to the shortest; here all
    are cut to the shortest there can be, of disjoint targets, so that a mask does not depend on other images.

    Args:
        keys: of the images' random numbers, as `uniform` takes them.
        grid_size: tokens along depth, height and width.
        context_size, target_size: of the blocks, as from `block_size`.
        num_targets: target blocks per image.

    Returns:
        Numbers of tokens, ascending: the context's, B x K, and each target's, B x num_targets x T.

    Raises:
        InputError: when no context would be left.
    """
    length, visible = math.prod(grid_size), math.prod(context_size) - num_targets * math.prod(target_size)
    if visible < 1:
        raise InputError(
            f"a grid of {grid_size} tokens is too small for {num_targets} target blocks of {target_size}: they leave "
            "no context. Give larger images, smaller patches, or a smaller target_scale."
        )
    targets = _placed(keys, grid_size, target_size, num_targets, Use.TARGET)
    context = _placed(keys, grid_size, context_size, 1, Use.CONTEXT)
    outside = ~_marked(context.flatten(1), length) | _marked(targets.flatten(1), length)
    order = (uniform(keys, length, Use.ORDER) + outside).argsort(dim=1, stable=True)
    return order[:, :visible].sort(dim=1).values, targets


def _placed(keys: Tensor, grid_size: tuple[int, int, int], size: tuple[int, int, int], count: int, use: Use) -> Tensor:
    """Tokens of `count` blocks per image, each anywhere inside the grid: B x count x tokens of a block, ascending."""
    drawn = uniform(keys, 3 * count, use).view(-1, count, 3, 1).unbind(2)
    places = grid_coordinates(size, keys.device).long().unbind(1)
    z, y, x = (
        (number * (total - side + 1)).long() + place
        for number, place, total, side in zip(drawn, places, grid_size, size, strict=True)
    )
    return (z * grid_size[1] + y) * grid_size[2] + x


def _marked(index: Tensor, length: int) -> Tensor:
    """Which tokens are named: B x N numbers to B x length bool."""
    return torch.zeros(index.shape[0], length, dtype=torch.bool, device=index.device).scatter_(1, index, True)


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by number: B x L x C and B x K to B x K x C."""
    b, length = tokens.shape[:2]
    rows = index + length * torch.arange(b, device=index.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (b, -1))
