"""Vision transformer (https://arxiv.org/abs/2010.11929) for 2D images and volumes: one tensor of tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from biovfm_monai.anisotropy import anisotropy_of, check_spacing, spacing_of
from biovfm_monai.errors import InputError
from biovfm_monai.networks.arguments import block_defaults, check_arguments, in_3d
from biovfm_monai.networks.blocks import Block, init_weights
from biovfm_monai.networks.masking import take_tokens
from biovfm_monai.networks.patch_embed import PatchEmbed, Patches, patchify
from biovfm_monai.networks.positions import interpolate_grid, rotary_angles, sincos_positions

__all__ = ["ViT"]


class ViT(nn.Module):
    """Encoder with pre-norm blocks that serves 2D images, isotropic and thick-slice volumes with one set of weights.

    Args:
        in_channels: channels of the image.
        img_size: size the encoder is made for, (height, width) or (depth, height, width); any size whose axes are
            multiples of the patch is accepted in use. Made for volumes, it takes 2D images, too.
        patch_size: voxels per token, one number or one per axis of img_size.
        embed_dim, depth, num_heads, drop_path_rate, reg_tokens, class_token, final_norm, global_pool,
            no_embed_class: as in timm. The drop-path rate grows linearly with depth.
        norm_eps: of all norms.
        pos_embed: "sincos", fixed; "learn", a grid made for img_size and resampled for other sizes; or "none".
        pos_antialias: how a learned grid is resampled, see `interpolate_grid`.
        rope: rotary positions in every block: "none", "index", "mm" or "normalised", as in `rotary_angles`. "mm" counts
            in patches of 1 mm voxels, so that what is as far apart in the body is turned as far.
        ref_feat_shape: tokens along (depth,) height and width of a grid that "index" is scaled to, as EVA-02 does for
            images larger than it was trained on; None to count tokens.
        global_pool: what `Embedder` makes of the tokens: "avg" or "max" of the patches', or the class "token".
        no_embed_class: False gives the class token, not registers, a learned position beside the grid's.
        **block_options: mlp_ratio, qkv_bias, k_bias, qk_norm, swiglu_mlp, scale_mlp and init_values of `Block`.

    Attributes:
        grad_checkpointing: recompute each block's inside in the backward pass, to save memory.

    Raises:
        InputError: when img_size is no multiple of patch_size, num_heads does not divide embed_dim, or a choice by
            name is unknown.
    """

    def __init__(
        self,
        in_channels: int = 3,
        img_size: Sequence[int] = (224, 224),
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path_rate: float = 0.0,
        class_token: bool = True,
        reg_tokens: int = 0,
        final_norm: bool = True,
        norm_eps: float = 1e-6,
        pos_embed: str = "sincos",
        pos_antialias: bool = False,
        rope: str = "none",
        ref_feat_shape: list[int] | None = None,
        global_pool: str = "avg",
        no_embed_class: bool = True,
        **block_options: Any,
    ) -> None:
        super().__init__()
        own = {name: value for name, value in locals().items() if name not in ("self", "__class__", "block_options")}
        sizes = check_arguments(own)
        self.arguments = {
            **own, "img_size": list(img_size), "patch_size": list(sizes), **block_defaults(), **block_options,
        }  # fmt: skip
        self.in_channels, self.embed_dim, self.spatial_dims = in_channels, embed_dim, len(sizes)
        self.img_size, self.patch_size, self.head_dim = tuple(img_size), sizes, embed_dim // num_heads
        self.rope, self.global_pool = rope, global_pool
        self.ref_feat_shape = None if ref_feat_shape is None else list(ref_feat_shape)
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.sincos, self.pos_antialias = pos_embed == "sincos", pos_antialias
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_channels, in_3d(sizes), embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        grid = [n // p for n, p in zip(in_3d(self.img_size), self.patch_embed.patch_size, strict=True)]
        self.pos_embed = nn.Parameter(torch.empty(1, embed_dim, *grid)) if pos_embed == "learn" else None
        self.cls_pos = None if no_embed_class else nn.Parameter(torch.empty(1, 1, embed_dim))
        rates = [drop_path_rate * number / max(depth - 1, 1) for number in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, drop_path=rate, norm_eps=norm_eps, **block_options) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()
        self.apply(init_weights)
        for tokens in (self.cls_token, self.reg_token, self.pos_embed, self.cls_pos):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def patchify(self, image: Tensor, anisotropy: int | None = None, spacing: list[float] | None = None) -> Patches:
        """Check an image, and cut it into patches.

        Args:
            image: B x C x H x W (read as depth 1) or B x C x D x H x W, float.
            anisotropy: degree of anisotropy, 0 to 5; None to take it from `spacing`, or else 5 for a 4-dimensional
                image and 0 for a volume.
            spacing: mm along (depth,) height and width; None for what the affine of a volume says, if it is a
                MetaTensor.

        Raises:
            InputError: on a wrong number of axes or channels, a size that is no multiple of the patch, or as
                `anisotropy_of`.
        """
        if not torch.jit.is_scripting():
            image, spacing = _plain(image, spacing, anisotropy is None or self.rope == "mm")
        if spacing is not None:
            check_spacing(spacing)
            if image.ndim == 5 and len(spacing) != 3:
                raise InputError(f"spacing {spacing} of a volume must be three numbers, mm along depth, height, width.")
        if anisotropy is None:
            anisotropy = 5 if image.ndim == 4 else 0
            if spacing is not None and image.ndim == 5:
                anisotropy = anisotropy_of(spacing)
        if image.ndim == 4:
            image = image.unsqueeze(2)
        stride = self._stride(image, anisotropy)
        grid_size = (image.shape[2] // stride[0], image.shape[3] // stride[1], image.shape[4] // stride[2])
        return Patches(patchify(image, stride), grid_size, anisotropy, spacing)

    def _stride(self, image: Tensor, anisotropy: int) -> tuple[int, int, int]:
        """Voxels per token of B x C x D x H x W, once it is known that the encoder can read it."""
        if image.ndim != 5 or image.shape[1] != self.in_channels:
            raise InputError(
                f"the encoder takes {self.in_channels} channel(s) and 4 or 5 axes, got shape {list(image.shape)}. "
                "Give it such images, or build it with other in_channels."
            )
        if not image.is_floating_point():
            raise InputError(f"the image must be of floating-point numbers, got {image.dtype}. Convert it.")
        if self.spatial_dims == 2 and image.shape[2] != 1:
            raise InputError(
                f"an encoder of 2D images cannot read {image.shape[2]} slices at once. Give it slices one by one, as "
                "Embedder does, or inflate it."
            )
        if anisotropy < 0 or anisotropy > 5:
            raise InputError(f"anisotropy must be 0 (isotropic) to 5 (a 2D image), got {anisotropy}. Correct it.")
        stride = self.patch_embed.stride(anisotropy)
        if self.patch_embed.patch_size[0] % stride[0]:
            raise InputError(
                f"patches {self.patch_embed.patch_size[0]} deep cannot be halved {anisotropy} times. Build the encoder "
                "with a depth that is a power of two."
            )
        if image.shape[2] % stride[0] or image.shape[3] % stride[1] or image.shape[4] % stride[2]:
            raise InputError(
                f"image size {list(image.shape)[2:]} must be a multiple of the patch {stride}. Crop or pad the "
                "image; if its slices are thick, give spacing or anisotropy."
            )
        return stride

    def embed(self, patches: Patches, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens of patches, with their positions, before the first block.

        Args:
            patches: as from `patchify`.
            keep: B x K numbers of the patches to embed; None for all L of them.

        Returns:
            B x (prefix + K) x embed_dim, and the rotary angles, 1 or B x (prefix + K) x (head_dim / 2); None without.
        """
        voxels = patches.voxels
        positions, angles = self.positions(patches.grid_size, voxels.device), self.angles(patches)
        if keep is not None:
            voxels = take_tokens(voxels, keep)
            positions = None if positions is None else positions[0][keep]
            angles = None if angles is None else angles[0][keep]
        x = self.patch_embed(voxels, patches.anisotropy)
        if positions is not None:
            # Under autocast tokens stay float32; weights of another precision keep to it.
            x = x + positions.to(self.patch_embed.weight.dtype)
        class_token: Tensor | None = self.cls_token
        if class_token is not None and self.cls_pos is not None:
            class_token = class_token + self.cls_pos
        for token in (self.reg_token, class_token):
            if token is not None:
                x = torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)
        if angles is not None:
            # Prefix tokens have no place, and are not turned.
            angles = torch.cat([angles.new_zeros(angles.shape[0], self.num_prefix_tokens, angles.shape[2]), angles], 1)
        return x, angles

    def encode(
        self,
        x: Tensor,
        angles: Tensor | None = None,
        lengths: list[int] | None = None,
        taps: list[int] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run embedded tokens through the blocks and the final norm.

        Args:
            x, angles: as from `embed`.
            lengths: tokens per image when several lie one after the other in a batch of one.
            taps: numbers of blocks whose output is wanted, too.
            start, stop: numbers of the first block to run and of the first not to; None for all, and the final norm.

        Returns:
            The tokens, and those after each tapped block, without the final norm.
        """
        turn = None if angles is None else (angles.cos()[:, None], angles.sin()[:, None])
        tapped: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            runs = number >= start and (stop is None or number < stop)
            if torch.jit.is_scripting() or not (self.grad_checkpointing and self.training):
                x = block(x, turn, lengths) if runs else x
            elif runs:
                x = checkpoint(block, x, turn, lengths, use_reentrant=False)
            if runs and taps is not None and number in taps:
                tapped.append(x)
        return x if stop is not None else self.norm(x), tapped

    def forward(
        self,
        image: Tensor,
        anisotropy: int | None = None,
        keep: Tensor | None = None,
        spacing: list[float] | None = None,
    ) -> Tensor:
        """Encode an image: B x C x (D) x H x W to B x (prefix + L) x embed_dim, prefix tokens first.

        Args:
            image, anisotropy, spacing: as in `patchify`.
            keep: B x K numbers of the tokens to encode, the rest is left out before the projection; None for all.
        """
        x, angles = self.embed(self.patchify(image, anisotropy, spacing), keep)
        return self.encode(x, angles)[0]

    def features(
        self,
        image: Tensor,
        blocks: Sequence[int],
        anisotropy: int | None = None,
        spacing: list[float] | None = None,
    ) -> list[Tensor]:
        """Outputs of blocks as spatial maps for dense decoders: B x embed_dim x grid, the final norm applied to each.

        Args:
            image, anisotropy, spacing: as in `patchify`.
            blocks: numbers of blocks, ascending, from 0; negative ones count from the end.

        Raises:
            InputError: when a number is out of range or out of order.
        """
        depth = len(self.blocks)
        taps = [number + depth if number < 0 else number for number in blocks]
        if not taps or taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= depth:
            raise InputError(f"blocks {list(blocks)} must be ascending numbers of the encoder's {depth} blocks")
        return self.feature_maps(self.patchify(image, anisotropy, spacing), taps)

    def feature_maps(self, patches: Patches, taps: list[int]) -> list[Tensor]:
        """As `features`, of patches as from `patchify` and blocks counted from 0; what TorchScript can compile."""
        x, angles = self.embed(patches)
        tapped = self.encode(x, angles, None, taps)[1]
        prefix, (d, h, w) = self.num_prefix_tokens, patches.grid_size
        return [self.norm(x)[:, prefix:].transpose(1, 2).unflatten(2, (d, h, w)) for x in tapped]

    def positions(self, grid_size: tuple[int, int, int], device: torch.device) -> Tensor | None:
        """Positions of a grid of tokens that are added to them, 1 x L x embed_dim; None without."""
        if self.sincos:
            return sincos_positions(grid_size, self.embed_dim, self.spatial_dims, device)[None]
        if self.pos_embed is None:
            return None
        return interpolate_grid(self.pos_embed, grid_size, self.pos_antialias).flatten(2).transpose(1, 2)

    def angles(self, patches: Patches) -> Tensor | None:
        """Rotary angles of patches, 1 x L x (head_dim / 2); None without."""
        if self.rope == "none":
            return None
        scale, spacing, reference = (1.0, 1.0, 1.0), patches.spacing, self.ref_feat_shape
        if self.rope == "index" and reference is not None:
            d, h, w = patches.grid_size
            scale = (reference[0] / d if len(reference) == 3 else 1.0, reference[-2] / h, reference[-1] / w)
        if self.rope == "mm" and spacing is not None:
            depth = spacing[0] * self.patch_embed.stride(patches.anisotropy)[0] / self.patch_embed.patch_size[0]
            scale = (depth if len(spacing) == 3 else 1.0, spacing[-2], spacing[-1])
        return rotary_angles(patches.grid_size, self.head_dim, self.rope, scale, patches.voxels.device)[None]


def _plain(image: Tensor, spacing: list[float] | None, needed: bool) -> tuple[Tensor, list[float] | None]:
    """A plain tensor, and the spacing: as given, or if needed what a MetaTensor that was turned slices first says."""
    if isinstance(image, MetaTensor):
        # Of a slice, cut from a volume, the affine still is the volume's.
        return image.as_tensor(), spacing_of(image) if needed and spacing is None and image.ndim == 5 else spacing
    return image, spacing
