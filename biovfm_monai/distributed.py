"""Ranks, process groups, the launcher's environment and signals; the only file that knows of them.

Built on torch.distributed (https://pytorch.org/docs/stable/distributed.html) and ignite.distributed. Tensors of the
meta device, on which costs are counted, are sent to nobody.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from monai.data import utils as monai_data
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai.errors import InputError

__all__ = [
    "RESTART", "asked_to_stop", "barrier", "device", "finalize", "gather", "group_beside", "heeding_signals",
    "initialize", "is_main", "leave_unfinished", "local_world_size", "mean", "most", "rank", "require_same", "total",
    "worker_init_fn", "world_size",
]  # fmt: skip

RESTART = 75
"""Exit status of a run that a signal ended and that is to be started again (EX_TEMPFAIL of sysexits.h)."""

_PAUSE = 0.2
_SIGNALS = signal.SIGTERM, signal.SIGUSR1
_ONE_REQUEST = 5.0
_asked, _unfinished = threading.Event(), threading.Event()
_patience: dict[str, timedelta] = {}


def initialize(timeout: float | None = None) -> None:
    """Join the processes that a launcher announces (NCCL on GPUs, Gloo on CPUs); alone, do nothing.

    The launcher is torchrun, or anything that sets torch's variables (MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK,
    LOCAL_RANK), or Slurm's srun with a task per process.

    Args:
        timeout: seconds to wait for others, now and at each step; None for torch's, 1800 with Gloo, 600 with NCCL.

    Raises:
        InputError: when the others are not found in this time.
    """
    if "LOCAL_RANK" in os.environ:
        # Under Slurm, ignite would overwrite a launcher's LOCAL_RANK with SLURM_LOCALID, one for all ranks of a task.
        os.environ["SLURM_LOCALID"] = os.environ["LOCAL_RANK"]
    # Only srun sets the latter; a script of Slurm's has SLURM_NTASKS, too, and is alone.
    by_slurm = "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if dist.is_initialized() or not (by_slurm or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    options: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    _patience.update(options)
    try:
        if by_slurm:
            idist.initialize(backend, **options)
        else:
            if torch.cuda.is_available():
                torch.cuda.set_device(device())
            dist.init_process_group(backend, **options, **_meeting_place())
    except (dist.DistError, ValueError) as error:
        place, number = (
            ":".join(os.environ.get(name, f"no {name}") for name in names.split())
            for names in ("MASTER_ADDR MASTER_PORT", "RANK")
        )
        raise InputError(
            f"{place}: process {number} did not meet the others there ({str(error).splitlines()[0]}). Start all of "
            "them, with an address of the first one that the others reach, and a port that is free."
        ) from error


def _meeting_place() -> dict[str, Any]:
    """Where processes that torchrun has started again meet, if not where they would; nothing at the first start.

    Its agent keeps one store for all starts, in which they would find the addresses of those that are gone.

    Raises:
        InputError: on several machines, whose agents count starts apart.
    """
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not start or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise InputError(
            "processes on several machines were started again, and do not find each other by torchrun's store. Set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on all machines."
        )
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    return {"store": dist.PrefixStore(f"start {start}", store), "rank": rank, "world_size": world}


def finalize() -> None:
    """Leave the process group, if there is one, once every process is here.

    Raises:
        SystemExit: with the status `RESTART`, when a signal has ended the run (`leave_unfinished`).
    """
    if dist.is_initialized():
        # A Gloo thread that still holds the last tensors needs Python's lock to let go of them, and would never get it
        # once the group, or a DDP that keeps it, waits for that thread. Waiting for the other processes frees the lock,
        # and so does the pause, for a thread that a busy machine has stopped meanwhile.
        dist.barrier()
        time.sleep(_PAUSE)
        dist.destroy_process_group()
    if _unfinished.is_set():
        _unfinished.clear()
        sys.exit(RESTART)


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 for `asked_to_stop` instead of dying of them; after 5 seconds one does what it did.

    Schedulers send them some time before they take a machine away, and a launcher passes on what it got, too. In
    another thread than the main one, which Python gives no signals, nothing changes.
    """
    _asked.clear()
    _unfinished.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0

    def note(number: int, _: Any) -> None:
        nonlocal first
        if not _asked.is_set():
            _asked.set()
            first = time.monotonic()
        elif time.monotonic() - first > _ONE_REQUEST:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def worker_init_fn(worker_id: int) -> None:
    """For a data loader's workers: MONAI's, and signals to all processes of a job are left to the one that trains.

    Where a signal's sender can be told (not on macOS); one of the training process itself, as at its end, counts.
    """
    monai_data.worker_init_fn(worker_id)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=_heed_parent, daemon=True).start()


def _heed_parent() -> None:
    while True:
        said = signal.sigwaitinfo(_SIGNALS)
        if (said.si_signo, said.si_pid) == (signal.SIGTERM, os.getppid()):
            os._exit(0)


def leave_unfinished() -> None:
    """Have `finalize` end this process with the status `RESTART`."""
    _unfinished.set()


def asked_to_stop(device: torch.device | str) -> Tensor:
    """Whether a signal has come to any process, 0 or 1; all processes call it, and get the same at the same step."""
    return most(torch.full((), float(_asked.is_set()), device=device))


def device() -> torch.device:
    """The device of this process: its own GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def group_beside() -> dist.ProcessGroup | None:
    """A further Gloo group of all processes, for a thread beside training: all call it; None of a process alone.

    Its processes wait for each other as long as `initialize` was told.
    """
    return dist.new_group(timeout=_patience.get("timeout"), backend="gloo") if world_size() > 1 else None


def rank() -> int:
    """This process's number among all, from 0."""
    return int(idist.get_rank())


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(idist.get_nproc_per_node())


def world_size() -> int:
    """How many processes train together."""
    return int(idist.get_world_size())


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    idist.barrier()


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes, on each of them."""
    if value.is_meta:
        return value
    return idist.all_reduce(value.clone(), "SUM") / world_size()


def most(x: Tensor) -> Tensor:
    """The largest value over all processes, element by element, on each of them."""
    return x if world_size() == 1 or x.is_meta else idist.all_reduce(x.clone(), "MAX")


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow back to where each row came from.

    With the loss a mean over a process's own rows, and gradients averaged over processes, the gradient is that of one
    process with all rows.

    Args:
        x: N x ..., of the same shape on every process.
    """
    if x.is_meta:
        return torch.cat([x] * world_size())
    return x if world_size() == 1 else _Gather.apply(x)


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on each of them; gradients flow back to all."""
    return x if world_size() == 1 or x.is_meta else _Total.apply(x)


def require_same(settings: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
    """Refuse processes that were started with different settings; all processes call it.

    Args:
        settings: JSON values by name.
        device: where the processes talk.

    Raises:
        InputError: on all of them, naming the settings and the processes.
    """
    if world_size() == 1:
        return
    # Texts, since NaN is not the same as NaN.
    texts = json.dumps({name: json.dumps(value) for name, value in settings.items()})
    text = torch.tensor([list(texts.encode())], dtype=torch.uint8, device=device)
    longest = int(most(torch.tensor(text.shape[1], device=device)))
    # JSON ends where it ends: the rest may be blank.
    rows = gather(F.pad(text, (0, longest - text.shape[1]), value=ord(" "))).tolist()
    first, *others = (json.loads(bytes(row)) for row in rows)
    differ = {
        number: names
        for number, found in enumerate(others, 1)
        if (names := sorted(name for name in {*first, *found} if found.get(name) != first.get(name)))
    }
    if differ:
        names = sorted({name for of in differ.values() for name in of})
        raise InputError(
            f"processes {', '.join(map(str, differ))} have another {', '.join(names)} than process 0. Start all with "
            "the same configuration."
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient
