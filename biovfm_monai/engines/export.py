"""What a run leaves for use: the encoder file, and the bundle's `models/model.pt` as the model zoo wants it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events

import biovfm_monai
from biovfm_monai import distributed
from biovfm_monai.checkpoints import save_embedder, save_encoder, save_tokenizer
from biovfm_monai.engines.trainer import PretrainingTrainer
from biovfm_monai.files import set_aside
from biovfm_monai.networks import SoftTokenizer

__all__ = ["EncoderHandler"]


class EncoderHandler:
    """Write the encoder after every epoch: `encoder.safetensors`, and `model.pt` with {"model": Embedder's weights}.

    A method that trains a tokenizer leaves `tokenizer.safetensors`.

    What an earlier run left there is set aside as `*.before` when a run starts anew.

    Args:
        folder: where the files go.
        preprocessing: kept in the encoder file's header: how images became the encoder's input.
    """

    def __init__(self, folder: str | Path, preprocessing: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.preprocessing = dict(preprocessing or {})

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self._set_aside)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _set_aside(self, engine: PretrainingTrainer) -> None:
        if engine.step == 0 and distributed.is_main():
            tokenizer = isinstance(engine.method.trained, SoftTokenizer)
            for name in ("tokenizer.safetensors",) if tokenizer else ("encoder.safetensors", "model.pt"):
                set_aside(self.folder / name)

    def _save(self, engine: PretrainingTrainer) -> None:
        trained = engine.trained()
        if not distributed.is_main():
            return
        training = {
            "method": type(engine.method).__name__,
            "steps": engine.step,
            "samples_seen": engine.samples_seen,
            "loss": float(engine.state.metrics.get("mean_loss", engine.state.output[0]["loss"])),
            "biovfm_monai": biovfm_monai.__version__,
            "torch": torch.__version__,
        }
        if isinstance(trained, SoftTokenizer):
            save_tokenizer(trained, self.folder / "tokenizer.safetensors", self.preprocessing, training)
        else:
            save_encoder(trained, self.folder / "encoder.safetensors", self.preprocessing, training)
            save_embedder(trained, self.folder / "model.pt")
