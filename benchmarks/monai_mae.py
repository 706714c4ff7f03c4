"""MONAI's masked autoencoder with MAE's loss, the peer of the benchmarks of speed and of quality."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import MaskedAutoEncoderViT
from torch import Tensor, nn

from biovfm_monai.networks import patchify


class MonaiMAE(nn.Module):
    """MONAI's network returns predictions and a mask; this adds the loss that MAE asks for.

    Args:
        channels: of images.
        img_size: (height, width) or (depth, height, width).
        patch_size: pixels along each axis.
        encoder, decoder: width, depth and heads of each.
    """

    def __init__(
        self,
        channels: int,
        img_size: tuple[int, ...],
        patch_size: int,
        encoder: tuple[int, int, int],
        decoder: tuple[int, int, int],
    ) -> None:
        super().__init__()
        (width, depth, heads), (decoder_width, decoder_depth, decoder_heads) = encoder, decoder
        self.net = MaskedAutoEncoderViT(
            channels, img_size, patch_size, width, 4 * width, depth, heads, 0.75, decoder_width, 4 * decoder_width,
            decoder_depth, decoder_heads, spatial_dims=len(img_size), qkv_bias=True, decoder_pos_embed_type="learnable",
        )  # fmt: skip
        self.patch = (1, patch_size, patch_size) if len(img_size) == 2 else (patch_size,) * 3

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Mean squared error on hidden patches of batch["image"], each normalised."""
        image = batch["image"]
        prediction, mask = self.net(image)
        target = patchify(image[:, :, None] if image.ndim == 4 else image, self.patch)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = ((prediction.float() - target) ** 2).mean(-1)
        return {"loss": (error * mask).sum() / mask.sum()}

    def embed(self, image: Tensor) -> Tensor:
        """Mean of the patch tokens of B x C x (D) x H x W: B x width."""
        tokens = self.net.patch_embedding(image)
        tokens = torch.cat([self.net.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.net.blocks(tokens)[:, 1:].mean(1)
