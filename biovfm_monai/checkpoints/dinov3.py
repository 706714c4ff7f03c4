"""Weights of DINOv3's ViTs (https://arxiv.org/abs/2508.10104), as its authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from biovfm_monai.checkpoints.layout import Layout, interleave
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
    "mlp.fc1.{k}": "mlp.fc1.{k}",
    "mlp.fc2.{k}": "mlp.fc2.{k}",
    "ls2.gamma": "ls2.gamma",
}
_LAYOUT = Layout(
    "dinov3",
    {
        "patch_embed.{k}": "patch_embed.proj.{k}",
        "cls_token": "cls_token",
        "reg_token": "storage_tokens?",
        **{f"blocks.{{n}}.{ours}": f"blocks.{{n}}.{theirs}" for ours, theirs in _BLOCK.items()},
        "norm.{k}": "norm.{k}",
    },
    published=DINOV3_HEADS,
    left_out=(r"mask_token", r".*\.bias_mask", r"local_cls_norm\..*", r"\w+_head\..*", r"rope_embed\.periods"),
    rename=lambda name: name.replace("mlp.w3", "mlp.fc2"),
    options={"norm_eps": 1e-5, "rope": "normalised", "global_pool": "token"},
)
_GATED = {"blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.w1.{k} blocks.{n}.mlp.w2.{k}"}


def from_dinov3(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """As `Layout.read`. A key's bias that its mask switches off is left out, too."""
    _check_periods(tensors)
    gated = "blocks.0.mlp.w1.weight" in tensors
    layout = replace(_LAYOUT, names={**_LAYOUT.names, **_GATED}) if gated else _LAYOUT
    encoder, left_out = layout.read(_without_masked(tensors), num_heads)
    interleave(encoder)
    return encoder, left_out


def _check_periods(tensors: Mapping[str, Tensor]) -> None:
    """Refuse rotary positions with another base than our "normalised" ones."""
    periods = tensors.get("rope_embed.periods")
    if periods is not None:
        ours = 100.0 ** (torch.arange(len(periods)) / len(periods))
        if not torch.allclose(periods.float(), ours, rtol=0.02):
            raise InputError(
                f"rope_embed.periods are {periods[:3].tolist()} ..., not those of base 100, which our encoder has."
            )


def _without_masked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("attn.qkv.bias") and f"{name}_mask" in tensors:
            q, _, v = tensor.chunk(3)
            result[name.replace("qkv.bias", "qv_bias")] = torch.cat([q, v])
        else:
            result[name] = tensor
    return result
