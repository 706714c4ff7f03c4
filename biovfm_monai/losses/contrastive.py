"""InfoNCE (https://arxiv.org/abs/1807.03748), as MoCo v3 (https://arxiv.org/abs/2104.02057) scales it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai import distributed
from biovfm_monai.losses.precision import without_autocast

__all__ = ["info_nce"]


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """How badly each query tells its own key from the keys of all other images, of all processes.

    It is 2 * temperature * cross-entropy of the cosines over temperature, in float32 under any autocast.

    Args:
        queries: N x C, of any length.
        keys: N x C, of any length; row n is what query n should find.
        temperature: of the cosines; above 0.
    """
    with without_autocast(queries.device):
        # Half precision's smallest numbers are too large for the default eps.
        queries, keys = (F.normalize(rows.float(), dim=1, eps=1e-6) for rows in (queries, keys))
        logits = queries @ distributed.gather(keys).T / temperature
        own = torch.arange(len(queries), device=queries.device) + distributed.rank() * len(queries)
        return 2 * temperature * F.cross_entropy(logits, own)
