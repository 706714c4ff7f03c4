"""Grades that have an order, such as none, mild, severe, as yes-no questions (https://doi.org/10.1109/CVPR.2016.532)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["OrdinalLoss", "grades"]


class OrdinalLoss(nn.Module):
    """Mean binary cross entropy of the questions "is the grade above k?", one per logit."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of B x (grades - 1) logits, of B whole numbers from 0.

        Raises:
            ValueError: when a grade is not among them.
        """
        if target.min() < 0 or target.max() > logits.shape[1]:
            raise ValueError(f"grades must be 0 to {logits.shape[1]}, got {int(target.min())} to {int(target.max())}")
        above = target[:, None] > torch.arange(logits.shape[1], device=logits.device)
        return F.binary_cross_entropy_with_logits(logits, above.to(logits.dtype))


def grades(logits: Tensor) -> Tensor:
    """The grade that B x (grades - 1) logits tell: how many questions are more likely answered by yes."""
    return (logits > 0).sum(1)
