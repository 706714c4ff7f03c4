"""Weights in timm's layout (https://github.com/huggingface/pytorch-image-models), which most ViTs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from biovfm_monai.checkpoints.layout import Layout, require
from biovfm_monai.networks import ViT

__all__ = ["TIMM_NAMES", "from_timm", "to_timm"]

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

_LAYOUT = Layout(
    "timm",
    TIMM_NAMES
    | {
        "cls_token": "cls_token?",
        "reg_token": "reg_token?",
        "pos_embed": "pos_embed?",
        "blocks.{n}.attn.q_norm.{k}": "blocks.{n}.attn.q_norm.{k}?",
        "blocks.{n}.attn.k_norm.{k}": "blocks.{n}.attn.k_norm.{k}?",
        "blocks.{n}.ls1.gamma": "blocks.{n}.ls1.gamma?",
        "blocks.{n}.ls2.gamma": "blocks.{n}.ls2.gamma?",
        "norm.{k}": "norm.{k}?",
    },
    published={192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24},
    left_out=(r"head\..*", r"fc_norm\..*"),
    class_position=None,
)


def from_timm(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """As `Layout.read`.

    A model that was fine-tuned with average pooling has a norm behind the pooling only (fc_norm): its encoder has none.
    """
    pooled = "token" if "cls_token" in tensors and "fc_norm.weight" not in tensors else "avg"
    return replace(_LAYOUT, options={"global_pool": pooled}).read(tensors, num_heads, img_size)


def to_timm(encoder: ViT) -> dict[str, Tensor]:
    """An encoder of 2D images as timm's weights, which the code of MAE and DINO reads, too.

    timm's models with registers have no position for the class token, the others have one.

    Raises:
        InputError: when timm's ViT has no place for something.
    """
    require(encoder, "timm", spatial_dims=2, rope="none", norm_eps=1e-6)
    return replace(_LAYOUT, class_position=encoder.arguments["reg_tokens"] == 0).write(encoder)
