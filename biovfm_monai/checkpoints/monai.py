"""Weights of MONAI's `ViT`, `MaskedAutoEncoderViT` and the encoder of `UNETR` (https://monai.readthedocs.io/en/stable/networks.html)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from biovfm_monai.checkpoints.layout import Layout, require
from biovfm_monai.networks import ViT

__all__ = ["from_monai", "to_monai"]


def _plain(name: str) -> str:
    """Without UNETR's prefix; and the final norm, which `MaskedAutoEncoderViT` has as its last block."""
    return re.sub(r"^blocks\.\d+\.(weight|bias)$", r"norm.\1", name.removeprefix("vit."))


_LAYOUT = Layout(
    "monai",
    {
        "patch_embed.{k}": "patch_embedding.patch_embeddings.{k}",
        "cls_token": "cls_token?",
        "pos_embed": "patch_embedding.position_embeddings",
        "blocks.{n}.norm1.{k}": "blocks.{n}.norm1.{k}",
        "blocks.{n}.attn.qkv.{k}": "blocks.{n}.attn.qkv.{k}?",
        "blocks.{n}.attn.proj.{k}": "blocks.{n}.attn.out_proj.{k}",
        "blocks.{n}.norm2.{k}": "blocks.{n}.norm2.{k}",
        "blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.linear1.{k}",
        "blocks.{n}.mlp.fc2.{k}": "blocks.{n}.mlp.linear2.{k}",
        "norm.{k}": "norm.{k}",
    },
    published={768: 12},
    left_out=(
        r".*\.norm_cross_attn\..*", r".*\.cross_attn\..*", r"classification_head\..*", r"decoder.*", r"mask_tokens?",
    ),
    rename=_plain,
    class_position=False,
    options={"norm_eps": 1e-5},
)  # fmt: skip


def from_monai(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """As `Layout.read`; MONAI's axes become depth, height and width in their order.

    A network with proj_type "conv" is expected, which is MONAI's default.
    """
    unetr = any(name.startswith("vit.") for name in tensors)
    rest = (r"encoder\d+\..*", r"out\..*") if unetr else ()
    return replace(_LAYOUT, left_out=_LAYOUT.left_out + rest).read(tensors, num_heads, img_size)


def to_monai(encoder: ViT) -> dict[str, Tensor]:
    """An encoder as weights of MONAI's `ViT`: of classification=True when it has a class token, without the head's.

    MONAI's norms add 1e-5 to the variance, whatever the encoder's norm_eps was.

    Raises:
        InputError: when MONAI's ViT has no place for something.
    """
    require(encoder, "monai", reg_tokens=0, rope="none", swiglu_mlp=False, qk_norm=False)
    return _LAYOUT.write(encoder)
