"""Encoders of the usual sizes: ViT (https://arxiv.org/abs/2010.11929) and PUMIT's SPAD-ViT, built as EVA-02 is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from biovfm_monai.networks.vit import ViT

__all__ = [
    "spad_vit_base", "spad_vit_huge", "spad_vit_large", "spad_vit_small", "spad_vit_tiny", "vit_base", "vit_huge",
    "vit_large", "vit_small", "vit_tiny",
]  # fmt: skip

_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
# EVA-02's block, with positions both added and rotary, as in PUMIT.
_SPAD = {
    "mlp_ratio": 8 / 3, "k_bias": False, "swiglu_mlp": True, "scale_mlp": True, "pos_embed": "learn", "rope": "index",
}  # fmt: skip


def vit_tiny(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """192 wide, 12 deep, 3 heads."""
    return ViT(in_channels, img_size, patch_size, **{**_TINY, **options})


def vit_small(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """384 wide, 12 deep, 6 heads."""
    return ViT(in_channels, img_size, patch_size, **{**_SMALL, **options})


def vit_base(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """768 wide, 12 deep, 12 heads."""
    return ViT(in_channels, img_size, patch_size, **{**_BASE, **options})


def vit_large(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """1024 wide, 24 deep, 16 heads."""
    return ViT(in_channels, img_size, patch_size, **{**_LARGE, **options})


def vit_huge(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 14, **options: Any) -> ViT:
    """1280 wide, 32 deep, 16 heads, patch 14."""
    return ViT(in_channels, img_size, patch_size, **{**_HUGE, **options})


def spad_vit_tiny(
    in_channels: int = 3, img_size: Sequence[int] = (80, 160, 160), patch_size: int = 16, **options: Any
) -> ViT:
    """192 wide, 12 deep, 3 heads."""
    return ViT(in_channels, img_size, patch_size, **{**_TINY, **_SPAD, **options})


def spad_vit_small(
    in_channels: int = 3, img_size: Sequence[int] = (80, 160, 160), patch_size: int = 16, **options: Any
) -> ViT:
    """384 wide, 12 deep, 6 heads."""
    return ViT(in_channels, img_size, patch_size, **{**_SMALL, **_SPAD, **options})


def spad_vit_base(
    in_channels: int = 3, img_size: Sequence[int] = (80, 160, 160), patch_size: int = 16, **options: Any
) -> ViT:
    """768 wide, 12 deep, 12 heads: PUMIT's base."""
    return ViT(in_channels, img_size, patch_size, **{**_BASE, **_SPAD, **options})


def spad_vit_large(
    in_channels: int = 3, img_size: Sequence[int] = (80, 160, 160), patch_size: int = 16, **options: Any
) -> ViT:
    """1024 wide, 24 deep, 16 heads: PUMIT's large."""
    return ViT(in_channels, img_size, patch_size, **{**_LARGE, **_SPAD, **options})


def spad_vit_huge(
    in_channels: int = 3, img_size: Sequence[int] = (80, 160, 160), patch_size: int = 16, **options: Any
) -> ViT:
    """1280 wide, 32 deep, 16 heads."""
    return ViT(in_channels, img_size, patch_size, **{**_HUGE, **_SPAD, **options})
