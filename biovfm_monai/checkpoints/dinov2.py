"""Weights of DINOv2 (https://arxiv.org/abs/2304.07193), with and without registers, as its authors' code names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai.checkpoints.layout import give_vit, require
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.timm import TIMM_NAMES, from_timm_layout
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["from_dinov2", "to_dinov2"]

_NAMES = TIMM_NAMES | {
    "reg_token": "register_tokens?",
    "blocks.{n}.ls1.gamma": "blocks.{n}.ls1.gamma",
    "blocks.{n}.ls2.gamma": "blocks.{n}.ls2.gamma",
}
_HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}


def from_dinov2(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from DINOv2's backbone or training file (the teacher), and the names of what was left out.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.
        img_size: height and width the network was made for; None for a square.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    left_out = (r"mask_token", r"head\..*", r"dino_head\..*", r"ibot_head\..*")
    named = renamed(tensors, _plain)
    return from_timm_layout("dinov2", named, _NAMES, left_out, num_heads, img_size, _HEADS, global_pool="token")


def _plain(name: str) -> str:
    """Without the chunks of blocks that training files have, and with timm's names of SwiGLU."""
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")


def to_dinov2(encoder: ViT) -> dict[str, Tensor]:
    """An encoder of 2D images with LayerScale as the weights of DINOv2's backbone.

    Raises:
        InputError: when DINOv2 has no place for something.
    """
    require(encoder, "dinov2", spatial_dims=2, class_token=True, rope="none", norm_eps=1e-6, final_norm=True)
    if encoder.arguments["init_values"] is None:
        raise InputError("an encoder without LayerScale (init_values) cannot be written as dinov2. Try timm.")
    require(encoder, "dinov2", pos_antialias=encoder.arguments["reg_tokens"] > 0)
    state = give_vit(encoder, _NAMES, "dinov2", class_position=True)
    if encoder.arguments["swiglu_mlp"]:
        state = renamed(state, lambda name: name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"))
    # The backbone holds a mask token that it does not use without a mask.
    return state | {"mask_token": state["cls_token"].new_zeros(1, encoder.embed_dim)}
