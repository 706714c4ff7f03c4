"""Weights of BioVFM-21M (https://github.com/JiarunLiu/BioVFM): its MAE and DINOv2 families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai.checkpoints.dinov2 import from_dinov2
from biovfm_monai.checkpoints.mae import from_mae
from biovfm_monai.networks import ViT

__all__ = ["from_biovfm"]


def from_biovfm(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """As `Layout.read`, of either family: BioVFM-M is written as MAE, BioVFM-D as DINOv2, and messages name these."""
    family = from_dinov2 if any(name.endswith("ls1.gamma") for name in tensors) else from_mae
    return family(tensors, num_heads, img_size)
