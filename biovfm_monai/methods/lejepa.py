"""LeJEPA: Balestriero and LeCun 2025, https://arxiv.org/abs/2511.08544, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.errors import InputError, require_within
from biovfm_monai.losses import sigreg
from biovfm_monai.methods.base import SSLMethod, images_of_batch, small_views
from biovfm_monai.methods.projector import projector
from biovfm_monai.networks import ViT
from biovfm_monai.networks.heads import pool

__all__ = ["LeJEPA"]


class LeJEPA(SSLMethod):
    """Bring the views of an image together while each view's images stay normally distributed; no teacher.

    Args:
        encoder: of the views, large and small; what is compared is the vector its global_pool makes.
        projector_dims: widths of the projector's layers.
        sigreg_weight: share of SIGReg in the loss, the paper's lambda; the rest is the views' distance.
        num_slices: random directions that SIGReg looks along, other ones in each step.

    Raises:
        InputError: when a number means nothing.
    """

    encoder: ViT
    step: Tensor

    def __init__(
        self,
        encoder: ViT,
        projector_dims: Sequence[int] = (2048, 2048, 128),
        sigreg_weight: float = 0.05,
        num_slices: int = 1024,
    ) -> None:
        super().__init__()
        require_within(0, 1, sigreg_weight=sigreg_weight)
        require_within(1, whole=True, num_slices=num_slices)
        self.sigreg_weight, self.num_slices = sigreg_weight, num_slices
        self.encoder = encoder
        self.projector = projector([encoder.embed_dim, *projector_dims])
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of batch["global_crops"] and, if there, batch["local_crops"], and its two terms.

        "invariance" is the mean squared distance of all views to the mean of the global ones, per number as in the
        paper's listing; "sigreg" the mean of the views'.

        Raises:
            InputError: when an image has a single view, or small ones do not divide into patches.
        """
        crops, degree = [images_of_batch(batch, "global_crops")], degree_of_batch(batch)
        local = small_views(batch, self.encoder.patch_embed, degree)
        if local is not None:
            crops.append(local)
        views = sum(len(part) for part in crops)
        if views < 2:
            raise InputError(
                "LeJEPA compares 2 views or more of an image, the batch has 1 global crop. "
                "Let biovfm_monai.data.MultiCrop make more."
            )
        embedded = torch.cat([self._embed(part.flatten(0, 1), degree) for part in crops])
        projected = self.projector(embedded).float().unflatten(0, (views, -1))
        centre = projected[: len(crops[0])].mean(0)
        invariance = (projected - centre).square().mean()
        spread = torch.stack([sigreg(rows, self.step, self.num_slices) for rows in projected]).mean()
        loss = (1 - self.sigreg_weight) * invariance + self.sigreg_weight * spread
        return {"loss": loss, "invariance": invariance, "sigreg": spread}

    def after_step(self, progress: float) -> None:  # noqa: ARG002
        """Look along other directions in the next step."""
        self.step += 1

    def _embed(self, images: Tensor, degree: int | None) -> Tensor:
        return pool(self.encoder(images, degree), self.encoder)
