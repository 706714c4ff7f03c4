"""Weights of DINO (https://arxiv.org/abs/2104.14294), as its authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai.checkpoints.timm import TIMM_NAMES, from_timm_layout
from biovfm_monai.networks import ViT

__all__ = ["from_dino"]

_HEADS = {192: 3, 384: 6, 768: 12}


def from_dino(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from DINO's backbone or training file (the teacher), and the names of what was left out (its head).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.
        img_size: height and width the network was made for; None for a square.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    left_out = (r"head\..*",)
    return from_timm_layout("dino", tensors, TIMM_NAMES, left_out, num_heads, img_size, _HEADS, global_pool="token")
