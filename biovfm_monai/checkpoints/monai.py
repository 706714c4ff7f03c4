"""Weights of MONAI's `ViT`, `MaskedAutoEncoderViT` and the encoder of `UNETR` (https://monai.readthedocs.io/en/stable/networks.html)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai.checkpoints.layout import build, give_vit, require, take_vit
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.weights import Weights
from biovfm_monai.networks import ViT

__all__ = ["from_monai", "to_monai"]

_NAMES = {
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
}


def from_monai(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from weights of a MONAI network, and the names of what was left out (decoders, unused norms).

    MONAI's axes become depth, height and width in their order. MONAI adds no position to the class token, and a
    network with proj_type "conv" is expected, which is MONAI's default.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for 12 at a width of 768, which is MONAI's default.
        img_size: the network was made for; None for a square or cube.

    Raises:
        InputError: when a tensor is missing or unknown, or the positions fit no such grid.
    """
    inner = any(name.startswith("vit.") for name in tensors)
    weights = Weights(renamed(tensors, _plain), "monai")
    weights.drop(
        r".*\.norm_cross_attn\..*", r".*\.cross_attn\..*", r"classification_head\..*", r"decoder.*", r"mask_tokens?"
    )
    weights.drop(*([r"encoder\d+\..*", r"out\..*"] if inner else []))
    state = take_vit(weights, _NAMES, img_size, class_position=False)
    weights.finish()
    return build(state, num_heads, {768: 12}, norm_eps=1e-5), weights.dropped


def _plain(name: str) -> str:
    """UNETR's prefix, and the final norm that `MaskedAutoEncoderViT` has as its last block."""
    return re.sub(r"^blocks\.\d+\.(weight|bias)$", r"norm.\1", name.removeprefix("vit."))


def to_monai(encoder: ViT) -> dict[str, Tensor]:
    """An encoder as weights of MONAI's `ViT`: of classification=True when it has a class token, without the head's.

    MONAI's norms add 1e-5 to the variance, whatever the encoder's norm_eps was.

    Raises:
        InputError: when MONAI's ViT has no place for something.
    """
    require(encoder, "monai", reg_tokens=0, rope="none", swiglu_mlp=False, qk_norm=False, final_norm=True)
    return give_vit(encoder, _NAMES, "monai")
