"""Schedules of learning rate and weight decay: linear warm-up, then cosine (https://arxiv.org/abs/1608.03983)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from biovfm_monai.errors import InputError, require_within

__all__ = ["WarmupCosine", "parameter_groups", "scaled_rate"]

_BLOCK = re.compile(r"(?:^|\.)encoder\.blocks\.(\d+)\.")
_BEFORE = re.compile(r"(?:^|\.)encoder\.(?:patch_embed|cls_token|reg_token|pos_embed|cls_pos)\b")
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


def scaled_rate(base: float, batch_size: int, base_batch_size: int, rule: str = "linear") -> float:
    """The learning rate of a batch size, given that of another one.

    Args:
        base: learning rate that is known to work for base_batch_size images a step.
        batch_size: images a step, over all processes.
        base_batch_size: likewise.
        rule: "linear" in the batch size (https://arxiv.org/abs/1706.02677), or with its square "root", which suits
            Adam (https://arxiv.org/abs/2205.10287).

    Raises:
        InputError: on a size that is no number above 0, or an unknown rule.
    """
    require_within(0, above=True, batch_size=batch_size, base_batch_size=base_batch_size)
    if rule not in ("linear", "root"):
        raise InputError(f"rule {rule!r} must be 'linear' or 'root'. Give one of them.")
    return base * batch_size / base_batch_size if rule == "linear" else base * (batch_size / base_batch_size) ** 0.5


def parameter_groups(
    module: nn.Module, layer_decay: float = 1.0, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices, and vectors (biases, norms) and tokens, which do not decay.

    Args:
        module: a method, or its parallel wrapper.
        layer_decay: the learning rate of each of the encoder's blocks, as a share of that of the one after it
            (https://arxiv.org/abs/2106.08254); what comes before the first block has once more that share.
        lr_scales: name of a part of the module, such as "patch_embed" or "discriminator" -> factor of its learning
            rate.

    Raises:
        InputError: when there is no such part.
    """
    lr_scales = dict(lr_scales or {})
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depth = 1 + max((int(match[1]) for name, _ in named if (match := _BLOCK.search(name))), default=-1)
    for name, p in named:
        free = p.ndim < 2 or name.endswith(_FREE)
        block = _BLOCK.search(name)
        layer = int(block[1]) + 1 if block else 0 if _BEFORE.search(name) else depth + 1
        scale = layer_decay ** (depth + 1 - layer)
        scale *= math.prod(factor for part, factor in lr_scales.items() if part in name.split("."))
        groups.setdefault((free, scale), []).append(p)
    parts = {part for name, _ in named for part in name.split(".")}
    if missing := set(lr_scales) - parts:
        raise InputError(f"there is no part {', '.join(sorted(missing))} to give a learning rate. Correct lr_scales.")
    made: list[dict[str, Any]] = []
    for (free, scale), parameters in sorted(groups.items(), key=lambda group: group[0][0]):
        decay = {"weight_decay": 0.0, "weight_decay_scale": 0.0} if free else {}
        made.append({"params": parameters, **decay, **({"lr_scale": scale} if scale != 1 else {})})
    return made
