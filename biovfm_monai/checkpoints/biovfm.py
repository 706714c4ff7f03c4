"""Weights of BioVFM-21M (https://github.com/JiarunLiu/BioVFM): its MAE and DINOv2 families."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.checkpoints.dinov2 import from_dinov2
from biovfm_monai.checkpoints.mae import from_mae
from biovfm_monai.networks import ViT

__all__ = ["from_biovfm"]


def from_biovfm(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """An encoder from weights of either family (the teacher's of BioVFM-D), and the names of what was left out.

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    return (from_dinov2 if any(name.endswith("ls1.gamma") for name in tensors) else from_mae)(tensors, num_heads)
