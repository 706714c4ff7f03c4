"""Image to tokens, to labels of voxels and of images: plain single-device modules."""

from biovfm_monai.anisotropy import anisotropy_of, draw_anisotropy, spacing_of
from biovfm_monai.networks.adapters import with_adapters
from biovfm_monai.networks.adaptive import (
    AdaptiveConv3d,
    AdaptiveConvBlock,
    AdaptiveConvTranspose3d,
    adaptive_downsample,
    adaptive_upsample,
    halved,
    pending,
)
from biovfm_monai.networks.blocks import Attention, Block, DropPath, LayerScale, Mlp, SwiGLU
from biovfm_monai.networks.decoders import Decoder, LightDecoder, LinearDecoder, UNETRDecoder
from biovfm_monai.networks.features import EncoderFeatures
from biovfm_monai.networks.heads import AttentivePool, Classifier, ClassToken, Embedder, MaxPatches, MeanPatches
from biovfm_monai.networks.lpips import LPIPSFeatures
from biovfm_monai.networks.masking import block_mask, random_mask, take_tokens
from biovfm_monai.networks.packing import encode_packed, encode_together
from biovfm_monai.networks.patch_embed import PatchEmbed, Patches, patchify, unpatchify
from biovfm_monai.networks.positions import interpolate_grid, rotary_angles, rotate, sincos_positions
from biovfm_monai.networks.presets import (
    spad_vit_base,
    spad_vit_huge,
    spad_vit_large,
    spad_vit_small,
    spad_vit_tiny,
    vit_base,
    vit_huge,
    vit_large,
    vit_small,
    vit_tiny,
)
from biovfm_monai.networks.segmenter import DeepSupervision, Segmenter
from biovfm_monai.networks.tokenizer import PatchDiscriminator, SoftTokenizer
from biovfm_monai.networks.vit import ViT

__all__ = [
    "AdaptiveConv3d", "AdaptiveConvBlock", "AdaptiveConvTranspose3d", "Attention", "AttentivePool", "Block",
    "ClassToken", "Classifier", "Decoder", "DeepSupervision", "DropPath", "Embedder", "EncoderFeatures",
    "LPIPSFeatures", "LayerScale", "LightDecoder", "LinearDecoder", "MaxPatches", "MeanPatches", "Mlp",
    "PatchDiscriminator", "PatchEmbed", "Patches", "Segmenter", "SoftTokenizer", "SwiGLU", "UNETRDecoder", "ViT",
    "adaptive_downsample", "adaptive_upsample", "anisotropy_of", "block_mask", "draw_anisotropy", "encode_packed",
    "encode_together", "halved", "interpolate_grid", "patchify", "pending", "random_mask", "rotary_angles",
    "rotate", "sincos_positions", "spacing_of", "spad_vit_base", "spad_vit_huge", "spad_vit_large",
    "spad_vit_small", "spad_vit_tiny", "take_tokens", "unpatchify", "vit_base", "vit_huge", "vit_large",
    "vit_small", "vit_tiny", "with_adapters",
]  # fmt: skip
