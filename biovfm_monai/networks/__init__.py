"""Image to tokens: plain single-device modules."""

from biovfm_monai.networks.blocks import Attention, Block, Mlp
from biovfm_monai.networks.heads import Embedder
from biovfm_monai.networks.masking import random_mask, take_tokens
from biovfm_monai.networks.patch_embed import PatchEmbed, patchify, unpatchify
from biovfm_monai.networks.positions import sincos_positions
from biovfm_monai.networks.vit import ViT, vit_base, vit_huge, vit_large, vit_small, vit_tiny

__all__ = [
    "Attention", "Block", "Embedder", "Mlp", "PatchEmbed", "ViT", "patchify", "random_mask", "sincos_positions",
    "take_tokens", "unpatchify", "vit_base", "vit_huge", "vit_large", "vit_small", "vit_tiny",
]  # fmt: skip
