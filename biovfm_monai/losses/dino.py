"""What DINOv2 is made of (https://arxiv.org/abs/2304.07193): soft assignment to prototypes, and spreading out.

All of it is in float32, and over the rows of all processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai import distributed
from biovfm_monai.losses.precision import without_autocast

__all__ = ["koleo", "prototype_usage", "row_entropy", "sinkhorn", "soft_cross_entropy"]

_LEAST = 1e-30


def sinkhorn(scores: Tensor, temperature: float | Tensor, iterations: int = 3) -> Tensor:
    """Share images out over prototypes, of which each gets as much (https://arxiv.org/abs/2006.09882).

    Args:
        scores: N x K, of this process's images for each prototype.
        temperature: the scores are divided by; their range over it stays below 67, or rows lose their sum of 1.
        iterations: of Sinkhorn and Knopp's scaling of prototypes and images in turn.

    Returns:
        N x K, each row with a sum of 1; N may differ between processes, and be 0.
    """
    # Autocast would make the products ones of half precision, in which their reciprocals overflow.
    with torch.no_grad(), without_autocast(scores.device):
        return _sinkhorn(scores.float() / temperature, iterations)


def _sinkhorn(scaled: Tensor, iterations: int) -> Tensor:
    # No row overflows, and all of them are weighed as if the largest score of all had been taken out.
    most = scaled.amax(dim=1)
    shares = scaled.sub_(most[:, None]).exp_()
    largest = distributed.most(most.amax() if len(most) else scaled.new_tensor(-torch.inf))
    of_rows = (most - largest).exp()
    for _ in range(iterations):
        of_columns = 1 / distributed.total(of_rows @ shares).clamp(min=_LEAST)
        of_columns /= of_columns.mean()
        of_rows = 1 / (shares @ of_columns).clamp(min=_LEAST)
    return shares.mul_(of_columns).mul_(of_rows[:, None])


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row's student scores, divided by a temperature, under the teacher's shares: N x K to N."""
    scaled = student.float() / temperature
    return teacher.sum(1) * scaled.logsumexp(1) - (teacher * scaled).sum(1)


def row_entropy(shares: Tensor) -> Tensor:
    """Entropy of each row of N x K shares, as a share of its largest value, ln K: N values from 0 to 1."""
    return -torch.xlogy(shares, shares).sum(1) / math.log(shares.shape[1])


@torch.no_grad()
def prototype_usage(scores: Tensor) -> Tensor:
    """Share of the prototypes that images use: the exponential of the entropy of how often each is likeliest, over K.

    It is 1 / K where one prototype is the likeliest of all images of all processes, N / K where each image has another.

    Args:
        scores: N x K, or shares; N may differ between processes.
    """
    counts = scores.new_zeros(scores.shape[1]).scatter_add_(0, scores.argmax(1), scores.new_ones(len(scores)))
    used = distributed.total(counts)
    return scores.shape[1] ** (row_entropy((used / used.sum())[None])[0] - 1)


def koleo(embedding: Tensor, eps: float = 1e-4) -> Tensor:
    """Minus the mean logarithm of each row's distance to its nearest other one: small where rows spread out.

    The differential entropy estimator of Kozachenko and Leonenko (https://arxiv.org/abs/1806.03198).

    Args:
        embedding: N x C; rows are brought to unit length.
        eps: least distance, so that two equal images do no harm.

    Returns:
        A scalar; zero where there is one row only, which has no other.
    """
    with without_autocast(embedding.device):
        own = F.normalize(embedding.float(), dim=1)
        rows = distributed.gather(own)
        if len(rows) < 2:
            return own.sum() * 0
        first = distributed.rank() * len(own)
        with torch.no_grad():
            likeness = own @ rows.T
            likeness[torch.arange(len(own)), first + torch.arange(len(own))] = -2
            nearest = likeness.argmax(dim=1)
        squared = (own - rows[nearest]).square().sum(1)
        return -squared.clamp(min=eps**2).sqrt().log().mean()
