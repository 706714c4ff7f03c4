"""What finished runs have left in their folders, read file by file: one that is damaged costs no other."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from biovfm_monai.checkpoints import encoder_info
from biovfm_monai.evaluation.report.find import FOLDERS
from biovfm_monai.evaluation.report.scores import (
    Confusion,
    Score,
    confusion_of,
    scores_of_images,
    scores_of_json,
    scores_of_knn,
    scores_of_metrics,
    scores_of_table,
)

__all__ = ["DAMAGE", "Run", "collect_runs", "damage_of"]

# What reading a file that is not as it should be may raise.
DAMAGE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, SyntaxError, RecursionError,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
_MOST_IMAGES = 2000


@dataclass
class Run:
    """What is known of one run.

    Args:
        name: as the page shows it.
        folder: where it lies.
        about: header of its encoder or tokenizer file.
        parameters: numbers in that file.
        metadata: of its bundle.
        curves: rows of name, step and value.
        scores: on tasks.
        confusions: of classes, one per task.
        embeddings: images x features.
        labels: of these images, where known.
        pictures: name of a file -> what it shows.
        files: name of a file that was looked for -> "read", "not found", or what is wrong with it.
    """

    name: str
    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["name", "step", "value"]))
    scores: list[Score] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)
    embeddings: np.ndarray | None = None
    labels: list[str] | None = None
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def last(self, name: str) -> float | None:
        """The newest value of a curve."""
        values = self.curves.loc[self.curves["name"] == name, "value"]
        return None if values.empty else float(values.iloc[-1])

    def total(self, name: str) -> float | None:
        """Sum of a curve's values."""
        values = self.curves.loc[self.curves["name"] == name, "value"]
        return None if values.empty else float(values.sum())

    def problems(self) -> list[str]:
        """What was set aside."""
        return [f"{name}: {state}" for name, state in self.files.items() if state not in ("read", "not found")]


def collect_runs(named: Iterable[tuple[str, Path]]) -> list[Run]:
    """Read what each run has left; what cannot be read is told in its `files`."""
    return [_collected(name, folder) for name, folder in named]


def _collected(name: str, folder: Path) -> Run:
    run = Run(name, folder)
    for file, read in _READERS.items():
        path = _place(folder, file)
        if path is None:
            run.files[file] = "not found"
        else:
            run.files[file] = _tried(read, run, path)
    for path in _others(folder):
        read = _json if path.suffix == ".json" else _images
        run.files[path.name] = _tried(read, run, path)
    return run


def _tried(read: Any, run: Run, path: Path) -> str:
    try:
        read(run, path)
    except DAMAGE as error:
        return damage_of(error, path)
    return "read"


def damage_of(error: Exception, path: Path) -> str:
    """What is wrong with a file, in a line that does not tell where it lies."""
    reason = f"lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return reason.replace(str(path), path.name).splitlines()[0][:200]


def _place(folder: Path, file: str) -> Path | None:
    places = (folder, *(folder / name for name in FOLDERS))
    return next((place / file for place in places if (place / file).exists()), None)


def _others(folder: Path) -> list[Path]:
    """Further tables of scores: of probes, and of MONAI's metrics by image."""
    places = [folder / "eval", folder]
    found = [path for place in places for path in [*sorted(place.glob("*.json")), *sorted(place.glob("*_raw.csv"))]]
    taken = {*_READERS, "datalist.json"}
    return [path for path in found if path.name not in taken and not path.name.startswith("config_")]


def _log(run: Run, path: Path) -> None:
    rows, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            values = dict(json.loads(line))
            step = int(values.pop("step"))
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged.append(str(number))
            continue
        rows += [(name, step, float(value)) for name, value in values.items() if _is_number(value)]
    run.curves = pd.DataFrame(rows, columns=["name", "step", "value"])
    if damaged:
        raise ValueError(f"damaged in line {', '.join(damaged)}; its other lines are shown")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _tensorboard(run: Run, path: Path) -> None:
    """Scalars of a run that has no log of ours, as those of MONAI's own trainer."""
    if len(run.curves):
        return
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    rows = [(name, of.step, of.value) for name in events.Tags()["scalars"] for of in events.Scalars(name)]
    run.curves = pd.DataFrame([row for row in rows if np.isfinite(row[2])], columns=["name", "step", "value"])


def _network(run: Run, path: Path) -> None:
    run.about = encoder_info(path)
    with safe_open(path, framework="pt") as file:
        run.parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def _metadata(run: Run, path: Path) -> None:
    run.metadata = dict(json.loads(path.read_text(encoding="utf-8")))


def _json(run: Run, path: Path) -> None:
    content = dict(json.loads(path.read_text(encoding="utf-8")))
    if "fits" not in content:
        run.scores += list(scores_of_json(run.name, path.stem, content))


def _knn(run: Run, path: Path) -> None:
    run.scores += list(scores_of_knn(run.name, dict(json.loads(path.read_text(encoding="utf-8")))))


def _metrics(run: Run, path: Path) -> None:
    run.scores += list(scores_of_metrics(run.name, path))


def _images(run: Run, path: Path) -> None:
    run.scores += list(scores_of_images(run.name, path))


def _probabilities(run: Run, path: Path) -> None:
    table = pd.read_csv(path, dtype={"label": str}, keep_default_na=False)
    run.scores += list(scores_of_table(run.name, table))
    run.confusions += list(confusion_of("probabilities.csv", table))


def _embeddings(run: Run, path: Path) -> None:
    if run.embeddings is None:
        # The first column names files, which are not to be shown.
        run.embeddings = pd.read_csv(path, header=None, nrows=_MOST_IMAGES).iloc[:, 1:].to_numpy(np.float32)


def _knn_images(run: Run, path: Path) -> None:
    with np.load(path, allow_pickle=False) as content:
        labels, predicted = content["labels"].astype(str), content["predicted"].astype(str)
        embeddings = content["embeddings"].astype(np.float32)
    if not len(labels) == len(predicted) == len(embeddings):
        raise ValueError("its arrays differ in length")
    run.confusions.append(Confusion.of("kNN", labels, predicted))
    run.embeddings, run.labels = embeddings[:_MOST_IMAGES], labels[:_MOST_IMAGES].tolist()


def _picture(run: Run, path: Path) -> None:
    with Image.open(path) as image:
        run.pictures[path.name] = image.convert("RGB")


_READERS = {
    "log.jsonl": _log, "tensorboard": _tensorboard, "encoder.safetensors": _network,
    "tokenizer.safetensors": _network, "metadata.json": _metadata, "knn.json": _knn, "knn_images.npz": _knn_images,
    "tokenizer.json": _json, "metrics.csv": _metrics, "probabilities.csv": _probabilities,
    "embeddings.csv": _embeddings, "neighbours.png": _picture, "reconstruction.png": _picture,
    "tokenizer.png": _picture, "overlay.png": _picture,
}  # fmt: skip
