"""Weights of EVA-02's ViTs (https://arxiv.org/abs/2303.11331), as its authors' code and timm name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from biovfm_monai.checkpoints.layout import Layout
from biovfm_monai.networks import ViT

__all__ = ["EVA02_LAYOUT", "from_eva02", "fused_or_not"]

_REST = {
    "patch_embed.{k}": "patch_embed.proj.{k}",
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "blocks.{n}.norm1.{k}": "blocks.{n}.norm1.{k}",
    "blocks.{n}.attn.qv_bias": "blocks.{n}.attn.q_bias blocks.{n}.attn.v_bias",
    "blocks.{n}.attn.proj.{k}": "blocks.{n}.attn.proj.{k}",
    "blocks.{n}.norm2.{k}": "blocks.{n}.norm2.{k}",
    "blocks.{n}.mlp.norm.{k}": "blocks.{n}.mlp.ffn_ln.{k}?",
    "blocks.{n}.mlp.fc2.{k}": "blocks.{n}.mlp.w3.{k}",
    "norm.{k}": "norm.{k}?",
}
_SEPARATE = {
    "blocks.{n}.attn.qkv.weight": " ".join(f"blocks.{{n}}.attn.{part}_proj.weight" for part in "qkv"),
    "blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.w1.{k} blocks.{n}.mlp.w2.{k}",
}
_FUSED = {
    "blocks.{n}.attn.qkv.weight": "blocks.{n}.attn.qkv.weight",
    "blocks.{n}.mlp.fc1.{k}": "blocks.{n}.mlp.w12.{k}",
}
# timm's name of a part -> the authors'.
_TIMM = {
    "q_proj.bias": "q_bias", "v_proj.bias": "v_bias", "mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2",
    "mlp.fc1.": "mlp.w12.", "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln",
}  # fmt: skip


def _official(name: str) -> str:
    for timm, official in _TIMM.items():
        name = name.replace(timm, official)
    return name


EVA02_LAYOUT = Layout(
    "eva02",
    _REST | _SEPARATE,
    published={192: 3, 384: 6, 768: 12, 1024: 16},
    left_out=(r".*rope\.freqs_(cos|sin)", r"mask_token", r"(lm_|mim_)?head\..*", r"fc_norm\..*", r"tokenizer\..*"),
    rename=_official,
    spatial_dims=(2,),
    # Rotary positions count on this grid whatever the image's size, as in all published EVA-02 models.
    options={"rope": "index", "ref_feat_shape": [16, 16]},
    always={"swiglu_mlp": True},
)


def from_eva02(
    tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
) -> tuple[ViT, list[str]]:
    """As `Layout.read`; EVA-02-CLIP's norm inside attention is not known."""
    return fused_or_not(EVA02_LAYOUT, tensors).read(tensors, num_heads, img_size)


def fused_or_not(layout: Layout, tensors: Mapping[str, Tensor]) -> Layout:
    """A layout with separate projections, or with those that the tensors have in one."""
    return layout if "blocks.0.attn.q_proj.weight" in tensors else replace(layout, names=_REST | _FUSED)
