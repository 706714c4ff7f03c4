"""Projectors: small networks that a loss compares images through, and that are left behind after training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from biovfm_monai import distributed
from biovfm_monai.errors import InputError, require_within

__all__ = ["BatchNorm", "projector"]


class BatchNorm(nn.Module):
    """Normalise by the statistics of the rows of all processes (https://arxiv.org/abs/1502.03167), in float32.

    It keeps none of them, since projectors serve in training only; and works on CPUs, where torch's own does not.

    Args:
        width: of a row.
        affine: whether there are learned factors and offsets.
    """

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Map N x width to the same.

        Raises:
            InputError: when there is one row, of which nothing would be left.
        """
        rows = x.float()
        count = rows.shape[0] * distributed.world_size()
        if count < 2:
            raise InputError(
                "batch norm compares images, and a step has 1. Raise --batch_size, or lower --accumulation_steps."
            )
        mean = distributed.total(rows.sum(0)) / count
        variance = distributed.total((rows - mean).square().sum(0)) / count
        rows = (rows - mean) * (variance + 1e-5).rsqrt()
        if self.weight is not None and self.bias is not None:
            rows = rows * self.weight + self.bias
        return rows.to(x.dtype)


def projector(widths: Sequence[int], last_norm: bool = False) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between.

    Args:
        widths: of the input, of each hidden layer, and of the output.
        last_norm: whether the output is normalised, too, without learned factors.

    Raises:
        InputError: when a width is none.
    """
    require_within(1, whole=True, widths=widths)
    layers: list[nn.Module] = []
    for number, (width, following) in enumerate(pairwise(widths)):
        last = number == len(widths) - 2
        layers.append(nn.Linear(width, following, bias=last and not last_norm))
        if not last:
            layers += [BatchNorm(following), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(BatchNorm(following, affine=False))
    return nn.Sequential(*layers)
