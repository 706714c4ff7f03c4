"""Weights of masked autoencoders (https://arxiv.org/abs/2111.06377), as their authors' code names them."""

from __future__ import annotations

from biovfm_monai.checkpoints.layout import Layout
from biovfm_monai.checkpoints.timm import TIMM_NAMES

__all__ = ["from_mae"]

from_mae = Layout(
    "mae",
    TIMM_NAMES,
    published={192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16},
    left_out=(r"decoder_.*", r"mask_token", r"head\..*"),
).read
