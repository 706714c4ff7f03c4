"""Weights of DINOv3's ViTs (https://arxiv.org/abs/2508.10104), as its authors' code names them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from biovfm_monai.checkpoints.layout import build, interleave, take_vit
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.weights import Weights
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["DINOV3_HEADS", "from_dinov3"]

DINOV3_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 18, 1280: 20, 1536: 24, 4096: 32}
"""Width -> heads of the published sizes."""

_BLOCK = {
    "norm1.{k}": "norm1.{k}",
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.qkv.bias": "attn.qkv.bias?",
    "attn.qv_bias": "attn.qv_bias?",
    "attn.proj.{k}": "attn.proj.{k}",
    "ls1.gamma": "ls1.gamma",
    "norm2.{k}": "norm2.{k}",
    "mlp.fc2.{k}": "mlp.fc2.{k}",
    "ls2.gamma": "ls2.gamma",
}
_NAMES = {
    "patch_embed.{k}": "patch_embed.proj.{k}",
    "cls_token": "cls_token",
    "reg_token": "storage_tokens?",
    **{f"blocks.{{n}}.{ours}": f"blocks.{{n}}.{theirs}" for ours, theirs in _BLOCK.items()},
    "norm.{k}": "norm.{k}",
}


def from_dinov3(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from DINOv3's weights, and the names of what was left out.

    A key's bias that its mask switches off is left out, too.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    weights = Weights(_without_masked(renamed(tensors, lambda name: name.replace("mlp.w3", "mlp.fc2"))), "dinov3")
    weights.drop(r"mask_token", r".*\.bias_mask", r"local_cls_norm\..*", r"\w+_head\..*")
    _check_periods(weights)
    gated = "blocks.0.mlp.w1.weight" in weights
    up = "blocks.{n}.mlp.w1.{k} blocks.{n}.mlp.w2.{k}" if gated else "blocks.{n}.mlp.fc1.{k}"
    state = take_vit(weights, _NAMES | {"blocks.{n}.mlp.fc1.{k}": up})
    weights.finish()
    encoder = build(state, num_heads, DINOV3_HEADS, norm_eps=1e-5, rope="normalised", global_pool="token")
    interleave(encoder)
    return encoder, weights.dropped


def _check_periods(weights: Weights) -> None:
    """Refuse rotary positions with another base than our "normalised" ones."""
    name = "rope_embed.periods"
    if name in weights:
        periods = weights.left[name].float()
        ours = 100.0 ** (torch.arange(len(periods)) / len(periods))
        if not torch.allclose(periods, ours, rtol=0.02):
            raise InputError(f"{name} are {periods[:3].tolist()} ..., not those of base 100, which our encoder has.")
        weights.drop(re.escape(name))


def _without_masked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("attn.qkv.bias") and f"{name}_mask" in tensors:
            q, _, v = tensor.chunk(3)
            result[name.replace("qkv.bias", "qv_bias")] = torch.cat([q, v])
        else:
            result[name] = tensor
    return result
