"""Vision transformer (https://arxiv.org/abs/2010.11929) for 2D images and volumes: one tensor of tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.errors import InputError
from biovfm_monai.networks.blocks import Block, init_weights
from biovfm_monai.networks.masking import take_tokens
from biovfm_monai.networks.patch_embed import MAX_ANISOTROPY, PatchEmbed, patchify
from biovfm_monai.networks.positions import sincos_positions

__all__ = ["ViT", "vit_base", "vit_huge", "vit_large", "vit_small", "vit_tiny"]


class ViT(nn.Module):
    """Encoder with a class token, pre-norm blocks and a final norm.

    Args:
        in_channels: channels of the image.
        img_size: size the encoder is made for, (height, width) or (depth, height, width); any size whose axes are
            multiples of the patch is accepted in use.
        patch_size: voxels per token, one number or one per axis of img_size.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in timm.
        pos_embed: "sincos", fixed, or "learn", a grid made for img_size and resampled for other sizes.

    Raises:
        InputError: when img_size is no multiple of patch_size, or num_heads does not divide embed_dim.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        in_channels: int = 3,
        img_size: Sequence[int] = (224, 224),
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        pos_embed: str = "sincos",
    ) -> None:
        super().__init__()
        dims = len(img_size)
        sizes = (patch_size,) * dims if isinstance(patch_size, int) else tuple(patch_size)
        if dims not in (2, 3) or len(sizes) != dims or any(n % p for n, p in zip(img_size, sizes, strict=True)):
            raise InputError(f"img_size {tuple(img_size)} must be 2 or 3 multiples of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise InputError(f"num_heads {num_heads} must divide embed_dim {embed_dim}")
        if pos_embed not in ("sincos", "learn"):
            raise InputError(f"pos_embed must be 'sincos' or 'learn', got {pos_embed!r}")
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels, "img_size": list(img_size), "patch_size": list(sizes), "embed_dim": embed_dim,
            "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias,
            "pos_embed": pos_embed,
        }  # fmt: skip
        self.in_channels, self.embed_dim, self.spatial_dims = in_channels, embed_dim, dims
        self.img_size, self.patch_size = tuple(img_size), sizes
        volume_patch: Any = (1, *sizes) if dims == 2 else sizes
        self.patch_embed = PatchEmbed(in_channels, volume_patch, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        full_size = (1, *img_size) if dims == 2 else tuple(img_size)
        self._grid = tuple(n // p for n, p in zip(full_size, self.patch_embed.patch_size, strict=True))
        self.pos_embed = nn.Parameter(torch.empty(1, embed_dim, *self._grid)) if pos_embed == "learn" else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def prepare(self, image: Tensor, anisotropy: int | None = None) -> tuple[Tensor, int]:
        """Check an image and read it as a volume.

        Args:
            image: B x C x H x W (read as depth 1) or B x C x D x H x W, float.
            anisotropy: degree of anisotropy, 0 to 5; None means 5 for a 4-dimensional image and 0 for a volume.

        Returns:
            B x C x D x H x W and the degree of anisotropy.

        Raises:
            ValueError: on a wrong number of axes or channels, or a size that is no multiple of the patch.
        """
        if anisotropy is None:
            anisotropy = MAX_ANISOTROPY if image.ndim == 4 else 0
        if image.ndim == 4:
            image = image.unsqueeze(2)
        if image.ndim != 5 or image.shape[1] != self.in_channels:
            raise ValueError(
                f"the encoder takes {self.in_channels} channels and 4 or 5 axes, got shape {tuple(image.shape)}"
            )
        if not 0 <= anisotropy <= MAX_ANISOTROPY:
            raise ValueError(f"anisotropy must be 0 to {MAX_ANISOTROPY}, got {anisotropy}")
        stride = self.patch_embed.stride(anisotropy)
        if any(n % s for n, s in zip(image.shape[2:], stride, strict=True)):
            raise ValueError(f"image size {tuple(image.shape[2:])} must be a multiple of the patch {stride}")
        return image, anisotropy

    def grid_size(self, image: Tensor, anisotropy: int) -> tuple[int, int, int]:
        """Tokens along depth, height and width of a prepared image."""
        d, h, w = (n // s for n, s in zip(image.shape[2:], self.patch_embed.stride(anisotropy), strict=True))
        return d, h, w

    def positions(self, grid_size: tuple[int, int, int], device: torch.device) -> Tensor:
        """Positions of a grid of tokens: 1 x L x embed_dim."""
        if self.pos_embed is None:
            return sincos_positions(grid_size, self.embed_dim, self.spatial_dims, device)[None]
        grid: Tensor = self.pos_embed
        if grid_size != self._grid:
            grid = F.interpolate(grid, size=grid_size, mode="trilinear", align_corners=False)
        return grid.flatten(2).transpose(1, 2)

    def embed_patches(self, patches: Tensor, positions: Tensor, anisotropy: int, keep: Tensor | None = None) -> Tensor:
        """Tokens of patches, encoded and normalised; with `keep`, of those patches only.

        Args:
            patches: B x L x voxels, as from `patchify`.
            positions: 1 x L x embed_dim.
            anisotropy: degree of anisotropy of the patches.
            keep: B x K numbers of the patches to encode; None for all.

        Returns:
            B x (1 + K) x embed_dim.
        """
        if keep is not None:
            patches = take_tokens(patches, keep)
            positions = positions[0][keep]
        x = self.patch_embed(patches, anisotropy) + positions
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, image: Tensor, anisotropy: int | None = None, keep: Tensor | None = None) -> Tensor:
        """Encode an image: B x C x (D) x H x W to B x (1 + L) x embed_dim, class token first, final norm applied.

        Args:
            image: as in `prepare`.
            anisotropy: as in `prepare`.
            keep: B x K numbers of the tokens to encode, the rest is left out before the projection; None for all.
        """
        image, anisotropy = self.prepare(image, anisotropy)
        positions = self.positions(self.grid_size(image, anisotropy), image.device)
        return self.embed_patches(patchify(image, self.patch_embed.stride(anisotropy)), positions, anisotropy, keep)


def vit_tiny(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """192 wide, 12 deep, 3 heads."""
    return ViT(in_channels, img_size, patch_size, **{"embed_dim": 192, "depth": 12, "num_heads": 3, **options})


def vit_small(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """384 wide, 12 deep, 6 heads."""
    return ViT(in_channels, img_size, patch_size, **{"embed_dim": 384, "depth": 12, "num_heads": 6, **options})


def vit_base(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """768 wide, 12 deep, 12 heads."""
    return ViT(in_channels, img_size, patch_size, **{"embed_dim": 768, "depth": 12, "num_heads": 12, **options})


def vit_large(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 16, **options: Any) -> ViT:
    """1024 wide, 24 deep, 16 heads."""
    return ViT(in_channels, img_size, patch_size, **{"embed_dim": 1024, "depth": 24, "num_heads": 16, **options})


def vit_huge(in_channels: int = 3, img_size: Sequence[int] = (224, 224), patch_size: int = 14, **options: Any) -> ViT:
    """1280 wide, 32 deep, 16 heads, patch 14."""
    return ViT(in_channels, img_size, patch_size, **{"embed_dim": 1280, "depth": 32, "num_heads": 16, **options})
