"""Images of different sizes in one pass, without padding (https://arxiv.org/abs/2307.06304)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from biovfm_monai.networks.vit import ViT

__all__ = ["encode_packed", "encode_together"]


def encode_packed(
    encoder: ViT,
    images: Sequence[Tensor],
    anisotropy: Sequence[int | None] | None = None,
    spacing: Sequence[list[float] | None] | None = None,
) -> list[Tensor]:
    """Encode images of different sizes and degrees of anisotropy at once.

    Their tokens lie one after the other, and attend to those of their own image only. On GPUs one kernel does so for
    all in half precision; elsewhere images of one size that stand next to each other share a call, so sorting pays.

    Args:
        encoder: of the images.
        images: each B x C x (D) x H x W; images of one shape may come stacked.
        anisotropy, spacing: one per entry of images, as in `ViT.patchify`.

    Returns:
        One B x (prefix + L) x embed_dim per entry of images.
    """
    parts = []
    for number, image in enumerate(images):
        degree = None if anisotropy is None else anisotropy[number]
        parts.append(encoder.embed(encoder.patchify(image, degree, None if spacing is None else spacing[number])))
    return encode_together(encoder, parts)


def encode_together(encoder: ViT, parts: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """As `encode_packed`, for tokens and their rotary angles as from `ViT.embed`."""
    lengths = [x.shape[1] for x, _ in parts for _ in range(x.shape[0])]
    angles = [turn.expand(x.shape[0], -1, -1).flatten(0, 1) for x, turn in parts if turn is not None]
    packed = torch.cat([x.flatten(0, 1) for x, _ in parts])[None]
    tokens = encoder.encode(packed, torch.cat(angles)[None] if angles else None, lengths)[0][0]
    split = tokens.split([x.shape[0] * x.shape[1] for x, _ in parts])
    return [one.unflatten(0, x.shape[:2]) for one, (x, _) in zip(split, parts, strict=True)]
