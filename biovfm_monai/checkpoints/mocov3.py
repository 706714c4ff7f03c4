"""Weights of MoCo v3 (https://arxiv.org/abs/2104.02057), as its authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.timm import TIMM_NAMES, from_timm_layout
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["from_mocov3"]

_HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}


def from_mocov3(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from MoCo v3's base encoder, and the names of what was left out (momentum encoder, heads).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.
        img_size: height and width the network was made for; None for a square.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    if not any(name.startswith("base_encoder.") for name in tensors):
        raise InputError("no base_encoder in the checkpoint, so it is not of the layout 'mocov3'. Try timm.")
    named = renamed(tensors, lambda name: name.removeprefix("base_encoder."))
    left_out = (r"momentum_encoder\..*", r"predictor\..*", r"head\..*")
    return from_timm_layout("mocov3", named, TIMM_NAMES, left_out, num_heads, img_size, _HEADS, global_pool="token")
