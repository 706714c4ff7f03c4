"""Decoders of token maps to feature maps of an image's resolution, for 2D images, thin and thick slices alike.

All their convolutions adapt to the degree of anisotropy as the encoder's patches do, by the rule of PUMIT / SPAD-Nets
(https://github.com/function2-llx/PUMIT), which MONAI's blocks of fixed strides cannot.
"""

# No `from __future__ import annotations`: TorchScript cannot read attributes' postponed ones.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.errors import InputError
from biovfm_monai.networks.adaptive import AdaptiveConvBlock, AdaptiveConvTranspose3d, pending
from biovfm_monai.networks.vit import ViT

__all__ = ["Decoder", "LightDecoder", "LinearDecoder", "UNETRDecoder"]

_GROUPS = 8


class Decoder(nn.Module):
    """What makes feature maps of an encoder's tokens.

    Its `forward(maps, image, anisotropy)` takes the outputs of the tapped blocks, B x embed_dim x grid, the image,
    B x C x D x H x W, and its degree of anisotropy, and gives maps at rising resolutions.

    Attributes:
        taps: numbers of the encoder's blocks that it reads, ascending.
        widths: channels of its maps.
    """

    taps: list[int]
    widths: list[int]


class LinearDecoder(Decoder):
    """The last block's tokens as they are, so that the head is a linear classifier of them, as in DINOv2's evaluation.

    Its logits are interpolated to the image's size; it takes patches of any size.

    Args:
        encoder: whose tokens are read.
    """

    def __init__(self, encoder: ViT) -> None:
        super().__init__()
        self.taps, self.widths = [len(encoder.blocks) - 1], [encoder.embed_dim]

    def forward(self, maps: list[Tensor], image: Tensor, anisotropy: int) -> list[Tensor]:  # noqa: ARG002
        """The last map."""
        return maps[-1:]


class LightDecoder(Decoder):
    """Tokens widened by one transposed convolution per doubling, as in Primus (https://arxiv.org/abs/2503.01835).

    Widths fall geometrically from the encoder's to the last; group norm and GELU follow each.

    Args:
        encoder: whose last block's tokens are read; its patch is as high as wide, a power of two.
        last_width: channels at the image's own resolution, a multiple of 8.

    Raises:
        InputError: on another patch or width.
    """

    def __init__(self, encoder: ViT, last_width: int = 8) -> None:
        super().__init__()
        _check_width(last_width=last_width)
        steps, first = _doublings(encoder), encoder.embed_dim
        fall = (last_width / first) ** (1 / steps)
        inner = [max(_GROUPS * round(first * fall**number / _GROUPS), _GROUPS) for number in range(1, steps)]
        self.taps, self.widths = [len(encoder.blocks) - 1], [*inner, last_width]
        before = [first, *inner]
        self.ups = nn.ModuleList(AdaptiveConvTranspose3d(a, b, 2) for a, b in zip(before, self.widths, strict=True))
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for width in self.widths)

    def forward(self, maps: list[Tensor], image: Tensor, anisotropy: int) -> list[Tensor]:  # noqa: ARG002
        """Maps of 2, 4, ... times the resolution of the last one's grid."""
        x, found = maps[-1], [maps[-1]]
        depth_halvings = _log2(image.shape[2] // x.shape[2])
        for up, norm in zip(self.ups, self.norms):  # noqa: B905 - TorchScript knows no strict
            x = F.gelu(norm(up(x, depth_halvings)))
            depth_halvings = max(depth_halvings - 1, 0)
            found.append(x)
        return found[1:]


class UNETRDecoder(Decoder):
    """A U-Net's decoder whose skips are the image and the tokens after blocks in between: UNETR (https://arxiv.org/abs/2103.10504).

    There is one tap per doubling, so patches of 16 have UNETR's four. Norms are of groups, since images may be small.

    Args:
        encoder: its patch is as high as wide, a power of two; has a block per doubling or more.
        width: channels at the image's own resolution, a multiple of 8; twice as many at half of it, and so on.

    Raises:
        InputError: on another patch or width, or too few blocks.
    """

    def __init__(self, encoder: ViT, width: int = 16) -> None:
        super().__init__()
        steps, depth = _doublings(encoder), len(encoder.blocks)
        _check_width(width=width)
        if depth < steps:
            raise InputError(
                f"an encoder of {depth} block(s) has too few for the {steps} taps of its patch {encoder.patch_size}. "
                "Take LightDecoder, or a deeper encoder."
            )
        self.taps = [round(depth * (number + 1) / steps) - 1 for number in range(steps)]
        self.widths = [width << level for level in reversed(range(steps))]
        before = [encoder.embed_dim, *self.widths]
        self.ups = nn.ModuleList(AdaptiveConvTranspose3d(before[n], self.widths[n], 2) for n in range(steps))
        self.skips = nn.ModuleList(_TokenSkip(encoder.embed_dim, self.widths[n], n + 1) for n in range(steps - 1))
        self.image_skip = _ConvPair(encoder.in_channels, width)
        self.merges = nn.ModuleList(_ConvPair(2 * each, each) for each in self.widths)

    def forward(self, maps: list[Tensor], image: Tensor, anisotropy: int) -> list[Tensor]:
        """Maps of 2, 4, ... times the resolution of the grid, up to the image's."""
        first = _log2(image.shape[2] // maps[-1].shape[2])
        beside: list[Tensor] = []
        for number, skip in enumerate(self.skips):
            beside.append(skip(maps[len(maps) - 2 - number], first))
        beside.append(self.image_skip(image, pending(anisotropy, 0)))
        x, found = maps[-1], [maps[-1]]
        for number, (up, merge) in enumerate(zip(self.ups, self.merges)):  # noqa: B905 - TorchScript knows no strict
            x = torch.cat([up(x, max(first - number, 0)), beside[number]], dim=1)
            x = merge(x, pending(anisotropy, len(self.widths) - 1 - number))
            found.append(x)
        return found[1:]


class _TokenSkip(nn.Module):
    """Tokens doubled in resolution several times, down to one width."""

    def __init__(self, embed_dim: int, width: int, doublings: int) -> None:
        super().__init__()
        before = [embed_dim, *[width] * (doublings - 1)]
        self.ups = nn.ModuleList(AdaptiveConvTranspose3d(each, width, 2) for each in before)
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for _ in before)

    def forward(self, x: Tensor, depth_halvings: int) -> Tensor:
        for up, norm in zip(self.ups, self.norms):  # noqa: B905 - TorchScript knows no strict
            x = F.leaky_relu(norm(up(x, depth_halvings)))
            depth_halvings = max(depth_halvings - 1, 0)
        return x


class _ConvPair(nn.Module):
    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.first = AdaptiveConvBlock(in_channels, width, _GROUPS)
        self.second = AdaptiveConvBlock(width, width, _GROUPS)

    def forward(self, x: Tensor, pending: int) -> Tensor:
        return self.second(self.first(x, pending), pending)


def _check_width(**given: int) -> None:
    for name, width in given.items():
        if not isinstance(width, int) or width < 1 or width % _GROUPS:
            raise InputError(f"{name} {width!r} must be a multiple of {_GROUPS}. Correct it.")


def _doublings(encoder: ViT) -> int:
    """How often a token's height doubles to reach a patch.

    Raises:
        InputError: when patches are no squares of a power of two, or depth is none, or deeper than high.
    """
    depth, height, width = encoder.patch_embed.patch_size
    if height != width or height < 2 or height & (height - 1) or depth & (depth - 1) or depth > height:
        raise InputError(
            f"a decoder that doubles tokens needs patches as high as wide, a power of two, and no deeper; they are "
            f"{encoder.patch_size}. Take LinearDecoder."
        )
    return _log2(height)


def _log2(number: int) -> int:
    count = 0
    while number > 1:
        number, count = number // 2, count + 1
    return count
