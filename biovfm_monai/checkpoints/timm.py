"""Weights in timm's layout (https://github.com/huggingface/pytorch-image-models), which most ViTs share.

MAE, DINO, DINOv2 with and without registers, MoCo v3 and BioVFM's both families are written in it, wrapped in sections
and prefixes of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.checkpoints.conversion import Weights, build, take_vit
from biovfm_monai.networks import ViT

__all__ = ["from_timm"]

_NAMES = {
    "patch_embed.weight": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
    "cls_token": "cls_token?",
    "reg_token": "register_tokens?",
    "pos_embed": "pos_embed?",
    "blocks.{n}.attn.qkv.weight": "blocks.{n}.attn.qkv.weight",
    "blocks.{n}.attn.qkv.bias": "blocks.{n}.attn.qkv.bias?",
    "blocks.{n}.mlp.fc1.weight": "blocks.{n}.mlp.fc1.weight",
    "blocks.{n}.mlp.fc1.bias": "blocks.{n}.mlp.fc1.bias",
    "blocks.{n}.mlp.fc2.weight": "blocks.{n}.mlp.fc2.weight",
    "blocks.{n}.mlp.fc2.bias": "blocks.{n}.mlp.fc2.bias",
    "blocks.{n}.ls1.gamma": "blocks.{n}.ls1.gamma?",
    "blocks.{n}.ls2.gamma": "blocks.{n}.ls2.gamma?",
    **{
        f"{name}.{kind}": f"{name}.{kind}"
        for name in ("blocks.{n}.norm1", "blocks.{n}.attn.proj", "blocks.{n}.norm2", "norm")
        for kind in ("weight", "bias")
    },
}
_HEADS = (
    r"mask_token", r"head\..*", r"fc_norm\..*", r"dino_head\..*", r"ibot_head\..*", r"decoder_.*", r"predictor\..*",
    r"momentum_encoder\..*",
)  # fmt: skip


def from_timm(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from weights in timm's layout, and the names of what was left out (heads, decoders, mask tokens).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for heads of 64 numbers.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    weights = Weights({_plain(name): tensor for name, tensor in tensors.items()}, "timm")
    weights.drop(*_HEADS)
    state = take_vit(weights, _NAMES)
    weights.finish()
    return build(state, num_heads), weights.dropped


def _plain(name: str) -> str:
    """DINOv2's chunks of blocks, its names of SwiGLU, timm's of registers, and MoCo v3's prefix."""
    name = name.removeprefix("base_encoder.").replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name.replace("reg_token", "register_tokens"))
