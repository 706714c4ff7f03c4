"""Which image to label next: the one least like all that are covered, or the one a network is least sure of.

Core sets: Sener and Savarese, https://arxiv.org/abs/1708.00489. Entropy: Settles, Active learning, 2009.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.metrics import pairwise_distances
from torch import Tensor

__all__ = ["farthest_first", "uncertainty"]


def farthest_first(candidates: np.ndarray, covered: np.ndarray) -> tuple[int, float]:
    """Choose the candidate whose nearest covered vector is farthest away; with none covered, the most central one.

    Args:
        candidates: vectors to choose from, N x D.
        covered: vectors of images that are labelled or given out, M x D.

    Returns:
        Its row, and that distance; with none covered, its mean distance to all.
    """
    if len(covered):
        nearest = pairwise_distances(candidates, covered).min(1)
        row = int(nearest.argmax())
        return row, float(nearest[row])
    means = pairwise_distances(candidates).mean(1)
    row = int(means.argmin())
    return row, float(means[row])


def uncertainty(logits: Tensor) -> float:
    """The mean entropy of what a network says of an image, from 0, certain everywhere, to 1, all classes alike.

    Args:
        logits: classes x voxels along any number of axes.
    """
    chances = torch.distributions.Categorical(logits=logits.movedim(0, -1).double())
    return float(chances.entropy().mean()) / math.log(len(logits))
