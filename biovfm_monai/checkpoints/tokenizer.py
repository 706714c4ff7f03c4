"""Tokenizer files, which describe themselves as encoder files do (encoder.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biovfm_monai.checkpoints.encoder import load_network, save_network
from biovfm_monai.errors import InputError
from biovfm_monai.networks import SoftTokenizer

__all__ = ["load_tokenizer", "save_tokenizer"]


def save_tokenizer(
    tokenizer: SoftTokenizer,
    path: str | Path,
    preprocessing: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a tokenizer file; arguments as of `save_encoder`."""
    save_network(tokenizer, path, preprocessing, training)


def load_tokenizer(path: str | Path) -> SoftTokenizer:
    """Rebuild a tokenizer with its weights, in eval mode on the CPU.

    Raises:
        InputError: as `load_encoder`, and when the file holds an encoder.
    """
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such tokenizer file. Train one first: python -m monai.bundle run --config_file "
            "FOLDER/spad_tokenizer_pretraining/configs/train.json --bundle_root FOLDER/spad_tokenizer_pretraining; or "
            "give the path of another (--tokenizer_path; with masked_tokens.json --method::tokenizer::path)."
        )
    tokenizer = load_network(path, SoftTokenizer)
    tokenizer.origin = str(path)
    return tokenizer
