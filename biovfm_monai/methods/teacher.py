"""A teacher that is the moving average of its student (mean teacher, https://arxiv.org/abs/1703.01780)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from biovfm_monai.parallelism import local

__all__ = ["Teacher", "rising"]


class Teacher(nn.Module):
    """A moving average of a network: part of the state, never trained, always in evaluation mode.

    Args:
        student: whose weights it starts with.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.network: Any = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002 - drop-path never applies here
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network, without gradient."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """Keep `momentum` of the weights, and take the rest from the student."""
        own, others = ([local(p.detach()) for p in network.parameters()] for network in (self.network, student))
        torch._foreach_lerp_(own, others, 1 - momentum)


def rising(start: float, end: float, progress: float) -> float:
    """A value that goes from start to end along half a cosine as progress goes from 0 to 1."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress))
