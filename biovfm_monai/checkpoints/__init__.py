"""Encoder files that describe themselves."""

from biovfm_monai.checkpoints.encoder import build_encoder, encoder_info, load_encoder, save_encoder

__all__ = ["build_encoder", "encoder_info", "load_encoder", "save_encoder"]
