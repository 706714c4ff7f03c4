"""What a labelled benchmark is: parts, task, licence, citation, and what its numbers must be read with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.metrics import check_labels

__all__ = ["PARTS", "Benchmark"]

PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Benchmark:
    """A labelled task with its official or drawn split.

    Args:
        name: such as bloodmnist.
        task: one of `evaluation.metrics.TASKS`.
        num_classes: classes, or findings.
        parts: training, validation and test -> datalist items with "label": a number from 0, or one for each finding.
        licence: of the data.
        citation: link to what to cite.
        warnings: what a report has to say besides, such as that a file is not the official one.
    """

    name: str
    task: str
    num_classes: int
    parts: Mapping[str, Sequence[Mapping[str, Any]]]
    licence: str
    citation: str
    warnings: list[str] = field(default_factory=list)

    def labels(self) -> list[np.ndarray]:
        """Labels of the training, validation and test part, as from `check_labels`.

        Raises:
            InputError: when a part is missing or has items without label, or as `check_labels`.
        """
        found = []
        for part in PARTS:
            items = self.parts.get(part, ())
            if not items:
                raise InputError(f"{self.name}: has no {part} part, and a probe needs one. Split the data anew.")
            without = sum(item.get("label") is None for item in items)
            if without:
                raise InputError(
                    f"{self.name}: {without} item(s) of the {part} part have no label. Add or remove them."
                )
            try:
                labels = np.array([item["label"] for item in items], float)
                found.append(check_labels(labels, self.num_classes, self.task, part))
            except (TypeError, ValueError) as error:
                raise InputError(f"{self.name}: {error}") from error
        return found

    def about(self) -> dict[str, Any]:
        """Its name, task, counts, licence, citation and warnings, for a report."""
        counts = {part: len(self.parts[part]) for part in PARTS}
        return {
            "name": self.name, "task": self.task, "classes": self.num_classes, "images": counts,
            "licence": self.licence, "citation": self.citation, "warnings": self.warnings,
        }  # fmt: skip
