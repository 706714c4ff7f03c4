"""Which tokens are hidden, and picking tokens by number: uniform random masks as in MAE (https://arxiv.org/abs/2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor

from biovfm_monai.draws import uniform

__all__ = ["random_mask", "take_tokens"]


def random_mask(keys: Tensor, num_tokens: int, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Draw, for each image on its own, which tokens stay visible and which are hidden.

    Args:
        keys: of the images' random numbers, as `uniform` takes them.
        num_tokens: tokens per image, prefix tokens not counted.
        mask_ratio: share that is hidden; at least one token stays visible and at least one is hidden.

    Returns:
        keep (B x visible) and hidden (B x hidden): token numbers, ascending, together every token once.

    Raises:
        ValueError: when there are fewer than two tokens or the ratio is not between 0 and 1.
    """
    if num_tokens < 2 or not 0 < mask_ratio < 1:
        raise ValueError(f"masking needs at least 2 tokens and a mask_ratio in (0, 1), got {num_tokens}, {mask_ratio}")
    # 1 - 0.55 is a little less than 0.45, and 500 tokens would lose one of their 225.
    visible = min(max(int(num_tokens * (1 - mask_ratio) + 1e-6), 1), num_tokens - 1)
    order = uniform(keys, num_tokens, stream=1).argsort(dim=1)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens by number: B x L x C and B x K to B x K x C."""
    b, length = tokens.shape[:2]
    rows = index + length * torch.arange(b, device=index.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (b, -1))
