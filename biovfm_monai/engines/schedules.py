"""Schedules of learning rate and weight decay: linear warm-up, then cosine (https://arxiv.org/abs/1608.03983)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["WarmupCosine", "parameter_groups"]

_FREE = ("bias", "token", "pos_embed", "cls_pos", "codebook")


@dataclass(frozen=True)
class WarmupCosine:
    """A value as a function of progress alone, so that a resumed run needs no state of it.

    Args:
        peak: value at the end of the warm-up.
        end: value at progress 1.
        warmup: share of the run over which the value rises linearly from 0 to the peak; MAE: 40 of 800 epochs.
    """

    peak: float
    end: float = 0.0
    warmup: float = 0.05

    def __call__(self, progress: float) -> float:
        """Value at a progress in [0, 1]."""
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        turn = (progress - self.warmup) / max(1 - self.warmup, 1e-12)
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * turn))


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, and vectors (biases, norms) and tokens, which do not decay."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    free = [p for name, p in named if p.ndim < 2 or name.endswith(_FREE)]
    ids = {id(p) for p in free}
    return [
        {"params": [p for _, p in named if id(p) not in ids]},
        {"params": free, "weight_decay": 0.0, "weight_decay_scale": 0.0},
    ]
