"""Weights of MoCo v3's base encoder (https://arxiv.org/abs/2104.02057), as its authors' code names them."""

from __future__ import annotations

from biovfm_monai.checkpoints.layout import Layout
from biovfm_monai.checkpoints.timm import TIMM_NAMES

__all__ = ["from_mocov3"]

from_mocov3 = Layout(
    "mocov3",
    {ours: f"base_encoder.{theirs}" for ours, theirs in TIMM_NAMES.items()},
    published={384: 12, 768: 12, 1024: 16, 1280: 16},
    left_out=(r"momentum_encoder\..*", r"predictor\..*", r"base_encoder\.head\..*"),
    options={"global_pool": "token"},
).read
