"""What a run depends on, to tell another run's state, or a process that was started otherwise, from its own."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from biovfm_monai import distributed
from biovfm_monai.data import GlobalBatchSampler
from biovfm_monai.errors import InputError

if TYPE_CHECKING:
    from biovfm_monai.engines.trainer import PretrainingTrainer

__all__ = ["differences", "require_same_everywhere", "settings_of"]


def settings_of(engine: PretrainingTrainer) -> dict[str, Any]:
    """JSON values without which a run cannot go on as it began: of the method, its network and the data's order."""
    sampler = getattr(engine.data_loader, "batch_sampler", None)
    network = getattr(engine.method.trained, "arguments", {})
    return {
        "method": type(engine.method).__name__,
        **{f"encoder {name}": json.loads(json.dumps(value)) for name, value in network.items()},
        "seed": engine.seed,
        "batch_size": sampler.batch_size if isinstance(sampler, GlobalBatchSampler) else None,
        "steps_per_epoch": int(engine.state.epoch_length) // engine.accumulation_steps,
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One text for each setting that differs; one that only one of them has does not count."""
    return [
        f"{name} {found[name]} instead of {value}"
        for name, value in expected.items()
        if name in found and found[name] != value
    ]


def require_same_everywhere(engine: PretrainingTrainer) -> None:
    """Refuse processes that were started with different settings; all processes call it.

    Raises:
        InputError: naming the settings and the processes, on all of them.
    """
    if distributed.world_size() == 1:
        return
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in engine.optimizer.param_groups
    ]
    settings = settings_of(engine) | {
        "max_epochs": engine.state.max_epochs, "precision": str(engine.dtype), "clip_norm": engine.clip_norm,
        "accumulation_steps": engine.accumulation_steps, "optimizer": str(groups), "schedules": str(engine.schedules),
    }  # fmt: skip
    digests = [int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:7]) for value in settings.values()]
    everywhere = distributed.gather(torch.tensor([digests], device=engine.state.device))
    differ = everywhere != everywhere[0]
    others = [str(number) for number, differs in enumerate(differ.any(1).tolist()) if differs]
    names = [name for name, differs in zip(settings, differ.any(0).tolist(), strict=True) if differs]
    if names:
        raise InputError(
            f"processes {', '.join(others)} have another {', '.join(names)} than process 0. Start all with the same "
            "configuration."
        )
