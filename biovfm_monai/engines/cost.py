"""What a training step costs, counted without weights in memory: https://pytorch.org/docs/stable/meta.html.

A method, its views and its optimizer run on the meta device, whose tensors have shapes and no numbers. Operations are
those that `torch.utils.flop_counter` counts, with attention as the plain products that it knows on any device.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from biovfm_monai.data import MultiCrop, RandomResizedCrop
from biovfm_monai.methods import SSLMethod
from biovfm_monai.networks import SoftTokenizer, ViT

__all__ = ["Cost", "Memory", "blank_batch", "cost_of", "flops_of", "imagined", "memory_of", "outlined", "tokens_of"]

_META = torch.device("meta")
_IMAGES = ("image", "global_crops", "local_crops")
# What autocast computes in half precision, of the functions that networks here call.
_LOWERED = {
    F.linear, F.conv2d, F.conv3d, F.conv_transpose2d, F.conv_transpose3d, F.scaled_dot_product_attention, torch.matmul,
    torch.bmm, torch.mm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
}  # fmt: skip
# Up to this length our blocks take the plain products of bfloat16 on CPUs, which keep all weights of attention.
_PLAIN = 1024


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


class Memory(NamedTuple):
    """Bytes of one device, of tensors alone: neither Python's and the libraries' own nor what an allocator holds back.

    Attributes:
        weights: of all parameters and buffers, a teacher's, too.
        gradients: of all that is trained.
        optimizer: what it keeps of each parameter.
        activations: views, and what the forward pass keeps for the backward pass.
        peak: most that is in use at once, short-lived tensors, too; the last gradients come when activations are gone.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def imagined(method: SSLMethod) -> SSLMethod:
    """A copy of a method on the meta device, in training mode, whole where it is sharded, and without hooks.

    Blocks that are computed anew in the backward pass are not in the copy. The method's weights are not copied.
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
        # What torch marks a sharded module with is for it alone.
        if name not in made.__dict__ and name != "forward" and not name.startswith("__composable_api"):
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
    with _Alive(), torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        with FlopCounterMode(display=False) as counter:
            loss = method(batch)["loss"]
            forward = counter.get_total_flops()
            loss.backward()
        method.zero_grad()
    return forward, counter.get_total_flops()


def memory_of(
    method: SSLMethod,
    make_batch: Callable[[], Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
) -> Memory:
    """Memory of one training step, forward, backward and the optimizer's, when most is in use.

    Args:
        method: as from `imagined`.
        make_batch: makes the views, on the meta device.
        optimizer: of the method's parameters; left without states.
        dtype: of autocast; None without.
        device: type of the device to plan for; attention keeps less for the backward pass on a GPU.
    """
    parameters = [p for p in method.parameters() if p.requires_grad]
    with _Alive() as alive, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for x in [*method.parameters(), *method.buffers()]:
            alive.note(x)
        weights = alive.now
        for group in optimizer.param_groups:
            # Fused steps, which need no more memory than the states, do not know the meta device.
            group.update({name: False for name in ("fused", "foreach") if name in group})
        for p in parameters:
            p.grad = torch.empty_like(p)
        gradients = alive.now - weights
        optimizer.step()
        states = alive.now - gradients - weights
        optimizer.zero_grad()
        alive.peak = alive.now
        with _Lowered(dtype, device) as lowered:
            loss = method(make_batch())["loss"]
            lowered.weights = None
            activations = alive.now - weights - states
            # `backward` would leave the mode, which blocks that are computed anew need.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
    optimizer.zero_grad()
    optimizer.state.clear()
    return Memory(weights, gradients, states, activations, alive.peak)


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


class _Alive(TorchDispatchMode):
    """Bytes of meta tensors that are made while it is active and not gone yet, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.is_meta:
                self.note(x)
        return made

    def note(self, x: Tensor) -> None:
        """Count a tensor, once however many share its storage."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: weakref.ref) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Lowered(TorchFunctionMode):
    """Autocast for the meta device, which has none, and the attention of another device.

    Attributes:
        weights: in half precision, cast once for the whole forward pass; None after it.
    """

    def __init__(self, dtype: torch.dtype | None, device: str) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.weights: dict[int, Tensor] | None = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None and func in _LOWERED:
            args, kwargs = tree_map_only(Tensor, self._lowered, (args, kwargs))
        if func is F.scaled_dot_product_attention and not self._is_plain(args[0]):
            # Every fused kernel keeps for the backward pass what this one does.
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]
        return func(*args, **kwargs)

    def _is_plain(self, q: Tensor) -> bool:
        return not q.is_meta or (self.device == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _PLAIN)

    def _lowered(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not x.is_meta:
            return x
        if self.weights is None or not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if id(x) not in self.weights:
            self.weights[id(x)] = x.to(self.dtype)
        return self.weights[id(x)]
