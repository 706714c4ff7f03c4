"""From tokens to one vector per image."""

from __future__ import annotations

from torch import Tensor, nn

from biovfm_monai.networks.vit import ViT

__all__ = ["Embedder"]


class Embedder(nn.Module):
    """One vector per image of an encoder's tokens, by its global_pool.

    A 2D encoder reads a volume slice by slice; the volume's vector is the mean over its slices.

    Args:
        encoder: maps an image to tokens, prefix tokens first.
    """

    def __init__(self, encoder: ViT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor, anisotropy: int | None = None, spacing: list[float] | None = None) -> Tensor:
        """Map B x C x (D) x H x W to B x embed_dim; anisotropy and spacing as in `ViT.patchify`."""
        slices = 1
        if self.encoder.spatial_dims == 2 and image.ndim == 5:
            slices = image.shape[2]
            image = image.transpose(1, 2).flatten(0, 1)
        return self._pool(self.encoder(image, anisotropy, spacing=spacing)).unflatten(0, (-1, slices)).mean(1)

    def _pool(self, tokens: Tensor) -> Tensor:
        if self.encoder.global_pool == "token":
            return tokens[:, 0]
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        return patches.mean(1) if self.encoder.global_pool == "avg" else patches.amax(1)
