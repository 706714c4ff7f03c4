"""What a training step costs, counted without weights in memory: https://pytorch.org/docs/stable/meta.html.

A method, its views and its optimizer run on the meta device, whose tensors have shapes and no numbers. Operations are
those that `torch.utils.flop_counter` counts, with attention as the plain products that it knows on any device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biovfm_monai.data import MultiCrop, RandomResizedCrop
from biovfm_monai.engines.memory import Alive
from biovfm_monai.methods import SSLMethod
from biovfm_monai.networks import SoftTokenizer, ViT

__all__ = ["Cost", "blank_batch", "cost_of", "flops_of", "imagined", "outlined", "tokens_of"]

_META = torch.device("meta")
_IMAGES = ("image", "global_crops", "local_crops")


class Cost(NamedTuple):
    """What an image costs.

    Attributes:
        tokens: as `tokens_of` counts them.
        forward: floating-point operations of the forward pass.
        flops: of forward and backward together.
    """

    tokens: float
    forward: float
    flops: float


def imagined(method: SSLMethod) -> SSLMethod:
    """A copy of a method on the meta device, in training mode, whole where it is sharded, and without hooks.

    Its blocks are neither compiled nor computed anew in the backward pass. The method's weights are not copied.
    """
    made: SSLMethod = _imagined(method, {}).train()
    return made


def _imagined(module: nn.Module, memo: dict[int, Any]) -> Any:
    if id(module) in memo:
        return memo[id(module)]
    # A sharded module is of a class made of FSDP's and its own.
    kind: Any = type(module).__bases__[-1] if isinstance(module, FSDPModule) else type(module)
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    memo[id(module)] = made
    for name, part in module._modules.items():
        made._modules[name] = None if part is None else _imagined(part, memo)
    for name, p in module._parameters.items():
        made._parameters[name] = None if p is None else memo.setdefault(id(p), nn.Parameter(_empty(p), p.requires_grad))
    for name, buffer in module._buffers.items():
        made._buffers[name] = None if buffer is None else memo.setdefault(id(buffer), _empty(buffer))
    for name, value in module.__dict__.items():
        # What torch marks a sharded module with is for it alone, and a compiled block is as it was.
        own = name in made.__dict__ or name in ("forward", "_compiled_call_impl")
        if not own and not name.startswith("__composable_api"):
            made.__dict__[name] = copy.deepcopy(value, memo)
    return made


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=_META)


def blank_batch(
    method: SSLMethod, views: RandomResizedCrop | MultiCrop, crop_size: Sequence[int], count: int
) -> dict[str, Any]:
    """The views of so many images, isotropic ones where they are volumes, on the meta device.

    Args:
        method: whose encoder tells the number of channels.
        views: made of crops.
        crop_size: (height, width) or (depth, height, width).
        count: of images.
    """
    size = (1, *crop_size) if len(crop_size) == 2 else tuple(crop_size)
    image = torch.empty(count, method.encoder.in_channels, *size, device=_META)
    batch = {"image": image, "key": torch.arange(count)}
    return views.blank(batch | ({"anisotropy": 0} if len(crop_size) == 3 else {}))


def cost_of(method: SSLMethod, batch: Mapping[str, Any], count: int) -> Cost:
    """Costs of each of a batch's images, `method` and `batch` as in `flops_of`."""
    forward, flops = flops_of(method, batch)
    return Cost(tokens_of(getattr(method, "encoder", None), batch) / count, forward / count, flops / count)


def outlined(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with the shapes of its images in place of them."""
    return {name: x.detach().to(_META) if name in _IMAGES else x for name, x in batch.items()}


def flops_of(method: SSLMethod, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Floating-point operations of a batch: of the forward pass, and of forward and backward together.

    Only products of matrices and convolutions count, twice their multiplications; what depends on an image's numbers,
    such as whether a discriminator is winning, counts as if it were so.

    Args:
        method: as from `imagined`; what it changes in a forward pass has no numbers there.
        batch: as the method takes it, `outlined`.
    """
    with Alive(), torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        with FlopCounterMode(display=False) as counter:
            loss = method(batch)["loss"]
            forward = counter.get_total_flops()
            loss.backward()
        method.zero_grad()
    return forward, counter.get_total_flops()


def tokens_of(encoder: nn.Module | None, batch: Mapping[str, Any]) -> int:
    """Patches of all views of a batch, those that a method hides, too; of a tokenizer its soft tokens.

    Zero of an encoder of another kind, which has no tokens that are known here.
    """
    count = 0
    if not isinstance(encoder, ViT | SoftTokenizer):
        return 0
    for name in _IMAGES:
        if name in batch:
            views = batch[name]
            leading = 1 if name == "image" else 2
            size = views.shape[leading + 1 :]
            size = (1, *size) if len(size) == 2 else tuple(size)
            given = batch.get("anisotropy")
            degree = int(torch.as_tensor(given).max()) if given is not None else 5 if size[0] == 1 else 0
            grid = (n // side for n, side in zip(size, _token(encoder, degree), strict=True))
            count += math.prod(views.shape[:leading]) * math.prod(grid)
    return count


def _token(encoder: ViT | SoftTokenizer, degree: int) -> tuple[int, int, int]:
    """Voxels of a token along depth, height and width."""
    if isinstance(encoder, SoftTokenizer):
        return max(encoder.stride >> degree, 1), encoder.stride, encoder.stride
    return encoder.patch_embed.stride(degree)
