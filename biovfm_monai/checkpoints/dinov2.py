"""Weights of DINOv2 (https://arxiv.org/abs/2304.07193), with and without registers, as its authors' code names them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.timm import from_timm_layout
from biovfm_monai.networks import ViT

__all__ = ["from_dinov2"]


def from_dinov2(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from DINOv2's backbone or training file (the teacher), and the names of what was left out.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    heads = (r"mask_token", r"head\..*", r"dino_head\..*", r"ibot_head\..*")
    return from_timm_layout("dinov2", renamed(tensors, _plain), heads, num_heads, global_pool="token")


def _plain(name: str) -> str:
    """Without the chunks of blocks that training files have, and with timm's names of SwiGLU."""
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")
