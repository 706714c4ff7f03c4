"""The discriminator's hinge loss: Lim and Ye 2017, https://arxiv.org/abs/1705.02894."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["hinge_loss"]


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half the hinge losses of logits of real images, wanted above 1, and of fake ones, wanted below -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())
