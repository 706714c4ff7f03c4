"""Barlow Twins: Zbontar et al. 2021, https://arxiv.org/abs/2103.03230, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from biovfm_monai import distributed
from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.losses.precision import without_autocast
from biovfm_monai.methods.base import SSLMethod, images_of_batch
from biovfm_monai.methods.projector import projector
from biovfm_monai.networks import ViT
from biovfm_monai.networks.heads import pool

__all__ = ["BarlowTwins"]


class BarlowTwins(SSLMethod):
    """Make each number of a projection the same for two views of an image, and unlike all its other numbers.

    Args:
        encoder: of the views; what is projected is the vector its global_pool makes.
        projector_dims: widths of the projector's layers.
        redundancy_weight: of the correlations between different numbers, the paper's lambda.
    """

    encoder: ViT

    def __init__(
        self, encoder: ViT, projector_dims: Sequence[int] = (8192, 8192, 8192), redundancy_weight: float = 5e-3
    ) -> None:
        super().__init__()
        self.redundancy_weight = redundancy_weight
        self.encoder = encoder
        self.projector = projector([encoder.embed_dim, *projector_dims], last_norm=True)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the two views in batch["global_crops"], over the images of all processes, and its two terms.

        "invariance" and "redundancy" are sums over numbers, and over pairs of different ones, as in the paper.

        Raises:
            InputError: when there are not two views.
        """
        crops, degree = images_of_batch(batch, "global_crops", 2), degree_of_batch(batch)
        rows = pool(self.encoder(crops.flatten(0, 1), degree), self.encoder)
        # Batch norm takes one view at a time; the last one leaves numbers of mean 0 and variance 1.
        first, second = (self.projector(part) for part in rows.chunk(2))
        with without_autocast(first.device):
            count = len(first) * distributed.world_size()
            correlation = distributed.total(first.float().T @ second.float()) / count
        own = correlation.diagonal()
        invariance = (1 - own).square().sum()
        redundancy = correlation.square().sum() - own.square().sum()
        loss = invariance + self.redundancy_weight * redundancy
        return {"loss": loss, "invariance": invariance, "redundancy": redundancy}
