"""Weights of PUMIT's SPAD-ViT (https://github.com/function2-llx/PUMIT), which names them as EVA-02 does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from biovfm_monai.checkpoints.eva02 import EVA02_LAYOUT, fused_or_not
from biovfm_monai.checkpoints.layout import require
from biovfm_monai.networks import ViT

__all__ = ["from_pumit", "to_pumit"]

_LAYOUT = replace(
    EVA02_LAYOUT, source="pumit", spatial_dims=(3,), class_position=False,
    options={"rope": "index", "norm_eps": 1e-5, "global_pool": "token"},
)  # fmt: skip


def from_pumit(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """As `Layout.read`: a spatially adaptive encoder."""
    return fused_or_not(_LAYOUT, tensors).read(tensors, num_heads)


def to_pumit(encoder: ViT) -> dict[str, Tensor]:
    """An encoder such as `spad_vit_base` in PUMIT's layout.

    PUMIT's norms add 1e-5 to the variance, whatever the encoder's norm_eps was.

    Raises:
        InputError: when the layout has no place for something.
    """
    require(encoder, "pumit", spatial_dims=3, pos_embed="learn", rope="index", ref_feat_shape=None)
    require(encoder, "pumit", swiglu_mlp=True, k_bias=False, final_norm=True)
    return _LAYOUT.write(encoder) | {"pos_embed": encoder.state_dict()["pos_embed"].cpu()}
