"""Weights of MoCo v3 (https://arxiv.org/abs/2104.02057), as its authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.timm import from_timm_layout
from biovfm_monai.networks import ViT

__all__ = ["from_mocov3"]


def from_mocov3(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from MoCo v3's base encoder, and the names of what was left out (momentum encoder, heads).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for heads of 64 numbers; MoCo v3's own ViT-S has 12.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    named = renamed(tensors, lambda name: name.removeprefix("base_encoder."))
    heads = (r"momentum_encoder\..*", r"predictor\..*", r"head\..*")
    return from_timm_layout("mocov3", named, heads, num_heads, global_pool="token")
