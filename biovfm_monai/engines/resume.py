"""The state of a run, written so that a kill at any moment leaves a usable file behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch.optim import Optimizer

import biovfm_monai
from biovfm_monai import distributed
from biovfm_monai.engines.settings import differences, settings_of
from biovfm_monai.engines.trainer import PretrainingTrainer
from biovfm_monai.errors import InputError
from biovfm_monai.files import require_writable, set_aside, write_atomically
from biovfm_monai.parallelism import spread, whole

__all__ = ["StateHandler"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_STOPPED, *_AT_EPOCHS = _NAMES = "stopped.pt", "latest.pt", "previous.pt"


class StateHandler:
    """Keep a run's newest state in `latest.pt` and the one before in `previous.pt`, as they were at ends of epochs.

    A run that a signal ends leaves `stopped.pt`, too, as it was after its last step. With a `GlobalBatchSampler` it
    goes on from there as if nothing had been; other loaders begin their epoch again.

    A state holds the method (teacher and heads too), the optimizer, the loss scaler, how far the run is, and attributes
    of `engine.state` that other handlers have named in `engine.state_dict_user_keys`; schedules, data order and random
    numbers follow from that. Files hold tensors and plain values only and are read with `weights_only=True`.

    Args:
        folder: where the two files are.
        interval: epochs between writes; the last epoch is always written.
        resume: start from the newest readable state in the folder, if there is one; else states of an earlier run there
            are set aside (`latest.pt.before`), so that no later resume mistakes them for this run's.

    Raises:
        InputError: on resuming from a state of another network, optimizer or batch size, or when no state can be read.
    """

    def __init__(self, folder: str | Path, interval: int = 1, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.interval = interval
        self.resume = resume
        self._rewinding = False

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        # Before all other handlers: they look at where the run is.
        engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)
        engine.add_event_handler(Events.TERMINATE, self._save_stopped)

    def rewind(self, engine: PretrainingTrainer) -> bool:
        """Let a run go back to its newest state once this iteration is complete.

        Call it on all processes, and before the end of the epoch, whose state would be the newest one else. The main
        process says for all whether there is one: others may see a shared disk late.

        Returns:
            Whether there is a state; without one, nothing happens.
        """
        found = float(distributed.is_main() and any((self.folder / name).exists() for name in _AT_EPOCHS))
        self._rewinding = bool(distributed.most(torch.tensor(found, device=engine.state.device)))
        if self._rewinding:
            engine.begin_again()
        return self._rewinding

    def _save(self, engine: PretrainingTrainer) -> None:
        due = engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs
        state = _state_of(engine) if due else None
        if state is None or not distributed.is_main():
            return
        latest = self.folder / "latest.pt"
        with write_atomically(latest) as draft:
            torch.save(state, draft)
            # It is older than the draft, and would be taken for newer than what the draft becomes.
            (self.folder / _STOPPED).unlink(missing_ok=True)
            if latest.exists():
                latest.replace(self.folder / "previous.pt")

    def _save_stopped(self, engine: PretrainingTrainer) -> None:
        state = _state_of(engine) if engine.stopped else None
        if state is not None and distributed.is_main():
            with write_atomically(self.folder / _STOPPED) as draft:
                torch.save(state, draft)
            logger.warning("a signal stopped the run after step %d: go on with --resume True", engine.step)

    def _load(self, engine: PretrainingTrainer) -> None:
        resume, rewinding, self._rewinding = self.resume or self._rewinding, self._rewinding, False
        # One process decides which state it is, before the others look.
        if distributed.is_main():
            require_writable(self.folder)
            if rewinding:
                (self.folder / _STOPPED).unlink(missing_ok=True)
            if resume:
                self._set_damaged_aside()
            else:
                for path in self._paths():
                    set_aside(path)
        distributed.barrier()
        paths = self._paths()
        if resume and paths:
            self._apply(engine, torch.load(paths[0], map_location="cpu", weights_only=True), paths[0])
        elif resume:
            logger.info("no state to resume from in %s: starting anew", self.folder)

    def _paths(self) -> list[Path]:
        """The states that are there, newest first."""
        return [path for name in _NAMES if (path := self.folder / name).exists()]

    def _set_damaged_aside(self) -> None:
        """Rename damaged states up to the newest good one: the next write would keep one in place of the good one."""
        paths = self._paths()
        for path in paths:
            try:
                torch.load(path, map_location="cpu", weights_only=True)
                return
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - a damaged pickle fails in many ways
                reason = (str(error) or "empty").splitlines()[0]
                logger.warning("%s is damaged (%s): trying the state before it", path, reason)
                path.replace(path.with_suffix(".damaged"))
        if paths:
            raise InputError(
                f"{self.folder}: no state in it can be read. Restore one, or start anew with --resume False."
            )

    @staticmethod
    def _apply(engine: PretrainingTrainer, state: dict[str, Any], path: Path) -> None:
        if state.get("format", 0) > _FORMAT:
            raise InputError(f"{path}: was written by a newer version of biovfm-monai. Update this one.")
        if others := differences(state.get("settings", {}), settings_of(engine)):
            raise InputError(
                f"{path}: is the state of another configuration: {'; '.join(others)}. Resume with the configuration it "
                "was made with, or start anew with --resume False."
            )
        try:
            own = engine.method.state_dict()
            engine.method.load_state_dict({name: spread(x, own.get(name)) for name, x in state["method"].items()})
            engine.optimizer.load_state_dict(_spread_over(engine.optimizer, state["optimizer"]))
            engine.loss_scaler.load_state_dict(state["loss_scaler"])
            engine.state.iteration = state["step"] * engine.accumulation_steps
            engine.state.epoch = state["epoch"]
            for name in {*engine.state_dict_user_keys} & state.get("kept", {}).keys():
                setattr(engine.state, name, state["kept"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{path}: is the state of another configuration ({reason[:300]}). Resume with the configuration it was "
                "made with, or start anew with --resume False."
            ) from error
        logger.info("resumed from %s: epoch %d, iteration %d", path, engine.state.epoch, engine.state.iteration)


def _spread_over(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of = {n: {name: spread(x, parameters[n]) for name, x in values.items()} for n, values in state["state"].items()}
    return {**state, "state": of}


def _state_of(engine: PretrainingTrainer) -> dict[str, Any]:
    """The state of a run, put together from all processes: each calls it."""
    settings = settings_of(engine)
    return {
        "format": _FORMAT,
        "version": biovfm_monai.__version__,
        "torch": str(torch.__version__),
        "settings": settings,
        "method": whole(engine.method.state_dict()),
        "optimizer": whole(engine.optimizer.state_dict()),
        "loss_scaler": engine.loss_scaler.state_dict(),
        "step": engine.step,
        "epoch": engine.step // settings["steps_per_epoch"],
        "samples_seen": engine.samples_seen,
        "kept": {name: getattr(engine.state, name) for name in engine.state_dict_user_keys},
    }
