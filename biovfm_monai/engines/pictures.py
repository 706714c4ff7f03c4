"""Pictures of what a masked autoencoder sees and fills in, one row per modality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from ignite.engine import Events
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from biovfm_monai import distributed
from biovfm_monai.data import RandomCropDataset, RandomResizedCrop
from biovfm_monai.engines.trainer import PretrainingTrainer
from biovfm_monai.files import write_atomically
from biovfm_monai.parallelism import Sharded
from biovfm_monai.sheet import draw_sheet, middle_slice

__all__ = ["ReconstructionHandler"]

_SEARCH = 64


class Reconstructs(Protocol):
    """A method that can show what it fills in, such as MAE."""

    pictures: tuple[str, str]

    def reconstruct(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Two images made of batch["image"], as `pictures` names them."""
        ...

    def eval(self) -> Any:
        """Switch to evaluation."""
        ...


class ReconstructionHandler:
    """Draw (image, masked, reconstructed) of one crop per modality, as `reconstruction.png` and in TensorBoard.

    The crops, their masks and thus the picture's layout are the same each time, so that pictures can be compared. Of a
    sharded network there is none.

    Args:
        method: what reconstructs.
        dataset: source of the crops.
        views: brings a crop to the encoder's size, without randomness.
        folder: where the picture goes.
        summary_writer: TensorBoard's, optional.
        interval: epochs between pictures; the last epoch always gets one.
        rows: most modalities that are shown, of those among the first 64 crops.
    """

    def __init__(
        self,
        method: Reconstructs,
        dataset: RandomCropDataset,
        views: RandomResizedCrop,
        folder: str | Path,
        summary_writer: SummaryWriter | None = None,
        interval: int = 5,
        rows: int = 8,
    ) -> None:
        self.method, self.dataset, self.views = method, dataset, views
        self.path = Path(folder) / "reconstruction.png"
        self.summary_writer = summary_writer
        self.interval, self.rows = interval, rows
        self._samples: list[dict[str, Any]] = []

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._draw)

    def _draw(self, engine: PretrainingTrainer) -> None:
        due = engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs
        # Of a sharded network this process has a part only.
        if not (due and distributed.is_main()) or isinstance(engine.network, Sharded):
            return
        self._samples = samples = self._samples or self._one_per_modality()
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(0)
            self.method.eval()
            rows = [self._row(sample, engine.state.device) for sample in samples]
        picture = draw_sheet(rows)
        with write_atomically(self.path) as draft:
            Image.fromarray(picture).save(draft, format="PNG")
        if self.summary_writer is not None:
            self.summary_writer.add_image("reconstruction", picture, engine.step, dataformats="HWC")
            self.summary_writer.flush()

    def _row(self, sample: Mapping[str, Any], device: torch.device) -> list[tuple[str, np.ndarray]]:
        crop, degree = sample["image"][None].to(device), sample.get("anisotropy", 0)
        image = self.views.still_view(crop, degree)
        made = self.method.reconstruct({**sample, "image": image, "key": torch.tensor([sample["key"]])})
        shown = [middle_slice(_as_volume(one)[0] * self.views.std + self.views.mean) for one in (image, *made)]
        return list(zip((f"{sample['modality']}: image", *self.method.pictures), shown, strict=True))

    def _one_per_modality(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for number in range(min(len(self.dataset), _SEARCH)):
            sample = self.dataset[number]
            found.setdefault(sample["modality"], sample)
            if len(found) == self.rows:
                break
        return [found[name] for name in sorted(found)]


def _as_volume(image: Tensor) -> Tensor:
    return image.unsqueeze(2) if image.ndim == 4 else image
