"""Scores of runs with 95 % intervals: those that the run wrote, else of its counts and its predictions by image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from scipy.stats import bootstrap as bootstrap_mean
from sklearn.metrics import confusion_matrix

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.metrics import TASKS, bootstrap, check_labels, scores_of

__all__ = [
    "Confusion", "Score", "confusion_of", "scores_of_images", "scores_of_json", "scores_of_knn", "scores_of_metrics",
    "scores_of_table",
]  # fmt: skip

_NO_SCORES = ("intervals", "interval", "settings", "benchmark")
_CONTENDERS = ("encoder", "random_init", "raw_pixels")


@dataclass(frozen=True)
class Score:
    """One number of a run.

    Args:
        run, task, name: of what.
        value: the score.
        low, high: ends of its 95 % interval, where one is known.
        interval: how that was found.
    """

    run: str
    task: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class Confusion:
    """How many images of each class (rows) were taken for which (columns)."""

    task: str
    classes: list[str]
    counts: np.ndarray

    @classmethod
    def of(cls, task: str, labels: Any, predicted: Any) -> Confusion:
        """Count labels and predictions; classes are in the order of their names."""
        classes = sorted({*map(str, labels), *map(str, predicted)})
        return cls(task, classes, confusion_matrix([*map(str, labels)], [*map(str, predicted)], labels=classes))


def scores_of_knn(run: str, content: Mapping[str, Any]) -> Iterator[Score]:
    """What `KNNProbe` wrote, with Wilson intervals, since accuracies are shares of images."""
    images = int(content["test_images"])
    for name in _CONTENDERS:
        value = float(content[name])
        found = binomtest(round(value * images), images).proportion_ci(method="wilson")
        yield Score(run, "kNN", f"accuracy, {name}", value, found.low, found.high, "Wilson, over images")
    for name in ("chance", "classes", "train_images", "test_images", "k"):
        yield Score(run, "kNN", name, float(content[name]))


def scores_of_json(run: str, task: str, content: Mapping[str, Any], path: str = "") -> Iterator[Score]:
    """All numbers of a file of scores, with the intervals that stand beside them."""
    task = str(content.get("benchmark", {}).get("name", task)) if isinstance(content.get("benchmark"), dict) else task
    intervals = content.get("intervals", {})
    for name, value in content.items():
        if name in _NO_SCORES:
            continue
        if isinstance(value, Mapping):
            yield from scores_of_json(run, task, value, f"{path}{name}, ")
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            low, high = intervals.get(name) or (content.get("interval") if name == "value" else None) or (None, None)
            yield Score(run, task, path + name, float(value), low, high, "" if low is None else "as the run gives it")


def scores_of_metrics(run: str, path: Path) -> Iterator[Score]:
    """MONAI's metrics.csv, a name and a value per line."""
    for name, value in pd.read_csv(path, header=None, names=["name", "value"]).itertuples(index=False):
        yield Score(run, "evaluation", str(name), float(value))


def scores_of_images(run: str, path: Path) -> Iterator[Score]:
    """MONAI's table of a metric by image and class: means with bootstrap intervals over images."""
    table = pd.read_csv(path)
    metric = path.name.removesuffix("_raw.csv")
    for name in table.columns[1:]:
        values = pd.to_numeric(table[name]).dropna().to_numpy(float)
        if len(values) == 0:
            continue
        low = high = None
        if len(values) > 1 and np.ptp(values) > 0:
            found = bootstrap_mean((values,), np.mean, n_resamples=1000, method="percentile", rng=0)
            low, high = map(float, found.confidence_interval)
        how = "" if low is None else f"bootstrap over {len(values)} images"
        yield Score(run, "evaluation", f"{metric}, {name}", float(values.mean()), low, high, how)


def _labelled(table: pd.DataFrame) -> tuple[list[str], np.ndarray, np.ndarray, str] | None:
    """Classes, images x classes of truth, and of probabilities, and the task; None where no label is known.

    Probabilities of an image's classes add up to 1, and those of findings, each on its own, do not.

    Raises:
        InputError: when an image of such classes has not one of them as its label.
    """
    if "label" not in table:
        return None
    classes = [str(name) for name in table.columns if name not in ("image", "label")]
    truth = np.array([[name in label.split("|") for name in classes] for label in table["label"]], dtype=np.int64)
    likely = table[classes].to_numpy(float)
    if not np.allclose(likely.sum(1), 1, atol=1e-3):
        return classes, truth, likely, TASKS[3]
    wrong = np.flatnonzero(truth.sum(1) != 1)
    if len(wrong):
        raise InputError(
            f"label {table['label'].iloc[wrong[0]]!r} in row {wrong[0] + 1} is not one of its classes. Correct it."
        )
    return classes, truth, likely, TASKS[1] if len(classes) == 2 else TASKS[0]


def scores_of_table(run: str, table: pd.DataFrame) -> Iterator[Score]:
    """Scores of a table of probabilities by image, with bootstrap intervals over images.

    Args:
        run: its name.
        table: as `engines.ChancesHandler` writes it.

    Raises:
        InputError: when its labels cannot be scored.
    """
    known = _labelled(table)
    if known is None:
        return
    classes, truth, likely, task = known
    labels = check_labels(truth if task == TASKS[3] else truth.argmax(1), len(classes), task, "evaluated")
    intervals = bootstrap(labels, likely, task)
    for name, value in scores_of(labels, likely, task).items():
        low, high = intervals.get(name, (None, None))
        how = "" if low is None else f"bootstrap over {len(labels)} images"
        yield Score(run, "classification", name, value, low, high, how)


def confusion_of(task: str, table: pd.DataFrame) -> Iterator[Confusion]:
    """The confusion matrix of a table of probabilities in which each image is of one class."""
    known = _labelled(table)
    if known is not None and known[3] != TASKS[3]:
        classes, truth, likely, _ = known
        pairs = confusion_matrix(truth.argmax(1), likely.argmax(1), labels=range(len(classes)))
        yield Confusion(task, classes, pairs)
