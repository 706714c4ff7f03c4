"""From tokens to one vector per image, and to its classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.errors import InputError, require_within
from biovfm_monai.networks.vit import ViT

__all__ = ["AttentivePool", "ClassToken", "Classifier", "Embedder", "MaxPatches", "MeanPatches", "pool"]


def as_slices(image: Tensor, spatial_dims: int) -> tuple[Tensor, int]:
    """What an encoder reads at once, and of how many slices an image is: all of a volume for an encoder of volumes.

    For one of 2D images B x C x D x H x W becomes (B D) x C x H x W.
    """
    if spatial_dims == 2 and image.ndim == 5:
        return image.transpose(1, 2).flatten(0, 1), image.shape[2]
    return image, 1


def pool(tokens: Tensor, encoder: ViT) -> Tensor:
    """One vector per image, B x embed_dim, of its B x (prefix + L) x embed_dim tokens, by an encoder's global_pool."""
    return _POOLS[encoder.global_pool]()(tokens, encoder.num_prefix_tokens)


class ClassToken(nn.Module):
    """The class token."""

    def forward(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """Map B x (prefix + L) x embed_dim to B x embed_dim.

        Raises:
            InputError: when there is none.
        """
        if num_prefix_tokens == 0:
            raise InputError("the encoder has no class token. Pool its patches.")
        return tokens[:, 0]


class MeanPatches(nn.Module):
    """The mean of the patches' tokens."""

    def forward(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """Map B x (prefix + L) x embed_dim to B x embed_dim."""
        return tokens[:, num_prefix_tokens:].mean(1)


class MaxPatches(nn.Module):
    """The largest of the patches' tokens, number by number."""

    def forward(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """Map B x (prefix + L) x embed_dim to B x embed_dim."""
        return tokens[:, num_prefix_tokens:].amax(1)


class AttentivePool(nn.Module):
    """A mean of all tokens, weighted by a learned query's attention, as in V-JEPA's probe (https://arxiv.org/abs/2404.08471).

    Args:
        embed_dim, num_heads: as of the encoder.

    Raises:
        InputError: when num_heads does not divide embed_dim.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise InputError(f"num_heads {num_heads} must divide embed_dim {embed_dim}. Correct it.")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.key_value, self.proj = nn.Linear(embed_dim, 2 * embed_dim), nn.Linear(embed_dim, embed_dim)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:  # noqa: ARG002
        """Map B x (prefix + L) x embed_dim to B x embed_dim."""
        b, n, c = tokens.shape
        heads = self.num_heads
        k, v = self.key_value(tokens).view(b, n, 2, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query.view(1, 1, heads, c // heads).transpose(1, 2).expand(b, -1, -1, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, c))


_POOLS = {"avg": MeanPatches, "max": MaxPatches, "token": ClassToken}


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
        image, slices = as_slices(image, self.encoder.spatial_dims)
        tokens = self.encoder(image, anisotropy, spacing=spacing)
        pooled = pool(tokens, self.encoder)
        return pooled.unflatten(0, (-1, slices)).mean(1)


class Classifier(nn.Module):
    """Logits of an image's classes: encoder, pooling, and a linear head.

    One class out of several is trained with torch's `CrossEntropyLoss`, several findings at once with its
    `BCEWithLogitsLoss`, grades with `biovfm_monai.losses.OrdinalLoss` and one logit fewer than there are grades.
    An encoder of 2D images reads a volume slice by slice, and the head gets the mean over slices.

    Args:
        encoder: fresh, or from `load_encoder` or `encoder_to_finetune`.
        out_channels: logits.
        pooling: `MeanPatches`, `MaxPatches`, `ClassToken` or an `AttentivePool`; None for the encoder's global_pool.

    Raises:
        InputError: on no logit.
    """

    def __init__(self, encoder: ViT, out_channels: int, pooling: nn.Module | None = None) -> None:
        super().__init__()
        require_within(1, whole=True, out_channels=out_channels)
        self.encoder, self.out_channels = encoder, out_channels
        self.pooling = _POOLS[encoder.global_pool]() if pooling is None else pooling
        self.head = nn.Linear(encoder.embed_dim, out_channels)

    def forward(self, image: Tensor, anisotropy: int | None = None, spacing: list[float] | None = None) -> Tensor:
        """Map B x C x (D) x H x W to B x out_channels; anisotropy and spacing as in `ViT.patchify`."""
        image, slices = as_slices(image, self.encoder.spatial_dims)
        tokens = self.encoder(image, anisotropy, spacing=spacing)
        pooled = self.pooling(tokens, self.encoder.num_prefix_tokens)
        return self.head(pooled.unflatten(0, (-1, slices)).mean(1))
