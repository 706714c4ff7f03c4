"""What a labelled benchmark is: parts, task, licence, citation, and what its numbers must be read with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.metrics import check_labels

__all__ = ["PARTS", "Benchmark", "require_apart", "subjects_of"]

PARTS = ("training", "validation", "test")


def require_apart(name: str | Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse parts that share a subject or an image.

    Args:
        name: of what they are parts, for errors.
        parts: their names -> datalist items.

    Raises:
        InputError: naming the two parts, and the image.
    """
    seen: dict[tuple[str, Any], str] = {}
    for part, items in parts.items():
        for item in items:
            images = [item["image"]] if isinstance(item["image"], str) else item["image"]
            held: list[tuple[str, Any]] = [("an image", image) for image in images]
            if item.get("subject") is not None:
                held.append(("a subject", (item.get("source"), str(item["subject"]))))
            for kind, what in held:
                if seen.setdefault((kind, what), part) != part:
                    raise InputError(
                        f"{name}: {kind} is in both the {seen[kind, what]} and the {part} part, there with "
                        f"{images[0]}: scores would be too good. Split by subject, as biovfm index does."
                    )


def subjects_of(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whose each item is, for a bootstrap over patients; an item without subject is a patient of its own."""
    return [
        f"image {number}" if item.get("subject") is None else f"{item.get('source')}: {item['subject']}"
        for number, item in enumerate(items)
    ]


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
