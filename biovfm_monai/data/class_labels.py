"""What is said of an image's classes, in words or numbers, as a 0 or 1 per class.

Several findings in one text are divided by "|", as in the table of ChestX-ray14 (https://doi.org/10.1109/CVPR.2017.369).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from biovfm_monai.errors import InputError

__all__ = ["ClassLabeld", "class_weights", "indicators", "listed", "require_classes"]

_NOTHING = ("", "No Finding")


def require_classes(classes: Sequence[str], task: str) -> None:
    """Refuse an unknown task, and names that are no list of different ones, enough for the task."""
    if task not in ("multiclass", "multilabel", "ordinal"):
        raise InputError(f"task {task!r} is unknown. Give one of multiclass, multilabel, ordinal.")
    least = 1 if task == "multilabel" else 2
    if isinstance(classes, str) or len(set(map(str, classes))) != len(classes) or len(classes) < least:
        raise InputError(f"classes {classes!r} must be {least} or more different names. Give --classes \"['a','b']\".")


def listed(classes: Sequence[str]) -> str:
    """The classes with their numbers, for messages."""
    return ", ".join(f"{number} {name}" for number, name in enumerate(classes))


def indicators(label: Any, classes: Sequence[str], task: str) -> list[float] | None:
    """A 0 or 1 per class, of a name, a number, several names, or a 0 or 1 per class; None where it is none of these."""
    names, several = [str(name) for name in classes], task == "multilabel"
    if isinstance(label, torch.Tensor | np.ndarray):
        label = label.tolist()
    if isinstance(label, list | tuple) or str(label) in names:
        values = list(label) if isinstance(label, list | tuple) else [label]
    elif _is_number(label):
        number = int(float(label))
        values = [number] if several else [names[number]] if 0 <= number < len(names) else [label]
    else:
        values = [] if label in _NOTHING else str(label).split("|")
    if len(values) == len(names) and all(_is_number(value) and float(value) in (0, 1) for value in values):
        found = [float(value) for value in values]
    elif set(map(str, values)) <= set(names):
        found = [float(name in map(str, values)) for name in names]
    else:
        return None
    return found if several or sum(found) == 1 else None


def _is_number(value: Any) -> bool:
    try:
        return float(value).is_integer()
    except (TypeError, ValueError):
        return False


class ClassLabeld(MapTransform):
    """Turn a label into float32, a 0 or 1 per class, as the losses of `biovfm_monai.losses.class_loss` take it.

    Args:
        keys: of the labels: a class's name or number, for several findings their names, or a 0 or 1 per class.
        classes, task: as of `load_classification`.

    Raises:
        InputError: when a label is none of the classes.
    """

    def __init__(self, keys: KeysCollection, classes: Sequence[str], task: str = "multiclass") -> None:
        super().__init__(keys)
        require_classes(classes, task)
        self.classes, self.task = classes, task

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn one sample's labels."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            label = indicators(sample[key], self.classes, self.task)
            if label is None:
                raise InputError(
                    f"label {sample[key]!r} cannot be used; the classes are {listed(self.classes)}. Correct it, or "
                    "give --classes or --task."
                )
            sample[key] = torch.tensor(label)
        return sample


def class_weights(items: Sequence[Mapping[str, Any]], classes: Sequence[str], task: str) -> torch.Tensor | None:
    """Factors by which rare classes count as much as frequent ones, for `biovfm_monai.losses.class_loss`.

    Args:
        items: with labels, all of the classes among them.
        classes, task: as of `load_classification`.

    Returns:
        Of one class out of several images / (classes x images of it); of findings images without it / with it; of
        classes that have an order None, as their loss counts questions.
    """
    if task == "ordinal":
        return None
    encode = ClassLabeld("label", classes, task)
    labels = torch.stack([encode({"label": item["label"]})["label"] for item in items])
    counts = labels.sum(0).clamp(min=1)
    return (len(labels) - counts) / counts if task == "multilabel" else len(labels) / (len(classes) * counts)
