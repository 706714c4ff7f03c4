"""The state of a run as a folder, of tensors in parts and of all else as JSON.

Each process writes its share by `torch.distributed.checkpoint` (https://pytorch.org/docs/stable/distributed.checkpoint.html)
as safetensors; any number of processes reads it. A folder has its name only once everything is in it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from biovfm_monai import distributed
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_json

__all__ = [
    "damage",
    "discard_drafts",
    "newest_state",
    "read_state",
    "state_name",
    "states_in",
    "step_of",
    "write_state",
]

_FORMAT = 2
_ABOUT = "state.json"
_NAME = re.compile(r"step-\d{8,}(-stopped)?")
_NUMBERS_PER_FILE = 2**28


def state_name(step: int, stopped: bool = False) -> str:
    """What the folder of a state is called; `stopped`, if it is of the middle of an epoch."""
    return f"step-{step:08d}{'-stopped' * stopped}"


def step_of(path: Path) -> int:
    """The number of steps in the name of a state."""
    return int(path.name.split("-")[1])


def states_in(folder: Path) -> list[Path]:
    """The states that are there, newest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def newest_state(path: Path) -> Path:
    """A state, or the newest one in a folder of states.

    Raises:
        InputError: when it is neither.
    """
    if (path / _ABOUT).is_file():
        return path
    if states := states_in(path):
        return states[0]
    raise InputError(f"{path}: no state of a run, and no folder of them. Give a run's models/state.")


def discard_drafts(folder: Path) -> None:
    """Remove what killed processes had begun to write."""
    for draft in folder.glob(".step-*.draft"):
        shutil.rmtree(draft)


def write_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, list[int]],
    about: dict[str, Any],
    group: ProcessGroup | None = None,
) -> None:
    """Write a state; all processes call it, and the main one does not return before it is there.

    Args:
        path: the folder that the state becomes.
        tensors: this process's share, on the CPU: sharded ones, and others that it alone writes.
        shapes: of all tensors of the state, by name.
        about: JSON values.
        group: of the processes, for use in a thread beside training; None for a process alone.

    Raises:
        InputError: when a process cannot write, for want of room, say.
    """
    draft = path.with_name(f".{path.name}.draft")
    if distributed.is_main():
        shutil.rmtree(draft, ignore_errors=True)
    # What goes into one file is copied once more.
    ends = accumulate(math.prod(shape) for shape in shapes.values())
    files = {name: end // _NUMBERS_PER_FILE + 1 for name, end in zip(shapes, ends, strict=True)}
    writer = dcp.HuggingFaceStorageWriter(str(draft), files, save_distributed=True)
    _say_nothing_of_one_process()
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        raise _unwritten(path, error) from error
    if distributed.is_main():
        write_json(draft / _ABOUT, {"format": _FORMAT, "tensors": shapes, **about})
        draft.replace(path)


def about_state(path: Path) -> dict[str, Any]:
    """The JSON values of a state.

    Raises:
        InputError: when a newer version wrote it.
    """
    about: dict[str, Any] = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    if about["format"] > _FORMAT:
        raise InputError(f"{path}: was written by a newer version of biovfm-monai. Update this one.")
    return about


def damage(path: Path) -> str:
    """What is wrong with a state; empty for one that is whole.

    Raises:
        InputError: when a newer version wrote it.
    """
    try:
        about = about_state(path)
        found = _tensors_in(path)
    except (SafetensorError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        return (str(error) or "empty").splitlines()[0]
    for name, shape in about["tensors"].items():
        there = [part.sizes.numel() for part in found[name].chunks] if name in found else [-1]
        if sum(there) != math.prod(shape):
            return f"{name} is not whole: a file is missing"
    return ""


def read_state(
    path: Path,
    prefix: str = "",
    like: Callable[[str], Tensor | None] = lambda _: None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The tensors of a state, on the CPU; all processes of a group call it.

    Args:
        path: folder of a state that is whole.
        prefix: of the names that are wanted.
        like: name -> tensor; where it is sharded, and of the same shape, what is read is sharded alike.
        group: of processes that read together, parts of what is sharded; None for a process alone.
    """
    tensors = {}
    for name, found in _tensors_in(path).items():
        if name.startswith(prefix):
            own = like(name)
            if isinstance(own, DTensor) and own.shape == found.size:
                tensors[name] = torch.empty_like(own)
            else:
                tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
    reader = dcp.HuggingFaceStorageReader(str(path))
    _say_nothing_of_one_process()
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    return tensors


def _tensors_in(path: Path) -> dict[str, Any]:
    return dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata


def _say_nothing_of_one_process() -> None:
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def _unwritten(path: Path, error: dcp.CheckpointException) -> InputError:
    """What a user can do something about, of what kept processes from writing."""
    reasons = {}
    for rank, (reason, _) in error.failures.items():
        if not isinstance(reason, OSError):
            raise RuntimeError(f"{path}: could not be written by process {rank}") from reason
        reasons[rank] = reason.strerror or str(reason)
    listed = ", ".join(f"process {rank}: {reason}" for rank, reason in reasons.items())
    return InputError(
        f"{path}: could not be written ({listed}). Make room or mend the disk, and go on with --resume True."
    )
