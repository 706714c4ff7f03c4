"""Weights of Hugging Face's ViT, ViTMAE, Dinov2 (with registers) and DINOv3ViT.

https://huggingface.co/docs/transformers; only files are read, the package is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biovfm_monai.checkpoints.conversion import Weights, build, take_vit
from biovfm_monai.networks import ViT

__all__ = ["from_huggingface"]

_TOKENS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens?",
    "pos_embed": "embeddings.position_embeddings?",
}
_QKV = "encoder.layer.{n}.attention.attention"
_VIT = _TOKENS | {
    "patch_embed.{k}": "embeddings.patch_embeddings.projection.{k}",
    "blocks.{n}.attn.qkv.{k}": f"{_QKV}.query.{{k}} {_QKV}.key.{{k}} {_QKV}.value.{{k}}?",
    "blocks.{n}.attn.proj.{k}": "encoder.layer.{n}.attention.output.dense.{k}",
    "norm.{k}": "layernorm.{k}",
}
_CLASSIC = _VIT | {
    "blocks.{n}.norm1.{k}": "encoder.layer.{n}.layernorm_before.{k}",
    "blocks.{n}.norm2.{k}": "encoder.layer.{n}.layernorm_after.{k}",
    "blocks.{n}.mlp.fc1.{k}": "encoder.layer.{n}.intermediate.dense.{k}",
    "blocks.{n}.mlp.fc2.{k}": "encoder.layer.{n}.output.dense.{k}",
}
_DINOV2 = _VIT | {
    "blocks.{n}.norm1.{k}": "encoder.layer.{n}.norm1.{k}",
    "blocks.{n}.norm2.{k}": "encoder.layer.{n}.norm2.{k}",
    "blocks.{n}.mlp.fc1.{k}": "encoder.layer.{n}.mlp.fc1.{k}",
    "blocks.{n}.mlp.fc2.{k}": "encoder.layer.{n}.mlp.fc2.{k}",
    "blocks.{n}.ls1.gamma": "encoder.layer.{n}.layer_scale1.lambda1",
    "blocks.{n}.ls2.gamma": "encoder.layer.{n}.layer_scale2.lambda1",
}
_DINOV3 = _TOKENS | {
    "patch_embed.{k}": "embeddings.patch_embeddings.{k}",
    "blocks.{n}.norm1.{k}": "layer.{n}.norm1.{k}",
    "blocks.{n}.attn.qkv.weight": " ".join(f"layer.{{n}}.attention.{part}_proj.weight" for part in "qkv"),
    "blocks.{n}.attn.qv_bias": "layer.{n}.attention.q_proj.bias layer.{n}.attention.v_proj.bias",
    "blocks.{n}.attn.proj.{k}": "layer.{n}.attention.o_proj.{k}",
    "blocks.{n}.ls1.gamma": "layer.{n}.layer_scale1.lambda1",
    "blocks.{n}.norm2.{k}": "layer.{n}.norm2.{k}",
    "blocks.{n}.mlp.fc2.{k}": "layer.{n}.mlp.down_proj.{k}",
    "blocks.{n}.ls2.gamma": "layer.{n}.layer_scale2.lambda1",
    "norm.{k}": "norm.{k}",
}


def from_huggingface(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, norm_eps: float | None = None
) -> tuple[ViT, list[str]]:
    """An encoder from weights as `save_pretrained` writes them, and the names of what was left out.

    Args:
        tensors: as from `read_weights`.
        num_heads, norm_eps: as the model's config.json says; None for heads of 64 numbers, and for 1e-12 (ViT, ViTMAE),
            1e-6 (Dinov2) or 1e-5 (DINOv3).

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    named = {re.sub(r"^(vit|dinov2|dinov2_with_registers|model)\.", "", name): value for name, value in tensors.items()}
    weights = Weights({_fused(name): value for name, value in named.items()}, "huggingface")
    weights.drop(r"decoder\..*", r"pooler\..*", r"classifier\..*", r"embeddings\.mask_token")
    if "layer.0.attention.q_proj.weight" in weights:
        gated = "layer.0.mlp.gate_proj.weight" in weights
        up = "layer.{n}.mlp.up_proj.{k}"
        names, eps = (
            _DINOV3 | {"blocks.{n}.mlp.fc1.{k}": f"layer.{{n}}.mlp.gate_proj.{{k}} {up}" if gated else up},
            1e-5,
        )
    elif "encoder.layer.0.norm1.weight" in weights:
        names, eps = _DINOV2, 1e-6
    else:
        names, eps = _CLASSIC, 1e-12
    state = take_vit(weights, _both(names))
    weights.finish()
    if names is _CLASSIC or names is _DINOV2:
        return build(state, num_heads, norm_eps=norm_eps or eps), weights.dropped
    encoder = build(state, num_heads, norm_eps=norm_eps or eps, rope="normalised")
    _interleave(encoder)
    return encoder, weights.dropped


def _fused(name: str) -> str:
    return name.replace("mlp.weights_in", "mlp.fc1").replace("mlp.weights_out", "mlp.fc2")


def _both(names: Mapping[str, str]) -> dict[str, str]:
    """Each name with {k} once for the weight and once for the bias."""
    return {
        ours.replace("{k}", kind): theirs.replace("{k}", kind)
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }


@torch.no_grad()
def _interleave(encoder: ViT) -> None:
    """Reorder queries and keys: rotary pairs lie half a head apart there, side by side here."""
    half = encoder.head_dim // 2
    order = torch.arange(2 * half).view(2, half).T.flatten()
    heads = encoder.embed_dim // encoder.head_dim
    rows = (torch.arange(heads)[:, None] * 2 * half + order).flatten()
    blocks: Any = encoder.blocks
    for block in blocks:
        weight = block.attn.qkv.weight
        for start in (0, encoder.embed_dim):
            part = weight[start : start + encoder.embed_dim]
            part.copy_(part[rows].clone())
        block.attn.qv_bias[0].copy_(block.attn.qv_bias[0][rows].clone())
