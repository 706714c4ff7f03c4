"""SimMIM: Xie et al. 2021, https://arxiv.org/abs/2111.09886, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.errors import InputError, require_within
from biovfm_monai.methods.base import SSLMethod, images_of_batch, keys_of_batch
from biovfm_monai.networks import Patches, ViT, take_tokens
from biovfm_monai.networks.blocks import init_weights
from biovfm_monai.networks.masking import cube_mask
from biovfm_monai.networks.patch_embed import predict_patches

__all__ = ["SimMIM"]


class SimMIM(SSLMethod):
    """Put a token in place of masked patches, encode all, and predict the masked pixels with one linear layer.

    Args:
        encoder: sees visible patches and mask tokens.
        mask_ratio: share of blocks that is masked.
        mask_size: side of a masked block in pixels of a slice, a multiple of the patch; a block of a volume is a cube
            of that side where the volume is as deep, and holds fewer slices where they are thick.

    Raises:
        InputError: when mask_size is no multiple of the patch.
    """

    encoder: ViT

    def __init__(self, encoder: ViT, mask_ratio: float = 0.6, mask_size: int = 32) -> None:
        super().__init__()
        require_within(1, whole=True, mask_size=mask_size)
        _, height, width = encoder.patch_embed.patch_size
        if mask_size % height or mask_size % width:
            raise InputError(f"mask_size {mask_size} must be a multiple of the patch {(height, width)}. Correct it.")
        self.encoder = encoder
        self.mask_ratio, self.mask_size = mask_ratio, mask_size
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
        self.head = nn.Linear(encoder.embed_dim, math.prod(encoder.patch_embed.patch_size) * encoder.in_channels)
        self.head.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean absolute error over the masked pixels of batch["image"], B x C x (D) x H x W.

        batch["key"], if there, tells what is masked of each (`uniform`).
        """
        patches = self.encoder.patchify(images_of_batch(batch, "image"), degree_of_batch(batch))
        mask, hidden = self._mask(patches, batch)
        x, angles = self.encoder.embed(patches)
        prefix = self.encoder.num_prefix_tokens
        token: Tensor = self.mask_token
        positions = self.encoder.positions(patches.grid_size, x.device)
        if positions is not None:
            token = token + positions
        x = torch.cat([x[:, :prefix], torch.where(mask[..., None], token.to(x.dtype), x[:, prefix:])], dim=1)
        encoded = self.encoder.encode(x, angles)[0][:, prefix:]
        depth, full = self.encoder.patch_embed.stride(patches.anisotropy)[0], self.encoder.patch_embed.patch_size[0]
        prediction = predict_patches(take_tokens(encoded, hidden), self.head, depth, full)
        return {"loss": F.l1_loss(prediction.float(), take_tokens(patches.voxels, hidden).float())}

    def _mask(self, patches: Patches, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Which tokens are masked, and their numbers, as from `cube_mask`."""
        depth, height, width = self.encoder.patch_embed.stride(patches.anisotropy)
        slices = max((self.mask_size >> patches.anisotropy) // depth, 1)
        cube = (min(slices, patches.grid_size[0]), self.mask_size // height, self.mask_size // width)
        keys = keys_of_batch(batch, len(patches.voxels), patches.voxels.device)
        return cube_mask(keys, patches.grid_size, cube, self.mask_ratio)
