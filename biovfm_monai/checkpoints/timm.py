"""Weights in timm's layout (https://github.com/huggingface/pytorch-image-models), which most ViTs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from biovfm_monai.checkpoints.layout import Weights, build, give_vit, require, take_vit
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.networks import ViT

__all__ = ["from_timm", "from_timm_layout", "to_timm"]

_NAMES = {
    "patch_embed.{k}": "patch_embed.proj.{k}",
    "cls_token": "cls_token?",
    "reg_token": "register_tokens?",
    "pos_embed": "pos_embed?",
    "blocks.{n}.norm1.{k}": "blocks.{n}.norm1.{k}",
    "blocks.{n}.attn.qkv.{k}": "blocks.{n}.attn.qkv.{k}?",
    "blocks.{n}.attn.q_norm.{k}": "blocks.{n}.attn.q_norm.{k}?",
    "blocks.{n}.attn.k_norm.{k}": "blocks.{n}.attn.k_norm.{k}?",
    "blocks.{n}.attn.proj.{k}": "blocks.{n}.attn.proj.{k}",
    "blocks.{n}.ls1.gamma": "blocks.{n}.ls1.gamma?",
    "blocks.{n}.norm2.{k}": "blocks.{n}.norm2.{k}",
    "blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.fc1.{k}",
    "blocks.{n}.mlp.fc2.{k}": "blocks.{n}.mlp.fc2.{k}",
    "blocks.{n}.ls2.gamma": "blocks.{n}.ls2.gamma?",
    "norm.{k}": "norm.{k}?",
}


def from_timm(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from timm's weights, and the names of what was left out (heads).

    A model that was fine-tuned with average pooling has a norm behind the pooling only (fc_norm): its encoder has none.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for heads of 64 numbers.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    return from_timm_layout("timm", tensors, (r"head\..*", r"fc_norm\..*"), num_heads)


def from_timm_layout(
    source: str, tensors: Mapping[str, Tensor], drop: tuple[str, ...], num_heads: int | None, **options: Any
) -> tuple[ViT, list[str]]:
    """An encoder from weights in this layout, for all the sources that share it.

    Args:
        source: name of the source, for messages.
        tensors: as from `read_weights`.
        drop: regular expressions of what an encoder has no use for.
        num_heads: None for heads of 64 numbers.
        **options: of `ViT` that shapes do not tell.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    weights = Weights(renamed(tensors, lambda name: name.replace("reg_token", "register_tokens")), source)
    weights.drop(*drop)
    state = take_vit(weights, _NAMES)
    weights.finish()
    return build(state, num_heads, **options), weights.dropped


def to_timm(encoder: ViT) -> dict[str, Tensor]:
    """An encoder of 2D images in this layout, which the code of MAE, DINO and DINOv2 reads, too.

    Raises:
        InputError: when the layout has no place for something.
    """
    require(encoder, "timm", spatial_dims=2, rope="none", scale_mlp=False)
    return give_vit(encoder, _NAMES, "timm", class_position=True)
