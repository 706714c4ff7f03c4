"""Weights of DINOv2 (https://arxiv.org/abs/2304.07193), with and without registers, as its authors' code names them."""

from __future__ import annotations

import re

from torch import Tensor

from biovfm_monai.checkpoints.layout import Layout, require
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.timm import TIMM_NAMES
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["from_dinov2", "to_dinov2"]


def _plain(name: str) -> str:
    """Without the chunks of blocks that training files have, and with timm's names of SwiGLU."""
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")


_LAYOUT = Layout(
    "dinov2",
    TIMM_NAMES
    | {
        "reg_token": "register_tokens?",
        "blocks.{n}.ls1.gamma": "blocks.{n}.ls1.gamma",
        "blocks.{n}.ls2.gamma": "blocks.{n}.ls2.gamma",
    },
    published={384: 6, 768: 12, 1024: 16, 1536: 24},
    left_out=(r"mask_token", r"head\..*", r"dino_head\..*", r"ibot_head\..*"),
    rename=_plain,
    options={"global_pool": "token"},
)

from_dinov2 = _LAYOUT.read


def to_dinov2(encoder: ViT) -> dict[str, Tensor]:
    """An encoder of 2D images with LayerScale as the weights of DINOv2's backbone.

    Raises:
        InputError: when DINOv2 has no place for something.
    """
    require(encoder, "dinov2", spatial_dims=2, rope="none", norm_eps=1e-6)
    if encoder.arguments["init_values"] is None:
        raise InputError("an encoder without LayerScale (init_values) cannot be written as dinov2. Try timm.")
    require(encoder, "dinov2", pos_antialias=encoder.arguments["reg_tokens"] > 0)
    state = _LAYOUT.write(encoder)
    if encoder.arguments["swiglu_mlp"]:
        state = renamed(state, lambda name: name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"))
    # The backbone holds a mask token that it does not use without a mask.
    return state | {"mask_token": state["cls_token"].new_zeros(1, encoder.embed_dim)}
