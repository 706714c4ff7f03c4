"""Weights of DINOv3's ViTs (https://arxiv.org/abs/2508.10104), as its authors' code names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from biovfm_monai.checkpoints.layout import Layout
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["DINOV3_HEADS", "from_dinov3", "interleave"]

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
    periods = _periods(tensors)
    gated = "blocks.0.mlp.w1.weight" in tensors
    layout = replace(_LAYOUT, names={**_LAYOUT.names, **_GATED}) if gated else _LAYOUT
    encoder, left_out = layout.read(_without_masked(tensors), num_heads)
    if periods is not None and encoder.head_dim != 4 * periods:
        heads = encoder.embed_dim // (4 * periods)
        raise InputError(f"rope_embed.periods are those of {heads} heads. Give --num_heads {heads}.")
    interleave(encoder)
    return encoder, left_out


def _periods(tensors: Mapping[str, Tensor]) -> int | None:
    """How many periods of rotary positions a checkpoint has, a quarter of a head's width; none may be left out.

    Raises:
        InputError: when they have another base than our "normalised" ones.
    """
    periods = tensors.get("rope_embed.periods")
    if periods is None:
        return None
    ours = 100.0 ** (torch.arange(periods.numel()) / max(periods.numel(), 1))
    if periods.ndim != 1 or not len(periods) or not torch.allclose(periods.float(), ours, rtol=0.02):
        raise InputError(
            f"rope_embed.periods are {periods.flatten()[:3].tolist()} ..., not those of base 100, which encoders have."
        )
    return len(periods)


def _without_masked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases of queries and values alone, where a mask switches those of the keys off."""
    result = {}
    for name, tensor in tensors.items():
        mask = tensors.get(f"{name}_mask")
        if name.endswith("attn.qkv.bias") and mask is not None:
            expected = torch.ones(3, tensor.numel() // 3).index_fill(0, torch.tensor(1), 0).flatten()
            if not torch.equal(mask.float().nan_to_num().flatten(), expected):
                raise InputError(f"{name}_mask switches off something else than the keys' bias, which no encoder does.")
            q, _, v = tensor.chunk(3)
            result[name.replace("qkv.bias", "qv_bias")] = torch.cat([q, v])
        else:
            result[name] = tensor
    return result


@torch.no_grad()
def interleave(encoder: ViT, back: bool = False) -> None:
    """Reorder queries and keys in place: rotary pairs that lie half a head apart come side by side; or back."""
    half = encoder.head_dim // 2
    order = torch.arange(2 * half).view(*((half, 2) if back else (2, half))).T.flatten()
    heads = torch.arange(encoder.embed_dim // encoder.head_dim)
    rows = (heads[:, None] * 2 * half + order).flatten()
    blocks: Any = encoder.blocks
    for block in blocks:
        q, k, _ = block.attn.qkv.weight.chunk(3)
        for part in (q, k, block.attn.qv_bias[0]) if block.attn.qv_bias is not None else (q, k):
            part.copy_(part[rows].clone())
