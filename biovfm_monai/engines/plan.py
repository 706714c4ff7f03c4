"""What a run will take, before it begins: parameters, operations, memory, time and cost, without weights in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

from biovfm_monai.engines.budget import epochs_within
from biovfm_monai.engines.cost import Cost, blank_batch, cost_of, imagined
from biovfm_monai.engines.memory import Memory, memory_of
from biovfm_monai.engines.precision import autocast_dtype
from biovfm_monai.errors import InputError, require_within

__all__ = ["Plan", "make_plan", "measured_rate"]

_FAR = 32
_MOST = 2**20


@dataclass(frozen=True)
class Plan:
    """What one configuration takes.

    Attributes:
        encoder_parameters, parameters: of the encoder, and of the whole method with a teacher.
        cost: of an image.
        samples, steps: images and optimizer steps of the run.
        batch_size, micro_batch: images of an optimizer step, and those of them that a process has at once.
        processes: how many share a batch.
        precision, device: that the memory is for.
        memory: of each process, when each has all weights.
        sharded: of each process, when they share out weights, gradients and the optimizer's states; None of one.
        largest_micro_batch: that fits, sharded if the configuration says so; None where no room was given.
    """

    encoder_parameters: int
    parameters: int
    cost: Cost
    samples: int
    steps: int
    batch_size: int
    micro_batch: int
    processes: int
    precision: str
    device: str
    memory: Memory
    sharded: Memory | None
    largest_micro_batch: int | None

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run."""
        return self.cost.flops * self.samples

    def hours(self, rate: float) -> float:
        """How long it takes where each device does `rate` of these operations a second."""
        return self.flops / (rate * self.processes) / 3600


def make_plan(
    files: Sequence[str], overrides: Mapping[str, Any], processes: int = 1, memory: float | None = None
) -> Plan:
    """Plan a run of a pretraining bundle, of which nothing is made but the method, its views and the optimizer.

    Args:
        files: the bundle's train.json, and overlays.
        overrides: key of the configuration -> value, as on the bundle's command line.
        processes: that the run is to have.
        memory: GiB of a device that its tensors may take, to look for the largest micro-batch; None not to.

    Raises:
        InputError: when a file, key or value cannot be used.
    """
    require_within(1, whole=True, processes=processes)
    if memory is not None:
        require_within(0, above=True, memory=memory)
    parser = _read(files, overrides)
    method, views, crop_size = imagined(_made(parser, "method")), _made(parser, "views"), _made(parser, "crop_size")
    batch_size, accumulation = _made(parser, "batch_size"), _made(parser, "accumulation_steps")
    require_within(1, whole=True, batch_size=batch_size, accumulation_steps=accumulation)
    micro = batch_size // (processes * accumulation)
    if micro * processes * accumulation != batch_size:
        raise InputError(
            f"batch_size {batch_size} cannot be shared out over {processes} process(es) times {accumulation} "
            f"accumulation step(s). Give a batch_size that is a multiple of {processes * accumulation}."
        )
    sharding = _made(parser, "sharding")
    if sharding == "hybrid" and processes > 1:
        raise InputError(
            "sharding 'hybrid' shares weights out within a machine, and a plan knows of no machines. Plan one of them: "
            "--sharding full, --processes as many as its devices, and its part of --batch_size."
        )
    precision, device = _made(parser, "precision"), torch.device(_made(parser, "device")).type
    dtype = autocast_dtype(precision)
    cost = cost_of(method, blank_batch(method, views, crop_size, micro), micro)
    # What blocks compute anew is in the memory, and not in the cost.
    parser["method"], parser["network#device"], parser["network#compiled"] = method, "meta", False
    optimizer = _made(parser, "optimizer")

    def memory_with(count: int, parts: int = 1) -> Memory:
        make = partial(blank_batch, method, views, crop_size, count)
        # DDP's buffers of gradients are there all the time.
        gradients_stay = accumulation > 1 or processes > parts
        return memory_of(method, make, optimizer, dtype, device, gradients_stay, parts)

    parts = 1 if sharding == "none" else processes
    budget, steps = _made(parser, "budget"), _made(parser, "steps_per_epoch")
    epochs = _made(parser, "max_epochs") if budget is None else epochs_within(budget, steps * batch_size, lambda: cost)
    return Plan(
        encoder_parameters=_count(method.encoder), parameters=_count(method), cost=cost,
        samples=epochs * steps * batch_size, steps=epochs * steps, batch_size=batch_size, micro_batch=micro,
        processes=processes, precision=precision, device=device, memory=memory_with(micro),
        sharded=memory_with(micro, processes) if processes > 1 else None,
        largest_micro_batch=None if memory is None else _largest(lambda n: memory_with(n, parts).peak, memory * 2**30),
    )  # fmt: skip


def measured_rate(rate: float | str) -> float:
    """FLOP/s of a device: as given, or as the last line of a run's log.jsonl has it.

    Raises:
        InputError: when it is neither.
    """
    if isinstance(rate, str) and Path(rate).is_file():
        lines = [json.loads(line) for line in Path(rate).read_text(encoding="utf-8").splitlines()]
        found = [line["flops_per_second_per_device"] for line in lines if "flops_per_second_per_device" in line]
        if not found:
            raise InputError(f"{rate}: has no line with flops_per_second_per_device. Give the log of a longer run.")
        return float(found[-1])
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
        raise InputError(f"rate {rate!r} must be a number above 0, FLOP/s of a device, or a run's log.jsonl.")
    return float(rate)


def _read(files: Sequence[str], overrides: Mapping[str, Any]) -> ConfigParser:
    """A bundle's configuration, with what overrides it."""
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file}: is not there. Give a bundle's train.json, and overlays after it.")
    parser = ConfigParser()
    parser.read_config(list(files))
    for key, value in overrides.items():
        # An argument may be new where it goes to something that is there.
        place = key.replace("::", "#").rpartition("#")[0] or key
        if place not in parser:
            raise InputError(f"{files[0]}: has no key {place!r} to change. Correct --{key}.")
        parser[key] = value
    return parser


def _made(parser: ConfigParser, key: str) -> Any:
    """What a key of a configuration stands for, without weights."""
    if key not in parser:
        raise InputError(f"the configuration has no key {key!r}. Give a pretraining bundle's train.json.")
    try:
        with torch.device("meta"):
            return parser.get_parsed_content(key)
    except RuntimeError as error:
        raise InputError(f"{key} of the configuration cannot be made: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """What MONAI's parser stumbled over, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _largest(total: Callable[[int], int], room: float) -> int:
    """The largest micro-batch whose bytes fit, found by trying; 0 where one image does not."""
    before, used = (1, total(1)), (_FAR, total(_FAR))
    if before[1] > room:
        return 0
    low, high = (_FAR, _MOST) if used[1] <= room else (1, _FAR)
    while high - low > 1:
        # Memory grows nearly in a straight line, so few guesses by the last two tries are enough.
        slope = max((used[1] - before[1]) / (used[0] - before[0]), 1.0)
        count = min(max(used[0] + int((room - used[1]) // slope), low + 1), high - 1)
        before, used = used, (count, total(count))
        low, high = (count, high) if used[1] <= room else (low, count)
    return low
