"""Low-rank adapters: few numbers beside an encoder's own are trained, which stay (LoRA, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from biovfm_monai.errors import require_within
from biovfm_monai.networks.blocks import Attention
from biovfm_monai.networks.vit import ViT

__all__ = ["with_adapters"]

_WEIGHT = ".parametrizations.weight."
_OWN, _DOWN, _UP = "original", "0.down", "0.up"


class _LowRank(nn.Module):
    """A weight plus a product of two narrow matrices, the second of which begins with zeros."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down, self.up = nn.Parameter(torch.empty(rank, columns)), nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def with_adapters(encoder: ViT, rank: int = 0) -> ViT:
    """Train low-rank changes of an encoder's attention, and nothing else of it.

    Its `state_dict` has the weights with their changes, by the names of a plain encoder, and takes such weights, too,
    so that files and exports know nothing of adapters.

    Args:
        encoder: is changed in place.
        rank: of the changes to each block's two projections of attention; 0 for no adapters, and all weights trained.

    Returns:
        The encoder.

    Raises:
        InputError: when rank is negative, or above the encoder's width.
    """
    require_within(0, encoder.embed_dim, whole=True, rank=rank)
    if rank == 0:
        return encoder
    encoder.requires_grad_(False)
    attentions = [module for module in encoder.modules() if isinstance(module, Attention)]
    for layer in (layer for attention in attentions for layer in (attention.qkv, attention.proj)):
        parametrize.register_parametrization(layer, "weight", _LowRank(layer.weight, rank).to(layer.weight))
    encoder.register_state_dict_post_hook(_merge)
    encoder.register_load_state_dict_pre_hook(_split)
    return encoder


def _merge(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
    """Put plain weights in the place of own ones and their changes."""
    for name in [name for name in state if name.startswith(prefix) and name.endswith(_WEIGHT + _OWN)]:
        layer = name.removesuffix(_OWN)
        own, down, up = (state.pop(layer + part) for part in (_OWN, _DOWN, _UP))
        state[layer.removesuffix(_WEIGHT) + ".weight"] = own + up @ down


def _split(encoder: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Take plain weights as own ones without changes."""
    for name, layer in encoder.named_modules():
        if parametrize.is_parametrized(layer, "weight") and f"{prefix}{name}.weight" in state:
            own = state.pop(f"{prefix}{name}.weight")
            adapter = layer.parametrizations.weight[0]
            found = {_OWN: own, _DOWN: adapter.down.detach(), _UP: torch.zeros_like(adapter.up)}
            state.update({f"{prefix}{name}{_WEIGHT}{part}": tensor for part, tensor in found.items()})
