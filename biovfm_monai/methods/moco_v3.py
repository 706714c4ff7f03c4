"""MoCo v3: Chen, Xie and He 2021, https://arxiv.org/abs/2104.02057, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.errors import require_within
from biovfm_monai.losses import info_nce
from biovfm_monai.methods.base import SSLMethod, images_of_batch
from biovfm_monai.methods.projector import projector
from biovfm_monai.methods.teacher import Teacher, rising
from biovfm_monai.networks import ViT
from biovfm_monai.networks.heads import pool

__all__ = ["MoCoV3"]


class MoCoV3(SSLMethod):
    """Tell the other view of an image, as a slowly moving teacher sees it, from the views of other images.

    Args:
        encoder: of the views; what is compared is the vector its global_pool makes, the paper's is the class "token".
        hidden_dim, projection_dim: widths of projector and predictor inside and at their ends.
        temperature: of the cosines.
        momentum: share of the teacher that a step keeps at first; it rises to 1 along half a cosine.
        freeze_patch_embed: leave the projection of patches as it is, without which training was unstable.

    Raises:
        InputError: when a number means nothing.
    """

    encoder: ViT

    def __init__(
        self,
        encoder: ViT,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        temperature: float = 0.2,
        momentum: float = 0.99,
        freeze_patch_embed: bool = True,
    ) -> None:
        super().__init__()
        require_within(0, above=True, temperature=temperature)
        require_within(0, 1, momentum=momentum)
        self.temperature, self.momentum = temperature, momentum
        self.encoder = encoder
        if freeze_patch_embed:
            encoder.patch_embed.requires_grad_(False)
        self.projector = projector([encoder.embed_dim, hidden_dim, hidden_dim, projection_dim], last_norm=True)
        self.predictor = projector([projection_dim, hidden_dim, projection_dim], last_norm=True)
        self.teacher = Teacher(encoder)
        self.teacher_projector = Teacher(self.projector)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """InfoNCE between the two views in batch["global_crops"], both ways, over the images of all processes.

        Raises:
            InputError: when there are not two of them.
        """
        crops, degree = images_of_batch(batch, "global_crops", 2), degree_of_batch(batch)
        views = crops.flatten(0, 1)
        seen = pool(self.encoder(views, degree), self.encoder)
        known = pool(self.teacher(views, degree), self.encoder)
        # Batch norm takes one view at a time, as when each is a batch of its own.
        first, second = (self.predictor(self.projector(rows)) for rows in seen.chunk(2))
        first_key, second_key = (self.teacher_projector(rows) for rows in known.chunk(2))
        loss = info_nce(first, second_key, self.temperature) + info_nce(second, first_key, self.temperature)
        return {"loss": loss}

    def after_step(self, progress: float) -> None:
        """Move the teacher a step after the student."""
        momentum = rising(self.momentum, 1.0, progress)
        self.teacher.follow(self.encoder, momentum)
        self.teacher_projector.follow(self.projector, momentum)
