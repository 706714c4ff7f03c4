"""Weights of DINO (https://arxiv.org/abs/2104.14294), as its authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.checkpoints.timm import from_timm_layout
from biovfm_monai.networks import ViT

__all__ = ["from_dino"]


def from_dino(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from DINO's backbone or training file (the teacher), and the names of what was left out (its head).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    return from_timm_layout("dino", tensors, (r"head\..*",), num_heads, global_pool="token")
