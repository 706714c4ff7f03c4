"""The memory that a training step takes, counted without weights: https://pytorch.org/docs/stable/meta.html."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from biovfm_monai.methods import SSLMethod
from biovfm_monai.networks import Block

__all__ = ["Alive", "Memory", "memory_of"]

_META = torch.device("meta")
# What autocast computes in half precision, of the functions that networks here call.
_LOWERED = {
    F.linear, F.conv2d, F.conv3d, F.conv_transpose2d, F.conv_transpose3d, F.scaled_dot_product_attention, torch.matmul,
    torch.bmm, torch.mm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
}  # fmt: skip
# Up to this length our blocks take the plain products of bfloat16 on CPUs, which keep all weights of attention.
_PLAIN = 1024


class Memory(NamedTuple):
    """Bytes of one device, of tensors alone: neither Python's and the libraries' own nor what an allocator holds back.

    Attributes:
        weights: of all parameters and buffers, a teacher's, too.
        gradients: of all that is trained.
        optimizer: what it keeps of each parameter.
        activations: views, and what the forward pass keeps for the backward pass.
        peak: most that is in use at once, short-lived tensors, too; unless gradients stay, the last of them come when
            activations are gone.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def memory_of(
    method: SSLMethod,
    make_batch: Callable[[], Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
    gradients_stay: bool = False,
    parts: int = 1,
) -> Memory:
    """Memory of one training step, forward, backward and the optimizer's, when most is in use.

    Args:
        method: as from `imagined`.
        make_batch: makes the views, on the meta device.
        optimizer: of the method's parameters; left without states.
        dtype: of autocast; None without.
        device: type of the device to plan for; attention keeps less for the backward pass on a GPU.
        gradients_stay: whether there is room for all of them during the forward pass, too, as in DDP's buffers, and
            where they are summed over several micro-batches.
        parts: processes that share out weights, gradients and states block by block (FSDP2); what one of them holds.
    """
    blocks = [[*part.parameters()] for part in method.modules() if isinstance(part, Block)]
    shards: list[Tensor] = []
    with Alive() as alive, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights, gradients, states = _lasting(method, optimizer, alive)
        if not gradients_stay:
            optimizer.zero_grad()
        with _Lowered(dtype, device) as lowered:
            handles = []
            if parts > 1:
                # Each block's are cast when they are sent, and gone after it.
                lowered.cast(method.parameters())
                if not gradients_stay:
                    handles = [_keep_a_part(p, parts, shards) for block in blocks for p in block if p.requires_grad]
            before = alive.peak = alive.now
            loss = method(make_batch())["loss"]
            if parts == 1:
                lowered.weights = None
            activations = alive.now - before
            # `backward` would leave the mode, which blocks that are computed anew need.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
    for handle in handles:
        handle.remove()
    optimizer.zero_grad()
    optimizer.state.clear()
    if parts == 1:
        return Memory(weights, gradients, states, activations, alive.peak)
    # Processes share out gradients only once they are summed up.
    held = [weights / parts, gradients / (1 if gradients_stay else parts), states / parts]
    lasting = sum(held) if gradients_stay else held[0] + held[2]
    peak = lasting + _put_together(weights, blocks) + alive.peak - before
    return Memory(*map(math.ceil, (*held, activations, peak)))


def _lasting(method: SSLMethod, optimizer: torch.optim.Optimizer, alive: Alive) -> tuple[int, int, int]:
    """Bytes of weights, of gradients and of the optimizer's states, all of which are there then."""
    for x in [*method.parameters(), *method.buffers()]:
        alive.note(x)
    weights = alive.now
    for group in optimizer.param_groups:
        # Fused steps, which need no more memory than the states, do not know the meta device.
        group.update({name: False for name in ("fused", "foreach") if name in group})
    for p in method.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    gradients = alive.now - weights
    optimizer.step()
    return weights, gradients, alive.now - gradients - weights


def _keep_a_part(p: Tensor, parts: int, shards: list[Tensor]) -> RemovableHandle:
    """Of the gradient, once it is there."""

    def give_up(p: Tensor) -> None:
        shards.append(torch.empty(math.ceil(p.numel() / parts), dtype=p.dtype, device=_META))
        p.grad = None

    return p.register_post_accumulate_grad_hook(give_up)


def _put_together(weights: int, blocks: Sequence[Sequence[Tensor]]) -> int:
    """Bytes that are whole beside the parts: what is in no block all the time, of blocks the one at work and the next.

    And the gradients of one (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
    """
    sizes = [sum(p.nbytes for p in block) for block in blocks]
    return weights - sum(sizes) + 3 * max(sizes, default=0)


class Alive(TorchDispatchMode):
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

    def cast(self, parameters: Iterable[Tensor]) -> None:
        """Cast them before the forward pass."""
        if self.dtype is not None:
            self.weights = {id(p): p.to(self.dtype) for p in parameters if p.requires_grad}

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
