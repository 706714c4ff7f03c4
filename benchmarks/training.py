"""Training shared by the benchmarks of quality, for a number of seconds of one core."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch import Tensor, nn

from biovfm_monai.engines import PretrainingTrainer, WarmupCosine, parameter_groups
from biovfm_monai.methods import SSLMethod
from biovfm_monai.shipped import shipped_folder

TRIAL = 12
"""Steps whose time tells how many fit into a budget."""


class Trained(NamedTuple):
    """A method after training, and what it took."""

    method: SSLMethod
    steps: int
    images: int
    cpu_seconds: float
    loss: float


def train(bundle: str, overlay: str | None, overrides: dict[str, Any], seconds: float, seed: int) -> Trained:
    """Train a bundle, with its own schedules, for so many steps as fit into the seconds of one core.

    Args:
        bundle: folder below bundles/.
        overlay: file below configs/, without its ending; None for the bundle as it is.
        overrides: configuration key, as after `--`, to value.
        seconds: of the processor's time, not the clock's, so that other processes do not matter much.
        seed: of weights, crops, views and masks.
    """
    trial = build(bundle, overlay, overrides, TRIAL, seed)
    clock: list[float] = []
    trial.add_event_handler(Events.ITERATION_COMPLETED, lambda _: clock.append(time.process_time()))
    trial.run()
    per_step = (clock[-1] - clock[1]) / (len(clock) - 2)
    steps = max(round(seconds / per_step), 1)
    trainer = build(bundle, overlay, overrides, steps, seed)
    begun = time.process_time()
    trainer.run()
    used = time.process_time() - begun
    return Trained(trainer.method, steps, trainer.samples_seen, used, float(trainer.state.output[0]["loss"]))


def build(bundle: str, overlay: str | None, overrides: dict[str, Any], steps: int, seed: int) -> PretrainingTrainer:
    """The trainer of a bundle without its handlers, which write files."""
    files: list[Path] = [shipped_folder("bundles") / bundle / "configs/train.json"]
    files += [shipped_folder("configs") / f"{overlay}.json"] if overlay else []
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser.update(
        {
            "max_epochs": 1,
            "steps_per_epoch": steps,
            "seed": seed,
            "device": torch.device("cpu"),
            "train#handlers": [],
            **overrides,
        }
    )
    set_determinism(seed)
    return parser.get_parsed_content("train#trainer")


def fine_tune(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_of: Callable[[Tensor, Tensor], Tensor],
    rate: float, layer_decay: float, seconds: float,
) -> int:  # fmt: skip
    """Train a network on images and targets without end, for so many seconds of one core.

    Returns:
        The number of steps.
    """
    network.train()
    optimizer = torch.optim.AdamW(parameter_groups(network, layer_decay=layer_decay), lr=rate, weight_decay=0.05)
    schedule, begun, steps = WarmupCosine(peak=rate), time.process_time(), 0
    for images, targets in batches:
        progress = (time.process_time() - begun) / seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule(progress) * group.get("lr_scale", 1.0)
        optimizer.zero_grad()
        loss_of(network(images), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps
