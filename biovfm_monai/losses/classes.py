"""What a network's logits say of classes: one out of several, several findings at once, or grades, and their losses.

Grades are yes-no questions, "is it above k?" (https://doi.org/10.1109/CVPR.2016.532).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biovfm_monai.errors import InputError
from biovfm_monai.losses.ordinal import OrdinalLoss

__all__ = ["class_chances", "class_loss", "num_logits"]


def num_logits(classes: int, task: str = "multiclass") -> int:
    """Logits that a network of so many classes gives: one fewer for "ordinal"."""
    return classes - 1 if task == "ordinal" else classes


def class_loss(task: str = "multiclass", weight: Tensor | None = None) -> nn.Module:
    """The loss of B x `num_logits` logits, of B x classes targets, a 0 or 1 per class.

    Args:
        task: "multiclass", cross entropy; "multilabel", binary cross entropy; "ordinal", `OrdinalLoss`.
        weight: per class; of a class, and of "multilabel" of its presence. "ordinal" takes none.

    Raises:
        InputError: on an unknown task.
    """
    if task == "multiclass":
        return nn.CrossEntropyLoss(weight)
    if task == "multilabel":
        return nn.BCEWithLogitsLoss(pos_weight=weight)
    if task == "ordinal":
        return _OfIndicators(OrdinalLoss())
    raise InputError(f"task {task!r} is unknown. Give one of multiclass, multilabel, ordinal.")


class _OfIndicators(nn.Module):
    """A loss that takes the number of a class, of a 0 or 1 per class."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits, target.argmax(1))


def class_chances(logits: Tensor, task: str = "multiclass") -> Tensor:
    """Probabilities, ... x classes, of ... x `num_logits` logits; those of "multilabel" are each on their own.

    A grade's is that of being above the one below, and not above itself; where a question contradicts an easier one,
    the easier one counts.
    """
    if task == "multilabel":
        return logits.sigmoid()
    if task == "multiclass":
        return logits.softmax(-1)
    above = logits.sigmoid().cummin(-1).values
    edge = above.new_ones(*above.shape[:-1], 1)
    bounds = torch.cat([edge, above, edge - 1], dim=-1)
    return bounds[..., :-1] - bounds[..., 1:]
