"""What training a classifier asks of MONAI's engines besides: views of labelled images, tables of probabilities."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from torch import Tensor

from biovfm_monai.data import RandomResizedCrop
from biovfm_monai.files import write_atomically

__all__ = ["ChancesHandler", "LabelledViews", "decided", "write_chances"]


class LabelledViews:
    """A trainer's `prepare_batch`: random views of a batch's images, and its labels, on the device.

    Args:
        views: make them.
    """

    def __init__(self, views: RandomResizedCrop) -> None:
        self.views = views

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Views, B x C x (D) x H x W, and labels."""
        image = batch["image"]
        plain = {**batch, "image": image.as_tensor() if isinstance(image, MetaTensor) else image}
        shown = self.views(plain, torch.device(device), non_blocking)
        return shown["image"], batch["label"].to(device, non_blocking=non_blocking)


def decided(task: str) -> Callable[[Sequence[Mapping[str, Tensor]]], tuple[Tensor, Tensor]]:
    """An output_transform for Ignite's `Accuracy`, of probabilities and indicators: classes found, and true ones.

    Of "multilabel", whose number of findings Ignite would have to be two or more: whether all are right, and ones.
    """

    def transform(output: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        found, true = (torch.stack([sample[key] for sample in output]) for key in ("pred", "label"))
        if task == "multilabel":
            right = ((found > 0.5) == true.bool()).all(1).long()
            return right, torch.ones_like(right)
        return found, true.argmax(1)

    return transform


def write_chances(
    path: str | Path,
    classes: Sequence[str],
    files: Sequence[str],
    chances: Sequence[Sequence[float]],
    labels: Sequence[str] | None = None,
) -> None:
    """Write a table (.csv): a row per image, its file, a column of probabilities per class, and its label if given."""
    with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *classes, *([] if labels is None else ["label"])])
        for number, (name, row) in enumerate(zip(files, chances, strict=True)):
            shown = [f"{value:.6g}" for value in row]
            writer.writerow([name, *shown, *([] if labels is None else [labels[number]])])


class ChancesHandler:
    """Write the probabilities of all images of an evaluation, and their labels where known, into one table.

    Args:
        path: of the table, .csv.
        classes: names, in the order of the columns.
    """

    def __init__(self, path: str | Path, classes: Sequence[str]) -> None:
        self.path, self.classes = path, [str(name) for name in classes]
        self._files: list[str] = []
        self._chances: list[list[float]] = []
        self._labels: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator whose output is probabilities, one sample at a time."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _begin(self) -> None:
        self._files, self._chances, self._labels = [], [], []

    def _collect(self, engine: Engine) -> None:
        for given, found in zip(engine.state.batch, engine.state.output, strict=True):
            self._files.append(str(given["image"].meta["filename_or_obj"]))
            self._chances.append(found["pred"].tolist())
            if found.get("label") is not None:
                pairs = zip(self.classes, found["label"].tolist(), strict=True)
                self._labels.append("|".join(name for name, there in pairs if there))

    def _write(self) -> None:
        write_chances(self.path, self.classes, self._files, self._chances, self._labels or None)
