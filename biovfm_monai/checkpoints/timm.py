"""Weights in timm's layout (https://github.com/huggingface/pytorch-image-models), which most ViTs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from biovfm_monai.checkpoints.layout import build, give_vit, require, take_vit
from biovfm_monai.checkpoints.weights import Weights
from biovfm_monai.networks import ViT

__all__ = ["TIMM_NAMES", "from_timm", "from_timm_layout", "to_timm"]

TIMM_NAMES = {
    "patch_embed.{k}": "patch_embed.proj.{k}",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "blocks.{n}.norm1.{k}": "blocks.{n}.norm1.{k}",
    "blocks.{n}.attn.qkv.{k}": "blocks.{n}.attn.qkv.{k}?",
    "blocks.{n}.attn.proj.{k}": "blocks.{n}.attn.proj.{k}",
    "blocks.{n}.norm2.{k}": "blocks.{n}.norm2.{k}",
    "blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.fc1.{k}",
    "blocks.{n}.mlp.fc2.{k}": "blocks.{n}.mlp.fc2.{k}",
    "norm.{k}": "norm.{k}",
}
"""What MAE, DINO, DINOv2 and MoCo v3 have in common with timm's ViT."""

_NAMES = TIMM_NAMES | {
    "cls_token": "cls_token?",
    "reg_token": "reg_token?",
    "pos_embed": "pos_embed?",
    "blocks.{n}.attn.q_norm.{k}": "blocks.{n}.attn.q_norm.{k}?",
    "blocks.{n}.attn.k_norm.{k}": "blocks.{n}.attn.k_norm.{k}?",
    "blocks.{n}.ls1.gamma": "blocks.{n}.ls1.gamma?",
    "blocks.{n}.ls2.gamma": "blocks.{n}.ls2.gamma?",
    "norm.{k}": "norm.{k}?",
}
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24}


def from_timm(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from timm's weights, and the names of what was left out (heads).

    A model that was fine-tuned with average pooling has a norm behind the pooling only (fc_norm): its encoder has none.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for timm's models of that width.
        img_size: height and width the network was made for; None for a square.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    pooled = "token" if "cls_token" in tensors and "fc_norm.weight" not in tensors else "avg"
    heads = (r"head\..*", r"fc_norm\..*")
    return from_timm_layout(
        "timm", tensors, _NAMES, heads, num_heads, img_size, _HEADS, class_position=None, global_pool=pooled
    )


def from_timm_layout(
    source: str,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    drop: tuple[str, ...],
    num_heads: int | None,
    img_size: Sequence[int] | None,
    published: Mapping[int, int],
    class_position: bool | None = True,
    **options: Any,
) -> tuple[ViT, list[str]]:
    """An encoder from weights in a layout like this one, for all the sources that have one.

    Args:
        source: name of the source, for messages.
        tensors: as from `read_weights`.
        names: `TIMM_NAMES`, and what the source has besides.
        drop: regular expressions of what an encoder has no use for.
        num_heads, img_size: as the user gave them.
        published: width -> heads of the source's networks.
        class_position: as in `take_vit`.
        **options: of `ViT` that shapes do not tell.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    weights = Weights(tensors, source)
    weights.drop(*drop)
    state = take_vit(weights, names, img_size, class_position)
    weights.finish()
    return build(state, num_heads, published, **options), weights.dropped


def to_timm(encoder: ViT) -> dict[str, Tensor]:
    """An encoder of 2D images as timm's weights, which the code of MAE and DINO reads, too.

    timm's models with registers have no position for the class token, the others have one.

    Raises:
        InputError: when timm's ViT has no place for something.
    """
    require(encoder, "timm", spatial_dims=2, rope="none", norm_eps=1e-6)
    return give_vit(encoder, _NAMES, "timm", class_position=encoder.arguments["reg_tokens"] == 0)
