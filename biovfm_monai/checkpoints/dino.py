"""Weights of DINO (https://arxiv.org/abs/2104.14294), backbone or teacher, as its authors' code names them."""

from __future__ import annotations

from biovfm_monai.checkpoints.layout import Layout
from biovfm_monai.checkpoints.timm import TIMM_NAMES

__all__ = ["from_dino"]

from_dino = Layout(
    "dino",
    TIMM_NAMES,
    published={192: 3, 384: 6, 768: 12},
    left_out=(r"head\..*",),
    options={"global_pool": "token"},
).read
