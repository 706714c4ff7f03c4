"""What a run depends on, to tell another run's state, or a process that was started otherwise, from its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from biovfm_monai.data import GlobalBatchSampler, Policy, RandomCropDataset, RandomResizedCrop

if TYPE_CHECKING:
    from biovfm_monai.engines.trainer import PretrainingTrainer

__all__ = ["MAY_CHANGE", "differences", "settings_of"]

#: what a resumed run may have otherwise, and is told: how fast it goes on, not what it learns from.
MAY_CHANGE = ("max_epochs", "precision", "clip_norm", "optimizer lr", "schedules")
#: what may differ without changing more than rounding.
_NO_MATTER = {"foreach", "fused", "capturable", "differentiable"}
_NOT_SET = "not set"
_VIEWS = ("RandomResizedCrop", "MultiCrop")


def settings_of(engine: PretrainingTrainer) -> dict[str, Any]:
    """What a run was set to, as JSON values by name: the method, its network, optimizer, views and the data's order."""
    sampler, dataset = (getattr(engine.data_loader, name, None) for name in ("batch_sampler", "dataset"))
    network = getattr(getattr(engine.method, "trained", None), "arguments", {})
    optimizer = {name: x for name, x in engine.optimizer.defaults.items() if name not in _NO_MATTER}
    kind = type(engine.prepare_batch).__name__
    described = {
        "method": {"": type(engine.method).__name__, **_plain(engine.method)},
        "encoder": network,
        "optimizer": {"": type(engine.optimizer).__name__, **optimizer},
        "views": {"": kind, **_plain(engine.prepare_batch)} if kind in _VIEWS else kind,
        "crops": {name: getattr(dataset, name) for name in ("crop_size", "zoom") if hasattr(dataset, name)},
        "images": len(dataset.images) if isinstance(dataset, RandomCropDataset) else None,
        "schedules": {
            name: str(schedule) if is_dataclass(schedule) else type(schedule).__name__
            for name, schedule in engine.schedules.items()
        },
    }
    return dict(_flat(described)) | {
        "seed": engine.seed,
        "batch_size": sampler.batch_size if isinstance(sampler, GlobalBatchSampler) else None,
        "steps_per_epoch": int(engine.state.epoch_length) // engine.accumulation_steps,
        "max_epochs": engine.state.max_epochs, "precision": str(engine.dtype), "clip_norm": engine.clip_norm,
    }  # fmt: skip


def _plain(instance: Any) -> dict[str, Any]:
    """The attributes of an instance that say how it was made, and no tensors, networks and own affairs."""
    kinds = (bool, int, float, str, tuple, list, dict, Policy, RandomResizedCrop)
    return {
        name: value for name, value in vars(instance).items()
        if not name.startswith("_") and name != "training" and isinstance(value, kinds)
    }  # fmt: skip


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and JSON value of each number and text in what may lie one in another."""
    if isinstance(value, RandomResizedCrop):
        value = _plain(value)
    if isinstance(value, Policy):
        value = asdict(value)
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name} {key}".strip())
    elif isinstance(value, list | tuple) and any(isinstance(part, RandomResizedCrop) for part in value):
        yield from _flat(dict(enumerate(value)), name)
    else:
        yield name, json.loads(json.dumps(value, default=str))


def differences(found: dict[str, Any], expected: dict[str, Any], of_one_version: bool = True) -> dict[str, str]:
    """A text for each setting that differs, by its name.

    Args:
        found, expected: as `settings_of` gives them.
        of_one_version: whether one that only one of them has counts; versions may name other settings.
    """
    names = [name for name in found if name in expected]
    names += [name for name in {**found, **expected} if name not in names] if of_one_version else []
    return {
        name: f"{name} {found.get(name, _NOT_SET)} instead of {expected.get(name, _NOT_SET)}"
        for name in names
        if json.dumps(found.get(name, _NOT_SET)) != json.dumps(expected.get(name, _NOT_SET))
    }
