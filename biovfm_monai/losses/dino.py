"""What DINOv2 is made of (https://arxiv.org/abs/2304.07193): soft assignment to prototypes, and spreading out.

All of it is in float32, and over the rows of all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai import distributed

__all__ = ["koleo", "sinkhorn", "soft_cross_entropy"]


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float | Tensor, iterations: int = 3) -> Tensor:
    """Share images out over prototypes, of which each gets as much (https://arxiv.org/abs/2006.09882).

    Args:
        scores: N x K, of this process's images for each prototype.
        temperature: the scores are divided by.
        iterations: of Sinkhorn and Knopp's scaling of prototypes and images in turn.

    Returns:
        N x K, each row with a sum of 1; N may differ between processes, and be 0.
    """
    # In logarithms nothing overflows.
    log = scores.float() / temperature
    for _ in range(iterations):
        log = log - _log_total(log)
        log = log.log_softmax(dim=1)
    return log.exp()


def _log_total(log: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials of the rows of all processes, per column; of no row, zero."""
    most = log.amax(0) if len(log) else log.new_full(log.shape[1:], -torch.inf)
    most = distributed.most(most)
    return distributed.total((log - most).exp().sum(0)).log() + most


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each row's student scores, divided by a temperature, under the teacher's shares: N x K to N."""
    return -(teacher * (student.float() / temperature).log_softmax(dim=1)).sum(1)


def koleo(embedding: Tensor, eps: float = 1e-4) -> Tensor:
    """Minus the mean logarithm of each row's distance to its nearest other one: small where rows spread out.

    The differential entropy estimator of Kozachenko and Leonenko (https://arxiv.org/abs/1806.03198).

    Args:
        embedding: N x C; rows are brought to unit length.
        eps: least distance, so that two equal images do no harm.

    Returns:
        A scalar; zero where there is one row only, which has no other.
    """
    with torch.autocast(embedding.device.type, enabled=False):
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
