"""Patches and their projection, adaptive to the spacing of slices: PUMIT / SPAD-Nets (section "SAC").

https://github.com/function2-llx/PUMIT describes the rule; the code here is written from its formula. A slice that is
thicker than the pixels are wide gets a shorter token along depth; the kernel is summed over the depth it no longer
sees, which gives exactly what the full kernel would give on the slice repeated.
"""

# No `from __future__ import annotations`: TorchScript cannot read a NamedTuple's postponed ones.

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PatchEmbed", "Patches", "patchify", "predict_patches", "unpatchify"]


def patchify(image: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cut an image into patches.

    Args:
        image: B x C x D x H x W, each of D, H, W a multiple of the patch.
        patch_size: voxels per token along depth, height and width.

    Returns:
        B x (tokens, depth first) x (depth * height * width * C) of the patch.
    """
    b, c, d, h, w = image.shape
    pd, ph, pw = patch_size
    cut = image.reshape(b, c, d // pd, pd, h // ph, ph, w // pw, pw)
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, (d // pd) * (h // ph) * (w // pw), pd * ph * pw * c)


def unpatchify(patches: Tensor, patch_size: tuple[int, int, int], grid_size: tuple[int, int, int]) -> Tensor:
    """Put patches (as from `patchify`) back together into B x C x D x H x W."""
    (pd, ph, pw), (gd, gh, gw) = patch_size, grid_size
    b, c = patches.shape[0], patches.shape[2] // (pd * ph * pw)
    cut = patches.reshape(b, gd, gh, gw, pd, ph, pw, c)
    return cut.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, gd * pd, gh * ph, gw * pw)


class Patches(NamedTuple):
    """An image cut into patches.

    Attributes:
        voxels: B x L x (depth * height * width * C) of a patch, as from `patchify`.
        grid_size: patches along depth, height and width; L in all.
        anisotropy: degree of anisotropy of the image, which sets the depth of a patch.
        spacing: mm along (depth,) height and width; None when it is not known.
    """

    voxels: Tensor
    grid_size: tuple[int, int, int]
    anisotropy: int
    spacing: list[float] | None


class PatchEmbed(nn.Module):
    """Linear projection of patches whose kernel is summed along depth when slices are thick.

    Args:
        in_channels: channels of the image.
        patch_size: voxels per token along depth, height and width of an isotropic volume; a 2D encoder has depth 1.
        embed_dim: width of a token.
    """

    def __init__(self, in_channels: int, patch_size: tuple[int, int, int], embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.weight = nn.Parameter(torch.empty(embed_dim, math.prod(patch_size) * in_channels))
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        nn.init.xavier_uniform_(self.weight)

    def stride(self, anisotropy: int) -> tuple[int, int, int]:
        """Voxels per token along depth, height and width at a degree of anisotropy (0 isotropic to 5, a 2D image)."""
        return (max(self.patch_size[0] >> anisotropy, 1), self.patch_size[1], self.patch_size[2])

    def forward(self, patches: Tensor, anisotropy: int = 0) -> Tensor:
        """Project patches of size `stride(anisotropy)`: B x L x voxels to B x L x embed_dim."""
        depth = self.stride(anisotropy)[0]
        weight = self.weight
        if depth != self.patch_size[0]:
            weight = weight.unflatten(1, (depth, self.patch_size[0] // depth, -1)).sum(2).flatten(1)
        return F.linear(patches, weight, self.bias)


def predict_patches(tokens: Tensor, head: nn.Linear, depth: int, full_depth: int) -> Tensor:
    """Patches predicted from tokens by a head for full ones, averaged over the voxels that a thick slice stands for.

    Args:
        tokens: B x N x width.
        head: to (full_depth * height * width * C) numbers, in the order of `patchify`.
        depth: slices of the patches to predict, `PatchEmbed.stride(anisotropy)[0]`; divides full_depth.
        full_depth: slices of a patch of an isotropic volume.

    Returns:
        B x N x (depth * height * width * C).
    """
    weight, bias = head.weight, head.bias
    if depth != full_depth:
        weight, bias = (t.unflatten(0, (depth, full_depth // depth, -1)).mean(1).flatten(0, 1) for t in (weight, bias))
    return F.linear(tokens, weight, bias)
