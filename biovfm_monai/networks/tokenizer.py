"""SPAD's visual tokenizer and patch discriminator, from the formulas of PUMIT: https://github.com/function2-llx/PUMIT.

Each position of an image's latent grid is told by a distribution over the codes of a codebook, a soft token; what is
decoded is the mean of the codes under it. All convolutions adapt to the degree of anisotropy, so that the grid is
(nearly) isotropic for thick slices, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.anisotropy import anisotropy_of, spacing_of
from biovfm_monai.errors import InputError, require_within
from biovfm_monai.networks.adaptive import (
    AdaptiveConv3d,
    AdaptiveConvBlock,
    AdaptiveConvTranspose3d,
    halved,
    pending,
)

__all__ = ["PatchDiscriminator", "SoftTokenizer"]


class SoftTokenizer(nn.Module):
    """Image to soft tokens and back, for 2D images, isotropic and thick-slice volumes with one set of weights.

    Args:
        in_channels: channels of the image.
        widths: of the feature map after each narrowing; the last is that of a code.
        strides: of each narrowing, powers of two; their product is the size of a token in voxels.
        num_codes: in the codebook, at least 2.
        norm_groups: of the group norms; divides every width.

    Attributes:
        stride: voxels per token along each axis of an isotropic volume.
        origin: what messages call it, such as the file that it comes from.

    Raises:
        InputError: on other values.
    """

    origin: str = "the tokenizer"

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = (128, 256, 512),
        strides: Sequence[int] = (4, 2, 2),
        num_codes: int = 1024,
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        _check(widths, strides, num_codes, norm_groups)
        self.arguments = {
            "in_channels": in_channels, "widths": list(widths), "strides": list(strides), "num_codes": num_codes,
            "norm_groups": norm_groups,
        }  # fmt: skip
        self.in_channels, self.num_codes, self.stride = in_channels, num_codes, math.prod(strides)
        self.strides = tuple(strides)
        width, pairs = widths[-1], pairwise([in_channels, *widths])
        steps = [(*pair, stride) for pair, stride in zip(pairs, strides, strict=True)]
        self.narrow = nn.ModuleList(AdaptiveConv3d(before, after, s, s) for before, after, s in steps)
        self.norms = nn.ModuleList(nn.LayerNorm(after) for after in widths)
        self.encoder_blocks = nn.ModuleList(AdaptiveConvBlock(width, width, norm_groups) for _ in range(2))
        self.logits = nn.Linear(width, num_codes)
        self.codebook = nn.Parameter(torch.empty(num_codes, width).uniform_(-1 / num_codes, 1 / num_codes))
        self.decoder_blocks = nn.ModuleList(AdaptiveConvBlock(width, width, norm_groups) for _ in range(2))
        self.widen = nn.ModuleList(AdaptiveConvTranspose3d(after, before, s) for before, after, s in reversed(steps))
        self.refine = nn.ModuleList(
            AdaptiveConvBlock(before, before, norm_groups) for before, *_ in reversed(steps[1:])
        )

    def forward(self, image: Tensor, anisotropy: int | None = None) -> Tensor:
        """Logits of the codes at each position, B x num_codes x grid; image and anisotropy as in `prepare`."""
        x, degree = self.prepare(image, anisotropy)
        halvings = 0
        for convolution, norm, stride in zip(self.narrow, self.norms, self.strides, strict=True):
            x = convolution(x, pending(degree, halvings))
            x = F.gelu(norm(x.movedim(1, -1))).movedim(-1, 1)
            halvings += _log2(stride)
        for block in self.encoder_blocks:
            x = block(x, pending(degree, halvings))
        return self.logits(x.movedim(1, -1)).movedim(-1, 1)

    def decode(self, probabilities: Tensor, anisotropy: int) -> Tensor:
        """Image of soft tokens: B x num_codes x grid, the softmax of logits, to B x C x D x H x W."""
        x = F.linear(probabilities.movedim(1, -1), self.codebook.t()).movedim(-1, 1)
        halvings = _log2(self.stride)
        for block in self.decoder_blocks:
            x = block(x, pending(anisotropy, halvings))
        for widening, stride, block in zip(self.widen, reversed(self.strides), [*self.refine, None], strict=True):
            x = widening(x, halved(anisotropy, halvings))
            halvings -= _log2(stride)
            x = x if block is None else block(x, pending(anisotropy, halvings))
        return x

    def prepare(self, image: Tensor, anisotropy: int | None = None) -> tuple[Tensor, int]:
        """Check an image, and make it a volume.

        Args:
            image: B x C x H x W (read as depth 1) or B x C x D x H x W, float.
            anisotropy: degree of anisotropy, 0 to 5; None for 5 of a 4-dimensional image, and of a volume for what its
                affine says, if it is a MetaTensor, else 0.

        Returns:
            B x C x D x H x W, and its degree.

        Raises:
            InputError: on a wrong number of axes or channels, another degree, or a size that is no multiple of a token.
        """
        spacing = spacing_of(image) if anisotropy is None and image.ndim == 5 else None
        if isinstance(image, MetaTensor):
            image = image.as_tensor()
        if anisotropy is None:
            anisotropy = 5 if image.ndim == 4 else 0 if spacing is None else anisotropy_of(spacing)
        degree = anisotropy
        if image.ndim == 4:
            image = image.unsqueeze(2)
        if image.ndim != 5 or image.shape[1] != self.in_channels or not image.is_floating_point():
            raise InputError(
                f"the tokenizer takes {self.in_channels} channel(s) and 4 or 5 axes of floating-point numbers, got "
                f"{image.dtype} of shape {list(image.shape)}. Give it such images, or build it with other in_channels."
            )
        if not 0 <= degree <= 5:
            raise InputError(f"anisotropy must be 0 (isotropic) to 5 (a 2D image), got {degree}. Correct it.")
        token = (max(self.stride >> degree, 1), self.stride, self.stride)
        if any(n % t for n, t in zip(image.shape[2:], token, strict=True)):
            raise InputError(
                f"image size {list(image.shape[2:])} must be a multiple of the token {token} at degree of anisotropy "
                f"{degree}. Crop or pad the image, or correct its degree."
            )
        return image, degree


class PatchDiscriminator(nn.Module):
    """Tell real patches from decoded ones (https://arxiv.org/abs/1611.07004), adaptive to the spacing of slices.

    Args:
        in_channels: channels of the image.
        widths: after each of the halvings; one more convolution keeps the last.
        norm_groups: of the group norms; divides every width.
    """

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (128, 256, 512), norm_groups: int = 16) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(
            AdaptiveConvBlock(before, after, norm_groups, stride=2)
            for before, after in pairwise([in_channels, *widths])
        )
        self.block = AdaptiveConvBlock(widths[-1], widths[-1], norm_groups)
        self.head = AdaptiveConv3d(widths[-1], 1, 3)

    def forward(self, image: Tensor, anisotropy: int) -> Tensor:
        """Map B x C x D x H x W to logits of being real, B x 1 x grid."""
        x = image
        for halvings, block in enumerate(self.narrow):
            x = block(x, pending(anisotropy, halvings))
        left = pending(anisotropy, len(self.narrow))
        return self.head(self.block(x, left), left)


def _log2(stride: int) -> int:
    return stride.bit_length() - 1


def _check(widths: Sequence[int], strides: Sequence[int], num_codes: int, norm_groups: int) -> None:
    if not widths or len(widths) != len(strides) or any(s < 2 or s & (s - 1) for s in strides):
        raise InputError(f"strides {list(strides)} must be powers of two, one for each of widths {list(widths)}.")
    if num_codes < 2:
        raise InputError(f"num_codes must be at least 2, got {num_codes}. Correct it.")
    require_within(1, whole=True, norm_groups=norm_groups)
    if any(width % norm_groups for width in widths):
        raise InputError(f"norm_groups {norm_groups} must divide every one of widths {list(widths)}. Correct them.")
