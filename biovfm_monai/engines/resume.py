"""The state of a run, written beside training so that a kill at any moment leaves a usable one behind.

https://pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import logging
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

import biovfm_monai
from biovfm_monai import distributed
from biovfm_monai.checkpoints import state as states
from biovfm_monai.engines.settings import MAY_CHANGE, differences
from biovfm_monai.engines.trainer import PretrainingTrainer, StepEvents
from biovfm_monai.errors import InputError, reason_of, require_within
from biovfm_monai.files import rename_over, require_writable, set_aside

__all__ = ["StateHandler"]

logger = logging.getLogger(__name__)

_FORMER = "latest.pt"


class StateHandler:
    """Keep the newest states of a run, a folder each, as they were at ends of epochs: `step-<number of steps>`.

    A run that a signal ends leaves `step-<...>-stopped`, too, as it was after its last step. With a
    `GlobalBatchSampler` it goes on from there as if nothing had been; other loaders begin their epoch again.

    A state holds the method (teacher and heads too), the optimizer, the loss scaler, how far the run is, and attributes
    of `engine.state` that other handlers have named in `engine.state_dict_user_keys`, JSON values; schedules, data
    order and random numbers follow from that. Training stands still while tensors are copied to memory, a share by
    each process, and goes on while they are written. What keeps them from being written ends the run at its next step.

    Args:
        folder: where the states are.
        interval: epochs between writes; the last epoch is always written.
        resume: start from the newest state in the folder that is whole, if there is one; else states of an earlier run
            there are set aside (`*.before`), so that no later resume mistakes them for this run's.
        keep: how many states of ends of epochs stay.
        keep_every: epochs between states that stay for good; None for no such ones.

    Raises:
        InputError: when a number means nothing; on resuming from a state of another network, optimizer or batch size,
            or when no state can be read; in the trainer's `run`, when a state cannot be written.
    """

    def __init__(
        self, folder: str | Path, interval: int = 1, resume: bool = False, keep: int = 2, keep_every: int | None = None
    ) -> None:
        require_within(1, whole=True, interval=interval, keep=keep, keep_every=1 if keep_every is None else keep_every)
        self.folder = Path(folder)
        self.interval, self.resume, self.keep, self.keep_every = interval, resume, keep, keep_every
        self._rewinding = False
        self._group: ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(1, "states")
        self._writing: Future[None] | None = None
        on_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        # Before all other handlers: they look at where the run is.
        engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)
        engine.add_event_handler(Events.TERMINATE, self._save_stopped)
        engine.add_event_handler(StepEvents.RUN_ENDED, self._end)

    def rewind(self, engine: PretrainingTrainer) -> bool:
        """Let a run go back to its newest state once this iteration is complete.

        Call it on all processes, and before the end of the epoch, whose state would be the newest one else. The main
        process says for all whether there is one: others may see a shared disk late.

        Returns:
            Whether there is a state; without one, nothing happens.
        """
        self._wait()
        found = float(distributed.is_main() and any(not _is_stopped(path) for path in states.states_in(self.folder)))
        self._rewinding = bool(distributed.most(torch.tensor(found, device=engine.state.device)))
        if self._rewinding:
            engine.begin_again()
        return self._rewinding

    def _save(self, engine: PretrainingTrainer) -> None:
        if engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs:
            self._begin(engine, stopped=False)

    def _save_stopped(self, engine: PretrainingTrainer) -> None:
        if engine.stopped:
            self._begin(engine, stopped=True)
            logger.warning("a signal stopped the run after step %d: go on with --resume True", engine.step)

    def _begin(self, engine: PretrainingTrainer, stopped: bool) -> None:
        """Copy the state, and let it be written."""
        self._wait()
        tensors, about = _state_of(engine)
        share: Any = self._stager.stage(_share(engine, tensors))
        shapes = {name: list(x.shape) for name, x in tensors.items()}
        path = self.folder / states.state_name(engine.step, stopped)
        self._writing = self._thread.submit(self._write, path, share, shapes, about)

    def _write(self, path: Path, share: dict[str, Tensor], shapes: dict[str, list[int]], about: dict[str, Any]) -> None:
        states.write_state(path, share, shapes, about, self._group)
        if not distributed.is_main() or _is_stopped(path):
            return
        steps = about["settings"]["steps_per_epoch"] * (self.keep_every or 0)
        ends = [found for found in states.states_in(self.folder) if not _is_stopped(found)]
        gone = {found for found in ends[self.keep :] if not steps or states.step_of(found) % steps}
        for found in states.states_in(self.folder):
            if found in gone or _is_stopped(found):
                # What someone still reads may not go: it is then a draft, which the next run removes.
                draft = found.replace(found.with_name(f".{found.name}.draft"))
                shutil.rmtree(draft, ignore_errors=True)

    def _look(self, _: PretrainingTrainer) -> None:
        if self._writing is not None and self._writing.done():
            self._wait()

    def _wait(self, _: PretrainingTrainer | None = None) -> None:
        """Until what is being written is there; raises what kept it from being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _end(self, _: PretrainingTrainer) -> None:
        ended_by = sys.exception()
        try:
            self._wait()
        except Exception as error:
            if ended_by is None:
                raise
            # What ended the run is to be seen, not what came of it.
            logger.error("the last state was not written: %s", reason_of(error))

    def _load(self, engine: PretrainingTrainer) -> None:
        self._wait()
        resume, rewinding, self._rewinding = self.resume or self._rewinding, self._rewinding, False
        if self._group is None:
            self._group = distributed.group_beside()
        # One process decides which state it is, for all: others may see a shared disk late.
        chosen = self._choose(resume, rewinding) if distributed.is_main() else None
        number = -1 if chosen is None else 2 * states.step_of(chosen) + _is_stopped(chosen)
        number = int(distributed.most(torch.tensor(number, device=engine.state.device)))
        if number >= 0:
            self._apply(engine, self.folder / states.state_name(number // 2, bool(number % 2)))
        elif resume:
            logger.info("no state to resume from in %s: starting anew", self.folder)

    def _choose(self, resume: bool, rewinding: bool) -> Path | None:
        """The newest good state, those after it set aside: the next write would keep one in place of the good one."""
        require_writable(self.folder)
        states.discard_drafts(self.folder)
        found = states.states_in(self.folder)
        damaged = []
        for path in found:
            if rewinding and _is_stopped(path):
                shutil.rmtree(path)
            elif not resume:
                set_aside(path)
            elif reason := states.damage(path):
                logger.warning("%s is damaged (%s): trying the state before it", path, reason)
                damaged.append(path)
            else:
                for other in damaged:
                    rename_over(other, other.with_name(f"{other.name}.damaged"))
                return path
        if damaged:
            # They stay where they are, so that the next attempt, which an agent may make, does not start anew.
            raise InputError(
                f"{self.folder}: no state in it can be read. Restore one, or start anew with --resume False."
            )
        if resume and (self.folder / _FORMER).exists():
            raise InputError(
                f"{self.folder / _FORMER}: was written by an older version of biovfm-monai, in one file. Go on with "
                "that version, or start anew with --resume False."
            )
        return None

    def _apply(self, engine: PretrainingTrainer, path: Path) -> None:
        try:
            state = states.about_state(path)
            others = differences(state["settings"], engine.settings, _versions().items() <= state.items())
            if refused := [text for name, text in others.items() if not name.startswith(MAY_CHANGE)]:
                raise ValueError("; ".join(refused))
            tensors = states.read_state(path, like=_like(engine), group=self._group)
            method = {name.removeprefix("method."): x for name, x in tensors.items() if name.startswith("method.")}
            engine.method.load_state_dict(method)
            engine.optimizer.load_state_dict(_optimizer_state(tensors, state["optimizer"]))
            engine.loss_scaler.load_state_dict(state["loss_scaler"])
            engine.state.iteration = state["step"] * engine.accumulation_steps
            engine.state.epoch = state["epoch"]
            for name in {*engine.state_dict_user_keys} & state["kept"].keys():
                setattr(engine.state, name, state["kept"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())
            raise InputError(
                f"{path}: is the state of another configuration: {reason[:600]}. Resume with the configuration it was "
                "made with, or start anew with --resume False."
            ) from error
        logger.info("resumed from %s: epoch %d, iteration %d", path, engine.state.epoch, engine.state.iteration)
        if others:
            logger.warning("%s was made with other settings, it had %s", path, "; ".join(others.values()))


def _is_stopped(path: Path) -> bool:
    return path.name.endswith("-stopped")


def _versions() -> dict[str, str]:
    return {"version": biovfm_monai.__version__, "torch": str(torch.__version__)}


def _state_of(engine: PretrainingTrainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a run, by name, and all else, as JSON values."""
    settings, optimizer = engine.settings, engine.optimizer.state_dict()
    tensors = {f"method.{name}": x for name, x in engine.method.state_dict().items()}
    others: dict[str, dict[str, Any]] = {}
    for number, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            else:
                others.setdefault(str(number), {})[name] = value
    return tensors, {
        **_versions(),
        "settings": settings,
        "optimizer": {"param_groups": optimizer["param_groups"], "state": others},
        "loss_scaler": engine.loss_scaler.state_dict(),
        "step": engine.step,
        "epoch": engine.step // settings["steps_per_epoch"],
        "samples_seen": engine.samples_seen,
        "kept": {name: getattr(engine.state, name) for name in engine.state_dict_user_keys},
    }


def _optimizer_state(tensors: dict[str, Tensor], about: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer loads, of the tensors and JSON values of `_state_of`."""
    state = {int(number): dict(values) for number, values in about["state"].items()}
    for name, x in tensors.items():
        if name.startswith("optimizer."):
            _, number, value = name.split(".", 2)
            state.setdefault(int(number), {})[value] = x
    return {"param_groups": about["param_groups"], "state": state}


def _share(engine: PretrainingTrainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process writes: its parts, of what all have alike as much as others, and if it is the main one buffers.

    A batch norm's statistics are those of a process's own images, and the main one's are sent to all before each step.
    """
    buffers = {f"method.{name}" for name, _ in engine.method.named_buffers()}
    alike = [name for name, x in tensors.items() if name not in buffers and not isinstance(x, DTensor)]
    alike.sort(key=lambda name: tensors[name].numel())
    mine = {*alike[distributed.rank() :: distributed.world_size()], *(buffers if distributed.is_main() else ())}
    return {name: x for name, x in tensors.items() if name in mine or isinstance(x, DTensor)}


def _like(engine: PretrainingTrainer) -> Any:
    """Name of a tensor of a state -> the run's own, or for the optimizer's that of the weight."""
    own = engine.method.state_dict()
    parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]

    def like(name: str) -> Tensor | None:
        kind, _, rest = name.partition(".")
        if kind == "method":
            return own.get(rest)
        number = int(rest.partition(".")[0])
        return parameters[number] if number < len(parameters) else None

    return like
