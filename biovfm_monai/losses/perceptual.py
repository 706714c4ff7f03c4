"""Distance of images in feature maps, as LPIPS takes it: https://arxiv.org/abs/1801.03924."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["perceptual_loss"]


def perceptual_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared distance of feature vectors, mean over images and positions, sum over layers.

    Args:
        features, targets: one map per layer, B x channels x ..., of the two images; their network gives vectors the
            length that they are to count with.
    """
    layers = [
        (one.float() - other.float()).square().sum(1).mean() for one, other in zip(features, targets, strict=True)
    ]
    return sum(layers[1:], layers[0])
