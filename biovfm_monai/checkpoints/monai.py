"""Weights of MONAI's `ViT`, `MaskedAutoEncoderViT` and the encoder of `UNETR` (https://monai.readthedocs.io/en/stable/networks.html)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai.checkpoints.conversion import Weights, build, take_vit
from biovfm_monai.networks import ViT

__all__ = ["from_monai"]

_NAMES = {
    "patch_embed.weight": "patch_embedding.patch_embeddings.weight",
    "patch_embed.bias": "patch_embedding.patch_embeddings.bias",
    "cls_token": "cls_token?",
    "pos_embed": "patch_embedding.position_embeddings",
    "blocks.{n}.attn.qkv.weight": "blocks.{n}.attn.qkv.weight",
    "blocks.{n}.attn.qkv.bias": "blocks.{n}.attn.qkv.bias?",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in {
            "blocks.{n}.norm1": "blocks.{n}.norm1",
            "blocks.{n}.attn.proj": "blocks.{n}.attn.out_proj",
            "blocks.{n}.norm2": "blocks.{n}.norm2",
            "blocks.{n}.mlp.fc1": "blocks.{n}.mlp.linear1",
            "blocks.{n}.mlp.fc2": "blocks.{n}.mlp.linear2",
            "norm": "norm",
        }.items()
        for kind in ("weight", "bias")
    },
}


def from_monai(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from weights of a MONAI network, and the names of what was left out (decoders, unused norms).

    MONAI's axes become depth, height and width in their order. MONAI adds no position to the class token, and a
    network with proj_type "conv" is expected, which is MONAI's default.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for heads of 64 numbers.
        img_size: the network was made for; None for a square or cube.

    Raises:
        InputError: when a tensor is missing or unknown, or the positions fit no such grid.
    """
    inner = any(name.startswith("vit.") for name in tensors)
    weights = Weights({_plain(name): tensor for name, tensor in tensors.items()}, "monai")
    weights.drop(
        r".*\.norm_cross_attn\..*", r".*\.cross_attn\..*", r"classification_head\..*", r"decoder.*", r"mask_tokens?"
    )
    weights.drop(*([r"encoder\d+\..*", r"out\..*"] if inner else []))
    state = take_vit(weights, _NAMES, img_size)
    weights.finish()
    return build(state, num_heads, norm_eps=1e-5), weights.dropped


def _plain(name: str) -> str:
    """UNETR's prefix, and the final norm that `MaskedAutoEncoderViT` has as its last block."""
    return re.sub(r"^blocks\.\d+\.(weight|bias)$", r"norm.\1", name.removeprefix("vit."))
