"""How a network is shared out over processes and computed, by torch's own means, of which networks know nothing.

Copies with averaged gradients (DDP, https://arxiv.org/abs/2006.15704), or a part each (FSDP2, https://arxiv.org/abs/2304.11277);
blocks recomputed in the backward pass (https://arxiv.org/abs/1604.06174), or compiled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from biovfm_monai import distributed
from biovfm_monai.errors import InputError
from biovfm_monai.networks import Block

__all__ = ["Sharded", "inner", "local", "parallel", "whole"]

_KEPT = {
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip


class Sharded(nn.Module):
    """A module of which each process holds a part, as `module`; parts come together where they are needed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's."""
        return self.module(*args, **kwargs)


def parallel(
    module: nn.Module,
    device: torch.device | str,
    sharding: str = "none",
    precision: str = "fp32",
    reshard: bool = True,
    checkpointing: str = "none",
    compiled: bool = False,
    static_graph: bool = False,
) -> nn.Module:
    """Move a module to a device and, if there are several processes, share it out over them.

    Args:
        module: a method; the `Block`s of its transformers are what is sharded, recomputed and compiled one by one.
        device: of this process.
        sharding: "none", a copy each, with gradients averaged while they are computed (DDP); "full", of weights,
            gradients and optimizer's state a part each (FSDP2), teachers' too; "hybrid", parts within a machine and
            copies between machines.
        precision: "bf16" sends sharded weights as such; gradients are averaged in float32 always.
        reshard: whether sharded weights are given up after the forward pass, and sent again for the backward one.
        checkpointing: what blocks do not keep for the backward pass but compute anew: "none"; "selective", all but the
            results of matrix products and attention; "full", everything inside a block.
        compiled: whether `torch.compile` makes one program of each block.
        static_graph: tells DDP that every step uses the same parameters.

    Raises:
        InputError: on an unknown choice, or when processes have different networks.
    """
    _require_one_of("sharding", sharding, ("none", "full", "hybrid"))
    _require_one_of("checkpointing", checkpointing, ("none", "selective", "full"))
    target = torch.device(device)
    module = module.to(target)
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    for block in blocks:
        if checkpointing != "none":
            _recompute(block, checkpointing == "selective")
        if compiled:
            block.compile()
    if distributed.world_size() == 1:
        return module
    shapes = str([(name, x.shape) for name, x in module.state_dict().items()])
    same = {"network": hashlib.sha256(shapes.encode()).hexdigest(), "sharding": sharding, "static_graph": static_graph}
    distributed.require_same(same, target)
    if sharding != "none":
        return _sharded(module, blocks, target, sharding, precision, reshard)
    ids = [target] if target.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, static_graph=static_graph)


def inner(network: nn.Module) -> nn.Module:
    """The module itself, out of what `parallel` has put around it."""
    module: Any = network.module if isinstance(network, DistributedDataParallel | Sharded) else network
    return module


def local(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(tree: Any) -> Any:
    """The same nested dictionaries and lists with sharded tensors put together; all processes call it."""
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} {value!r} is unknown. Give one of {', '.join(choices)}.")


def _recompute(block: nn.Module, selective: bool) -> None:
    kept: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    again: Any = partial(checkpoint, use_reentrant=False, **kept)
    forward = block.forward

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return again(forward, *args, **kwargs)

    block.forward = recomputing


def _policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _sharded(
    module: nn.Module, blocks: list[Block], device: torch.device, sharding: str, precision: str, reshard: bool
) -> nn.Module:
    dtype = torch.bfloat16 if precision == "bf16" else None
    options: dict[str, Any] = {
        "mesh": _mesh(device, sharding),
        "reshard_after_forward": reshard,
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
    }
    # As DDP does: else parts would be of as many beginnings as there are processes.
    for x in module.state_dict().values():
        dist.broadcast(x, 0)
    for block in blocks:
        fully_shard(block, **options)
    network = Sharded(module)
    fully_shard(network, **options)
    return network


def _mesh(device: torch.device, sharding: str) -> DeviceMesh:
    processes = distributed.world_size()
    if sharding == "full":
        return init_device_mesh(device.type, (processes,))
    here = distributed.local_world_size()
    return init_device_mesh(device.type, (processes // here, here), mesh_dim_names=("machines", "processes"))
