"""The head of DINO (https://arxiv.org/abs/2104.14294): from tokens to prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PrototypeHead"]


class PrototypeHead(nn.Module):
    """From a token to its likeness, -1 to 1, to each of many prototypes of unit length.

    Args:
        embed_dim: of a token.
        prototypes: how many.
        hidden_dim, bottleneck_dim: widths of the layers between.
    """

    def __init__(self, embed_dim: int, prototypes: int, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck_dim))
        for parameter in self.parameters():
            nn.init.zeros_(parameter) if parameter.ndim == 1 else nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor, free: Tensor | None = None) -> Tensor:
        """Map N x embed_dim to N x prototypes, float32; where `free` is 0, prototypes get a gradient of zero."""
        return self.likeness(self.embed(x), free)

    def embed(self, x: Tensor) -> Tensor:
        """Map N x embed_dim to N x bottleneck_dim of unit length."""
        return F.normalize(self.layers(x).float(), dim=1, eps=1e-6)

    def likeness(self, embedding: Tensor, free: Tensor | None = None) -> Tensor:
        """Map N x bottleneck_dim to N x prototypes."""
        prototypes: Tensor = self.prototypes
        # Of torch's ways to unit length this kernel, of parametrizations.weight_norm, reads and writes least.
        unit = torch._weight_norm(prototypes, prototypes.new_ones(len(prototypes), 1), 0)
        if free is not None and unit.requires_grad:
            unit.register_hook(lambda gradient: gradient * free)
        return F.linear(embedding, unit).float()
