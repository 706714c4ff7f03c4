"""Masked image modelling on soft tokens, after PUMIT (https://github.com/function2-llx/PUMIT) and BEiT (https://arxiv.org/abs/2106.08254)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.errors import InputError
from biovfm_monai.losses.quantiser import code_usage
from biovfm_monai.methods.base import SSLMethod, images_of_batch, keys_of_batch
from biovfm_monai.methods.teacher import Teacher
from biovfm_monai.networks import Patches, SoftTokenizer, ViT, random_mask, take_tokens
from biovfm_monai.networks.blocks import init_weights

__all__ = ["MaskedTokenModeling"]


class MaskedTokenModeling(SSLMethod):
    """Hide patches, and predict a frozen tokenizer's soft tokens of them.

    Args:
        encoder: in_channels and patch are the tokenizer's.
        tokenizer: sees the same images as the encoder, so they are prepared as it was trained; a copy of it is frozen.
        mask_ratio: share of patches that is hidden.
        mask_layer: first block that sees mask tokens; the ones before see visible patches only. 0 for all (PUMIT's B),
            -6 for the last six (its L).

    Raises:
        InputError: when tokenizer and encoder do not fit, or there is no such block.
    """

    encoder: ViT

    def __init__(self, encoder: ViT, tokenizer: SoftTokenizer, mask_ratio: float = 0.55, mask_layer: int = 0) -> None:
        super().__init__()
        _check(encoder, tokenizer, mask_layer)
        self.encoder = encoder
        self.tokenizer = Teacher(tokenizer)
        self.mask_ratio = mask_ratio
        self.mask_layer = mask_layer % len(encoder.blocks)
        width = encoder.embed_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, tokenizer.num_codes))
        self.head.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy to the soft tokens of the hidden patches of batch["image"], B x C x (D) x H x W, in nats.

        batch["anisotropy"], if there, is the degree of anisotropy of all its images; batch["key"] tells what is hidden
        of each. "kl" is the loss without the entropy of the soft tokens, which no prediction could take away.
        "marginal_entropy" is the loss of always predicting the mean of the batch's hidden soft tokens, over all
        processes: an encoder has learned something of its images when its own is below.
        """
        image = images_of_batch(batch, "image")
        patches = self.encoder.patchify(image, degree_of_batch(batch))
        b, length = patches.voxels.shape[:2]
        keys = keys_of_batch(batch, b, patches.voxels.device)
        keep, hidden = random_mask(keys, length, self.mask_ratio)
        logits = self.tokenizer(image, patches.anisotropy).flatten(2).transpose(1, 2)
        target = take_tokens(logits, hidden).float().log_softmax(2)
        predicted = self.head(self._encode(patches, keep, hidden)).float().log_softmax(2)
        loss = -(target.exp() * predicted).sum(2).mean()
        return {
            "loss": loss,
            "kl": loss.detach() + (target.exp() * target).sum(2).mean(),
            "marginal_entropy": -code_usage(target.transpose(1, 2)),
        }

    def _encode(self, patches: Patches, keep: Tensor, hidden: Tensor) -> Tensor:
        """Encoded mask tokens, B x hidden x embed_dim.

        They come after the visible tokens, which is as good as any order: rotary angles alone say where each is. An
        encoder without those has its absolute positions added, since its mask tokens would all be alike.
        """
        encoder = self.encoder
        x, angles = encoder.embed(patches, keep)
        if self.mask_layer:
            x = encoder.encode(x, angles, stop=self.mask_layer)[0]
        masked = self.mask_token.to(x.dtype).expand(*hidden.shape, -1)
        turns, places = encoder.angles(patches), encoder.positions(patches.grid_size, x.device)
        if angles is not None and turns is not None:
            angles = torch.cat([angles, turns[0][hidden]], dim=1)
        elif places is not None:
            masked = masked + places[0][hidden].to(x.dtype)
        return encoder.encode(torch.cat([x, masked], dim=1), angles, start=self.mask_layer)[0][:, -hidden.shape[1] :]


def _check(encoder: ViT, tokenizer: SoftTokenizer, mask_layer: int) -> None:
    if set(encoder.patch_size) != {tokenizer.stride}:
        raise InputError(
            f"{tokenizer.origin}: its tokens are {tokenizer.stride} voxels wide, and the encoder's patches, "
            f"{encoder.patch_size}, must be as wide. Give --patch_size {tokenizer.stride}, or take another tokenizer."
        )
    if encoder.in_channels != tokenizer.in_channels:
        raise InputError(
            f"{tokenizer.origin}: takes {tokenizer.in_channels} channel(s), and the encoder, which takes "
            f"{encoder.in_channels}, must take as many. Give --in_channels {tokenizer.in_channels}, or take another "
            "tokenizer."
        )
    if not -len(encoder.blocks) <= mask_layer < len(encoder.blocks):
        raise InputError(f"mask_layer {mask_layer} must be a number of the encoder's {len(encoder.blocks)} blocks.")
