"""Feature maps of a frozen encoder, to compare images by as LPIPS does (https://arxiv.org/abs/1801.03924)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.networks.vit import ViT

__all__ = ["EncoderFeatures"]


class EncoderFeatures(nn.Module):
    """Feature maps of 2D images after blocks of an encoder, whose weights stay as they are.

    Args:
        encoder: frozen here, and in evaluation mode always; takes images prepared as they are given.
        blocks: as in `ViT.features`; None for all.
    """

    def __init__(self, encoder: ViT, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.blocks = list(range(len(encoder.blocks)) if blocks is None else blocks)

    def train(self, mode: bool = True) -> EncoderFeatures:  # noqa: ARG002 - features are not to change
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map B x C x H x W to B x embed_dim x grid per block, vectors of unit length; gradients flow to the image."""
        return [F.normalize(x.float(), dim=1) for x in self.encoder.features(image, self.blocks)]
