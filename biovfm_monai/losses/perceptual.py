"""Distance of images in feature maps, as LPIPS (https://arxiv.org/abs/1801.03924) without its learned weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

__all__ = ["perceptual_loss"]


def perceptual_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared distance of feature vectors of unit length, mean over images and positions, sum over layers.

    Args:
        features, targets: one map per layer, B x channels x ..., of the two images.
    """
    layers = [
        (F.normalize(one.float(), dim=1) - F.normalize(other.float(), dim=1)).square().sum(1).mean()
        for one, other in zip(features, targets, strict=True)
    ]
    return sum(layers[1:], layers[0])
