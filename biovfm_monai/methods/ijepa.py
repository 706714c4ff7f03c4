"""I-JEPA: Assran et al. 2023, https://arxiv.org/abs/2301.08243, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.draws import Use, uniform
from biovfm_monai.errors import InputError, require_pair, require_within
from biovfm_monai.methods.base import SSLMethod, images_of_batch, keys_of_batch
from biovfm_monai.methods.teacher import Teacher
from biovfm_monai.networks import Block, Patches, ViT, sincos_positions, take_tokens
from biovfm_monai.networks.blocks import init_weights
from biovfm_monai.networks.masking import block_size, context_and_targets

__all__ = ["IJEPA"]


class IJEPA(SSLMethod):
    """From a block of an image's tokens, predict what a slowly moving teacher makes of other blocks.

    Where the blocks are depends on an image's key; how large, the same for all images, on the number of the step.

    Args:
        encoder: sees the context block only.
        predictor_embed_dim, predictor_depth: the predictor's size.
        predictor_num_heads: None for as many as the encoder's.
        num_targets: target blocks per image.
        target_scale, target_aspect: range of a target block's share of the tokens, and of its height over width.
        context_scale: range of the context block's share, targets still in it.
        momentum: share of the teacher that a step keeps at first; it rises to 1 in a straight line.

    Raises:
        InputError: when predictor_num_heads does not divide predictor_embed_dim, or a number means nothing.
    """

    encoder: ViT

    def __init__(
        self,
        encoder: ViT,
        predictor_embed_dim: int = 384,
        predictor_depth: int = 12,
        predictor_num_heads: int | None = None,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        heads = predictor_num_heads or encoder.embed_dim // encoder.head_dim
        if predictor_embed_dim % heads:
            raise InputError(
                f"predictor_num_heads {heads} must divide predictor_embed_dim {predictor_embed_dim}. Correct one."
            )
        require_within(0, 1, momentum=momentum)
        require_within(1, whole=True, num_targets=num_targets)
        require_pair(0, 1, above=True, target_scale=target_scale, context_scale=context_scale)
        require_pair(0, above=True, target_aspect=target_aspect)
        self.encoder = encoder
        self.num_targets, self.target_scale, self.target_aspect = num_targets, target_scale, target_aspect
        self.context_scale, self.momentum = context_scale, momentum
        self.predictor_embed = nn.Linear(encoder.embed_dim, predictor_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, predictor_embed_dim))
        self.predictor_blocks = nn.ModuleList(Block(predictor_embed_dim, heads) for _ in range(predictor_depth))
        self.predictor_norm = nn.LayerNorm(predictor_embed_dim, eps=1e-6)
        self.predictor_pred = nn.Linear(predictor_embed_dim, encoder.embed_dim)
        for module in (self.predictor_embed, self.predictor_blocks, self.predictor_pred):
            module.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.teacher = Teacher(encoder)
        self.steps = 0

    @property
    def trained(self) -> ViT:
        """The teacher's encoder, which the paper evaluates."""
        return cast(ViT, self.teacher.network)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Smooth L1 distance between predicted and true tokens of batch["image"]'s target blocks.

        The image is B x C x (D) x H x W; batch["key"], if there, tells where its blocks are (`uniform`).

        Raises:
            InputError: when the image has too few tokens for the blocks.
        """
        patches = self.encoder.patchify(images_of_batch(batch, "image"), degree_of_batch(batch))
        keys = keys_of_batch(batch, len(patches.voxels), patches.voxels.device)
        keep, targets = context_and_targets(keys, patches.grid_size, *self._sizes(patches), self.num_targets)
        prediction = self._predict(patches, keep, targets)
        return {"loss": F.smooth_l1_loss(prediction.float(), take_tokens(self._truth(patches), targets.flatten(1)))}

    def after_step(self, progress: float) -> None:
        """Move the teacher a step after the student."""
        self.teacher.follow(self.encoder, self.momentum + (1 - self.momentum) * progress)
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        """The number of steps; no buffer, since a GPU would have to be waited for to read it."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a number of steps."""
        self.steps = int(state)

    def _sizes(self, patches: Patches) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Tokens of a context and of a target block along depth, height and width."""
        context, target, aspect = (
            low + (high - low) * drawn
            for (low, high), drawn in zip(
                (self.context_scale, self.target_scale, self.target_aspect),
                uniform(torch.tensor([self.steps]), 3, Use.SIZE)[0].tolist(),
                strict=True,
            )
        )
        grid = patches.grid_size
        return block_size(grid, context, 1.0, math.ceil), block_size(grid, target, aspect, math.floor)

    @torch.no_grad()
    def _truth(self, patches: Patches) -> Tensor:
        """The teacher's tokens of all patches, each normalised: B x L x embed_dim, float32."""
        teacher = self.trained
        tokens = teacher.encode(*teacher.embed(patches))[0][:, teacher.num_prefix_tokens :]
        return F.layer_norm(tokens.float(), tokens.shape[-1:])

    def _predict(self, patches: Patches, keep: Tensor, targets: Tensor) -> Tensor:
        """Tokens of the target blocks, each block predicted on its own: B x (blocks * tokens) x embed_dim."""
        prefix, (b, blocks, size) = self.encoder.num_prefix_tokens, targets.shape
        context = self.predictor_embed(self.encoder.encode(*self.encoder.embed(patches, keep))[0])
        width = context.shape[2]
        table = sincos_positions(patches.grid_size, width, self.encoder.spatial_dims, keep.device).to(context.dtype)
        context = torch.cat([context[:, :prefix], context[:, prefix:] + table[keep]], dim=1)
        asked = self.mask_token.to(context.dtype) + table[targets.flatten(0, 1)]
        x = torch.cat([context.repeat_interleave(blocks, dim=0), asked], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_pred(self.predictor_norm(x[:, -size:])).view(b, blocks * size, -1)
