"""Encoder files that describe themselves; weights of other projects in, and out to their formats."""

from biovfm_monai.checkpoints.biovfm import from_biovfm
from biovfm_monai.checkpoints.convert import convert
from biovfm_monai.checkpoints.dino import from_dino
from biovfm_monai.checkpoints.dinov2 import from_dinov2, to_dinov2
from biovfm_monai.checkpoints.dinov3 import from_dinov3
from biovfm_monai.checkpoints.encoder import build_encoder, encoder_info, load_encoder, save_embedder, save_encoder
from biovfm_monai.checkpoints.eva02 import from_eva02
from biovfm_monai.checkpoints.export import export
from biovfm_monai.checkpoints.finetune import encoder_to_finetune, load_model
from biovfm_monai.checkpoints.huggingface import from_huggingface, to_huggingface
from biovfm_monai.checkpoints.inflation import inflate, with_channels
from biovfm_monai.checkpoints.lpips import load_lpips
from biovfm_monai.checkpoints.mae import from_mae
from biovfm_monai.checkpoints.mocov3 import from_mocov3
from biovfm_monai.checkpoints.monai import from_monai, to_monai
from biovfm_monai.checkpoints.pumit import from_pumit, to_pumit
from biovfm_monai.checkpoints.read import read_weights
from biovfm_monai.checkpoints.timm import from_timm, to_timm
from biovfm_monai.checkpoints.tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "build_encoder", "convert", "encoder_info", "encoder_to_finetune", "export", "from_biovfm", "from_dino",
    "from_dinov2", "from_dinov3", "from_eva02", "from_huggingface", "from_mae", "from_mocov3", "from_monai",
    "from_pumit", "from_timm", "inflate", "load_encoder", "load_lpips", "load_model", "load_tokenizer",
    "read_weights", "save_embedder", "save_encoder", "save_tokenizer", "to_dinov2", "to_huggingface", "to_monai",
    "to_pumit", "to_timm", "with_channels",
]  # fmt: skip
