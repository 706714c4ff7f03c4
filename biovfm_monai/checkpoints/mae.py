"""Weights of masked autoencoders (https://arxiv.org/abs/2111.06377), as their authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.checkpoints.timm import from_timm_layout
from biovfm_monai.networks import ViT

__all__ = ["from_mae"]


def from_mae(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from weights of a masked autoencoder, and the names of what was left out (decoder, mask token).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    return from_timm_layout("mae", tensors, (r"decoder_.*", r"mask_token", r"head\..*"), num_heads)
