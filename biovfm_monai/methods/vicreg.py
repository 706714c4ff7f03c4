"""VICReg: Bardes, Ponce and LeCun 2022, https://arxiv.org/abs/2105.04906, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai import distributed
from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.errors import require_within
from biovfm_monai.losses.precision import without_autocast
from biovfm_monai.methods.base import SSLMethod, images_of_batch
from biovfm_monai.methods.projector import projector
from biovfm_monai.networks import ViT
from biovfm_monai.networks.heads import pool

__all__ = ["VICReg"]

_GAMMA, _EPS = 1.0, 1e-4


class VICReg(SSLMethod):
    """Bring two views of an image together, while each number varies over images, and with no other number.

    Args:
        encoder: of the views; what is projected is the vector its global_pool makes.
        projector_dims: widths of the projector's layers, the paper's expander.
        invariance_weight: of the squared distance of two views.
        variance_weight: of what standard deviations lack of 1.
        covariance_weight: of the squared covariances of different numbers.
    """

    encoder: ViT

    def __init__(
        self,
        encoder: ViT,
        projector_dims: Sequence[int] = (8192, 8192, 8192),
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
    ) -> None:
        super().__init__()
        require_within(
            0, invariance_weight=invariance_weight, variance_weight=variance_weight, covariance_weight=covariance_weight
        )
        self.weights = (invariance_weight, variance_weight, covariance_weight)
        self.encoder = encoder
        self.projector = projector([encoder.embed_dim, *projector_dims])

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the two views in batch["global_crops"], with variances over all processes, and its three terms.

        "invariance" is a mean over images and numbers, as in the paper's listing; "variance" and "covariance" are sums
        over the two views of means over numbers.

        Raises:
            InputError: when there are not two views.
        """
        crops, degree = images_of_batch(batch, "global_crops", 2), degree_of_batch(batch)
        rows = pool(self.encoder(crops.flatten(0, 1), degree), self.encoder)
        # Batch norm takes one view at a time.
        views = [self.projector(part).float() for part in rows.chunk(2)]
        with without_autocast(crops.device):
            invariance = F.mse_loss(*views)
            covariances = [_covariance(view) for view in views]
        own = torch.stack([covariance.diagonal() for covariance in covariances])
        variance = F.relu(_GAMMA - (own + _EPS).sqrt()).mean(1).sum()
        squares = torch.stack([covariance.square().sum() for covariance in covariances])
        covariance = (squares.sum() - own.square().sum()) / own.shape[1]
        terms = (invariance, variance, covariance)
        loss = torch.stack([weight * term for weight, term in zip(self.weights, terms, strict=True)]).sum()
        return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


def _covariance(rows: Tensor) -> Tensor:
    """Of the numbers of N x C rows, over those of all processes: C x C; 0 for a single row."""
    count = len(rows) * distributed.world_size()
    rows = rows - distributed.total(rows.sum(0)) / count
    return distributed.total(rows.T @ rows) / max(count - 1, 1)
