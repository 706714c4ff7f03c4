"""Encoder files that describe themselves, and weights of other projects."""

from biovfm_monai.checkpoints.conversion import read_weights
from biovfm_monai.checkpoints.convert import convert
from biovfm_monai.checkpoints.encoder import build_encoder, encoder_info, load_encoder, save_encoder
from biovfm_monai.checkpoints.huggingface import from_huggingface
from biovfm_monai.checkpoints.inflation import inflate, with_channels
from biovfm_monai.checkpoints.monai import from_monai
from biovfm_monai.checkpoints.timm import from_timm

__all__ = [
    "build_encoder", "convert", "encoder_info", "from_huggingface", "from_monai", "from_timm", "inflate",
    "load_encoder", "read_weights", "save_encoder", "with_channels",
]  # fmt: skip
