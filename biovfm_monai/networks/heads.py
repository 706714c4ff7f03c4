"""From tokens to one vector per image."""

from __future__ import annotations

from torch import Tensor, nn

from biovfm_monai.networks.vit import ViT

__all__ = ["Embedder", "pool"]


def pool(tokens: Tensor, encoder: ViT) -> Tensor:
    """One vector per image, B x embed_dim, of its B x (prefix + L) x embed_dim tokens, by an encoder's global_pool."""
    if encoder.global_pool == "token":
        return tokens[:, 0]
    patches = tokens[:, encoder.num_prefix_tokens :]
    return patches.mean(1) if encoder.global_pool == "avg" else patches.amax(1)


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
        tokens = self.encoder(image, anisotropy, spacing=spacing)
        pooled = pool(tokens, self.encoder)
        return pooled.unflatten(0, (-1, slices)).mean(1)
