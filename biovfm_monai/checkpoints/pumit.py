"""Weights of PUMIT's SPAD-ViT (https://github.com/function2-llx/PUMIT)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.checkpoints.eva02 import from_eva02_layout, to_eva02_layout
from biovfm_monai.networks import ViT

__all__ = ["from_pumit", "to_pumit"]


def from_pumit(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[ViT, list[str]]:
    """A spatially adaptive encoder from PUMIT's weights, and the names of what was left out (mask token, head).

    Args:
        tensors: as from `read_weights`.
        num_heads: None for the published sizes.

    Raises:
        InputError: when a tensor is missing or unknown.
    """
    return from_eva02_layout("pumit", tensors, 5, num_heads, norm_eps=1e-5, global_pool="token")


def to_pumit(encoder: ViT) -> dict[str, Tensor]:
    """An encoder such as `spad_vit_base` in PUMIT's layout.

    PUMIT's norms add 1e-5 to the variance, whatever the encoder's norm_eps was.

    Raises:
        InputError: when the layout has no place for something.
    """
    state = to_eva02_layout(encoder, "pumit", spatial_dims=3, pos_embed="learn", ref_feat_shape=None)
    state["pos_embed"] = encoder.state_dict()["pos_embed"].cpu()
    return state
