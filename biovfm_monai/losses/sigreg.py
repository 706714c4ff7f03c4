"""SIGReg: sketched isotropic Gaussian regularisation, Balestriero and LeCun 2025, https://arxiv.org/abs/2511.08544."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from biovfm_monai import distributed
from biovfm_monai.draws import Use, uniform
from biovfm_monai.losses.precision import without_autocast

__all__ = ["sigreg"]


def sigreg(rows: Tensor, key: Tensor, num_slices: int = 1024, knots: int = 17, last_knot: float = 3.0) -> Tensor:
    """How far the rows of all processes are from a standard normal distribution, in float32 under any autocast.

    The rows are projected on random directions; on each, the Epps-Pulley statistic compares their characteristic
    function with that of the standard normal, N * integral of |mean(exp(i t x)) - exp(-t^2 / 2)|^2 * exp(-t^2 / 2) dt.
    About 1 for normal rows, and growing with N for others.

    Args:
        rows: N x C; a gradient reaches those of all processes.
        key: one whole number, of the directions' random numbers; the same on all processes.
        num_slices: directions.
        knots: points of the trapezoidal rule from t = 0; the integrand is even, so they stand for negative t, too.
        last_knot: where the integral ends.

    Returns:
        The mean over directions.
    """
    with without_autocast(rows.device):
        projected = rows.float() @ _directions(key.to(rows.device), num_slices, rows.shape[1]).T
        t = torch.linspace(0, last_knot, knots, device=rows.device)
        angles = projected[..., None] * t
        count = rows.shape[0] * distributed.world_size()
        found = distributed.total(torch.stack([angles.cos().sum(0), angles.sin().sum(0)])) / count
        normal = (-0.5 * t.square()).exp()
        gap = (found[0] - normal).square() + found[1].square()
        return 2 * count * torch.trapezoid(gap * normal, t, dim=-1).mean()


def _directions(key: Tensor, count: int, width: int) -> Tensor:
    """Directions uniform on the sphere, count x width: normal numbers by their quantiles, then brought to length 1."""
    # Halfway between the numbers that `uniform` gives: at 0 the quantile is not finite.
    drawn = uniform(key.view(1), count * width, Use.DIRECTION).view(count, width).double() + 2.0**-25
    normal = math.sqrt(2) * torch.erfinv(2 * drawn - 1)
    return (normal / normal.norm(dim=1, keepdim=True)).float()
