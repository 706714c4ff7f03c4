"""Weights of masked autoencoders (https://arxiv.org/abs/2111.06377), as their authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai.checkpoints.timm import TIMM_NAMES, from_timm_layout
from biovfm_monai.networks import ViT

__all__ = ["from_mae"]

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def from_mae(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from weights of a masked autoencoder, and the names of what was left out (decoder, mask token).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.
        img_size: height and width the network was made for; None for a square.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    left_out = (r"decoder_.*", r"mask_token", r"head\..*")
    return from_timm_layout("mae", tensors, TIMM_NAMES, left_out, num_heads, img_size, _HEADS)
