"""Where the runs of a study work: on this machine, one in a folder and one on a GPU at a time, by Ray, or by Slurm."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import joblib
import torch

from biovfm_monai.data.jobs import share_out
from biovfm_monai.errors import InputError

__all__ = ["alone", "gpu", "launched"]

logger = logging.getLogger(__name__)

_LAUNCHERS = {"local": None, "ray": "ray", "slurm": "submitit"}
"""How runs are started, and what has to be installed for it."""


def launched(
    work: Callable[[Path], str | None],
    folders: Sequence[Path],
    out: Path,
    launcher: str,
    workers: int,
    options: Mapping[str, Any],
) -> Iterator[tuple[Path, str | None]]:
    """Work in folders, and tell of each, as it ends, why it failed; the arguments are those of `run_study`.

    Raises:
        InputError: when there is no such launcher.
    """
    if launcher not in _LAUNCHERS:
        raise InputError(f"launcher {launcher!r} is unknown. Give one of {', '.join(_LAUNCHERS)}.")
    needed = _LAUNCHERS[launcher]
    if needed is not None and find_spec(needed) is None:
        raise InputError(f"launcher {launcher} needs {needed}. Install biovfm-monai[{launcher}].")
    if launcher == "slurm":
        import submitit  # noqa: PLC0415 - an extra

        executor = submitit.AutoExecutor(folder=out / "slurm")
        if executor.cluster != "slurm":
            logger.warning("there is no Slurm here: runs are processes on this machine")
        executor.update_parameters(**{"slurm_array_parallelism": workers, **options})
        jobs = dict(zip(executor.map_array(work, folders), folders, strict=True))
        for job in submitit.helpers.as_completed([*jobs]):
            # A job may be lost, or ended for its time.
            error = job.exception()
            yield jobs[job], job.result() if error is None else f"was ended: {' '.join(str(error).split())[:300]}"
        return
    if launcher == "ray":
        from ray.util.joblib import register_ray  # noqa: PLC0415 - an extra

        register_ray()
    # Work is done in processes of its own, so threads are enough here.
    with joblib.parallel_config(backend="ray" if launcher == "ray" else "threading"):
        yield from share_out((joblib.delayed(_named)(work, folder) for folder in folders), workers, ordered=False)


def _named(work: Callable[[Path], str | None], folder: Path) -> tuple[Path, str | None]:
    return folder, work(folder)


@contextmanager
def alone(path: Path) -> Iterator[IO[str]]:
    """Wait until no other process works in a folder, even one that has outlived what started it."""
    with path.open("w", encoding="utf-8") as lock:
        if not _taken(lock):
            logger.info("%s: another process is at work there, and is waited for", path.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def gpu(out: Path) -> Iterator[tuple[str | None, list[IO[str]]]]:
    """A GPU of this machine that no other run of the study has, or the first one; None where there is none.

    With it come the locks that say so, for programs that may outlive this one.
    """
    if not torch.cuda.is_available():
        yield None, []
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(n) for n in range(torch.cuda.device_count())] if given is None else given.split(",")
    with ExitStack() as opened:
        for device in devices:
            path = out / f".gpu-{platform.node()}-{device}"
            lock = opened.enter_context(path.open("w", encoding="utf-8"))
            if _taken(lock):
                yield device, [lock]
                return
        yield devices[0], []


def _taken(lock: IO[str]) -> bool:
    """Take a lock, if no other process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
