"""The contract of a self-supervised method: a network that returns its own loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from biovfm_monai.networks import ViT

__all__ = ["SSLMethod"]


class SSLMethod(nn.Module, ABC):
    """A network that learns an encoder without labels; it knows no optimizer, device, configuration or rank."""

    encoder: ViT

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scalar "loss" of a batch, and whatever else is worth logging or looking at."""

    def after_step(self, progress: float) -> None:
        """Update what follows the optimizer (a teacher, a temperature); progress runs from 0 to 1. Nothing here."""
