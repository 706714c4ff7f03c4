"""Weights of EVA-02's ViTs (https://arxiv.org/abs/2303.11331), as its authors' code and timm name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from biovfm_monai.checkpoints.layout import build, give_vit, require, take_vit
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.weights import Weights
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["from_eva02", "from_eva02_layout", "to_eva02_layout"]

_REST = {
    "patch_embed.{k}": "patch_embed.proj.{k}",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "blocks.{n}.norm1.{k}": "blocks.{n}.norm1.{k}",
    "blocks.{n}.attn.qv_bias": "blocks.{n}.attn.q_bias blocks.{n}.attn.v_bias?",
    "blocks.{n}.attn.proj.{k}": "blocks.{n}.attn.proj.{k}",
    "blocks.{n}.norm2.{k}": "blocks.{n}.norm2.{k}",
    "blocks.{n}.mlp.norm.{k}": "blocks.{n}.mlp.ffn_ln.{k}?",
    "blocks.{n}.mlp.fc2.{k}": "blocks.{n}.mlp.w3.{k}",
    "norm.{k}": "norm.{k}?",
}
_SEPARATE = {
    "blocks.{n}.attn.qkv.weight": " ".join(f"blocks.{{n}}.attn.{part}_proj.weight" for part in "qkv"),
    "blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.w1.{k} blocks.{n}.mlp.w2.{k}",
}
_FUSED = {
    "blocks.{n}.attn.qkv.weight": "blocks.{n}.attn.qkv.weight",
    "blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.w12.{k}",
}
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
# timm's name of a part -> the authors'.
_TIMM = {
    "q_proj.bias": "q_bias", "v_proj.bias": "v_bias", "mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2",
    "mlp.fc1.": "mlp.w12.", "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln",
}  # fmt: skip


def from_eva02(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from EVA-02's weights, and the names of what was left out (rotary tables, mask token, heads).

    Rotary positions count on a grid of 16 x 16 tokens whatever the image's size, as in all published EVA-02 models.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.
        img_size: height and width the network was made for; None for a square.

    Raises:
        InputError: when a tensor is missing or unknown; EVA-02-CLIP's norm inside attention is not known.
    """
    return from_eva02_layout("eva02", tensors, 4, num_heads, img_size, ref_feat_shape=[16, 16])


def from_eva02_layout(
    source: str,
    tensors: Mapping[str, Tensor],
    kernel_axes: int,
    num_heads: int | None,
    img_size: Sequence[int] | None = None,
    **options: Any,
) -> tuple[ViT, list[str]]:
    """An encoder from weights in this layout, for EVA-02 and what was made of it.

    Args:
        source: name of the source, for messages.
        tensors: as from `read_weights`.
        kernel_axes: of the patch kernel, 4 in EVA-02 and 5 in PUMIT.
        num_heads, img_size: as the user gave them.
        **options: of `ViT` that shapes do not tell.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    weights = Weights(renamed(tensors, _official), source)
    weights.drop(r".*rope\.freqs_(cos|sin)", r"mask_token", r"(lm_|mim_)?head\..*", r"fc_norm\..*", r"tokenizer\..*")
    names = _REST | (_SEPARATE if "blocks.0.attn.q_proj.weight" in weights else _FUSED)
    state = take_vit(weights, names, img_size)
    weights.finish()
    if state["kernel"].ndim != kernel_axes:
        other = "pumit" if source == "eva02" else "eva02"
        raise InputError(f"the patch kernel has {state['kernel'].ndim} axes, not {kernel_axes}. It looks like {other}.")
    return build(state, num_heads, _HEADS, rope="index", **options), weights.dropped


def to_eva02_layout(encoder: ViT, layout: str, **arguments: Any) -> dict[str, Tensor]:
    """An encoder in this layout, the way back.

    Raises:
        InputError: when the layout has no place for something, or an argument differs from what networks in it have.
    """
    require(
        encoder, layout, class_token=True, final_norm=True, rope="index", swiglu_mlp=True, k_bias=False, **arguments
    )
    return give_vit(encoder, _REST | _SEPARATE, layout)


def _official(name: str) -> str:
    for timm, official in _TIMM.items():
        name = name.replace(timm, official)
    return name
