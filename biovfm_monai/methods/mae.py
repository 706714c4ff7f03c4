"""Masked autoencoder: He et al. 2021, https://arxiv.org/abs/2111.06377, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.errors import InputError, require_within
from biovfm_monai.methods.base import SSLMethod, images_of_batch, keys_of_batch
from biovfm_monai.networks import Block, Patches, ViT, random_mask, sincos_positions, take_tokens, unpatchify
from biovfm_monai.networks.blocks import init_weights
from biovfm_monai.networks.patch_embed import predict_patches

__all__ = ["MAE"]


class MAE(SSLMethod):
    """Hide most patches, encode the rest, and predict the pixels of the hidden ones.

    Args:
        encoder: sees the visible patches only.
        mask_ratio: share of patches that is hidden.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder's size.
        norm_pix_loss: predict each patch with its own mean and standard deviation taken out.

    Raises:
        InputError: when decoder_num_heads does not divide decoder_embed_dim.
    """

    encoder: ViT
    pictures = ("masked", "reconstructed")

    def __init__(
        self,
        encoder: ViT,
        mask_ratio: float = 0.75,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        require_within(1, whole=True, decoder_embed_dim=decoder_embed_dim, decoder_num_heads=decoder_num_heads)
        if decoder_embed_dim % decoder_num_heads:
            raise InputError(
                f"decoder_num_heads {decoder_num_heads} must divide decoder_embed_dim {decoder_embed_dim}. Correct one."
            )
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(
            decoder_embed_dim, math.prod(encoder.patch_embed.patch_size) * encoder.in_channels
        )
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared error over the hidden patches of batch["image"], B x C x (D) x H x W.

        batch["anisotropy"], if there, is the degree of anisotropy of all its images: one number, or B equal ones;
        batch["key"] tells what is hidden of each (`uniform`).
        """
        patches = self._patches(batch)
        keep, hidden = self._mask(patches, batch)
        prediction = self._predict(patches, keep, hidden)
        target = take_tokens(patches.voxels, hidden).float()
        if self.norm_pix_loss:
            target = _normalise(target)[0]
        return {"loss": F.mse_loss(prediction.float(), target)}

    @torch.no_grad()
    def reconstruct(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Show what the network sees and what it fills in.

        Returns:
            The masked image (hidden patches at 0) and the reconstruction (visible patches as they were, hidden ones
            predicted, given back the mean and standard deviation of the truth when norm_pix_loss took them out);
            both B x C x D x H x W.
        """
        patches = self._patches(batch)
        keep, hidden = self._mask(patches, batch)
        prediction = self._predict(patches, keep, hidden).to(patches.voxels.dtype)
        if self.norm_pix_loss:
            _, mean, std = _normalise(take_tokens(patches.voxels, hidden))
            prediction = prediction * std + mean
        index = hidden[..., None].expand_as(prediction)
        stride = self.encoder.patch_embed.stride(patches.anisotropy)
        masked = patches.voxels.scatter(1, index, 0.0)
        filled = masked.scatter(1, index, prediction)
        return unpatchify(masked, stride, patches.grid_size), unpatchify(filled, stride, patches.grid_size)

    def _patches(self, batch: Mapping[str, Tensor]) -> Patches:
        return self.encoder.patchify(images_of_batch(batch, "image"), degree_of_batch(batch))

    def _mask(self, patches: Patches, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        b, length = patches.voxels.shape[:2]
        return random_mask(keys_of_batch(batch, b, patches.voxels.device), length, self.mask_ratio)

    def _predict(self, patches: Patches, keep: Tensor, hidden: Tensor) -> Tensor:
        """Predicted pixels of the hidden patches: B x hidden x voxels."""
        prefix = self.encoder.num_prefix_tokens
        tokens = self.encoder.encode(*self.encoder.embed(patches, keep))[0]
        visible = self.decoder_embed(tokens)
        width = visible.shape[2]
        table = sincos_positions(patches.grid_size, width, self.encoder.spatial_dims, visible.device).to(visible.dtype)
        x = torch.cat(
            [visible[:, :prefix], visible[:, prefix:] + table[keep], self.mask_token.to(visible) + table[hidden]], dim=1
        )
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x[:, -hidden.shape[1] :])
        depth = self.encoder.patch_embed.stride(patches.anisotropy)[0]
        return predict_patches(x, self.decoder_pred, depth, self.encoder.patch_embed.patch_size[0])


def _normalise(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches with mean 0 and variance 1, and their mean and standard deviation."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    std = (variance + 1e-6).sqrt()
    return (patches - mean).div_(std), mean, std
