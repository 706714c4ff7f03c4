"""A labelled dataset of your own: sections of a datalist, as `biovfm index` makes of folders and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biovfm_monai.data import load_datalist
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.benchmarks.base import PARTS, Benchmark, require_apart
from biovfm_monai.evaluation.metrics import TASKS

__all__ = ["dataset"]


def dataset(folder: str | Path, task: str | None = None, modality: str | Sequence[str] | None = None) -> Benchmark:
    """A benchmark of the sections training, validation and test of a dataset folder or store.

    Labels may be numbers, written as words or not: classes are then in their order; or words, in that of the alphabet.

    Args:
        folder: as in `load_datalist`.
        task: one of `evaluation.metrics.TASKS`; None for findings where labels are lists, else two or more classes.
        modality: as in `load_datalist`.

    Raises:
        InputError: when a section or a label is missing, labels are of several kinds, grades are no numbers, or
            sections share a subject or an image.
    """
    parts = {part: [dict(item) for item in load_datalist(folder, part, modality)] for part in PARTS}
    require_apart(folder, parts)
    items = [item for part in parts.values() for item in part]
    without = sum(item.get("label") in (None, "") or item["label"] != item["label"] for item in items)
    if without:
        raise InputError(f"{folder}: {without} of {len(items)} items have no label, and a probe needs one for each.")
    kinds = {type(item["label"]).__name__ for item in items}
    if len(kinds) > 1:
        raise InputError(f"{folder}: labels are of several kinds, {', '.join(sorted(kinds))}. Write all as one.")
    if kinds == {"list"}:
        count = len(items[0]["label"])
        return Benchmark(Path(folder).name, task or TASKS[3], count, parts, "its own", "its own")
    classes, numbers = np.unique(_in_order(folder, [item["label"] for item in items], task), return_inverse=True)
    for item, number in zip(items, numbers.tolist(), strict=True):
        item["label"] = number
    chosen = task or TASKS[1 if len(classes) == 2 else 0]
    return Benchmark(Path(folder).name, chosen, len(classes), parts, "its own", "its own")


def _in_order(folder: str | Path, labels: Sequence[Any], task: str | None) -> list[Any]:
    """Labels as numbers, if all are; else as they are, of which the order of grades could not be told."""
    try:
        return [float(label) for label in labels]
    except ValueError as error:
        if task == TASKS[2]:
            raise InputError(f"{folder}: grades must be numbers, so that they have an order ({error}).") from error
        return list(labels)
