"""Steps that would spoil the weights are left out, as in PaLM (https://arxiv.org/abs/2204.02311), section 5.1."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from ignite.engine import Events

from biovfm_monai import distributed
from biovfm_monai.data import GlobalBatchSampler
from biovfm_monai.engines.collapse import CollapseHandler
from biovfm_monai.engines.trainer import PretrainingTrainer, StepEvents
from biovfm_monai.errors import InputError, NonFiniteLossError
from biovfm_monai.files import append_json, cut_json_lines

__all__ = ["BadStepHandler"]

logger = logging.getLogger(__name__)

_MEMORY = 0.98


class BadStepHandler:
    """Leave out a step whose loss or gradients are not finite or far beyond the usual, and write down its images.

    A line of `log_path` has the step, its mean loss, the norm of its gradients, why it was left out, and, where a
    `GlobalBatchSampler` gives them, the numbers of its images over all processes: `dataset[number]` is one of them. How
    many there were so far is logged as "bad_steps". Reading the loss makes a GPU wait at each step, for some
    microseconds.

    Args:
        log_path: JSON-lines file; None for no file.
        spike: norm of gradients, as a multiple of its moving average, beyond which a step is bad; None for no limit.
        most: bad steps in a row that end the run.
        watch: the trainer's handler of collapse, to go back instead to the newest state, with lower learning rates.

    Raises:
        InputError: when a number means nothing.
        NonFiniteLossError: in the trainer's `run`, after too many bad steps in a row.
    """

    def __init__(
        self,
        log_path: str | Path | None = None,
        spike: float | None = None,
        most: int = 10,
        watch: CollapseHandler | None = None,
    ) -> None:
        if spike is not None and not spike > 1:
            raise InputError(f"spike {spike} must be above 1, a multiple of the usual norm. Give such as 10.")
        if most < 1:
            raise InputError(f"most {most} must be 1 or more. Give more.")
        self.log_path = None if log_path is None else Path(log_path)
        self.spike, self.most, self.watch = spike, most, watch
        self._begun = False

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        engine.state.bad_steps, engine.state.bad_in_a_row, engine.state.usual_norm = 0, 0, 0.0
        engine.state_dict_user_keys.extend(["bad_steps", "bad_in_a_row", "usual_norm"])
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(StepEvents.GRADIENTS_COMPLETED, self._judge)

    def _start(self, engine: PretrainingTrainer) -> None:
        # Not when it goes back: what is written down is why.
        if distributed.is_main() and self.log_path is not None and self.log_path.exists() and not self._begun:
            cut_json_lines(self.log_path, engine.step)
        self._begun = True

    def _judge(self, engine: PretrainingTrainer) -> None:
        state = engine.state
        loss = distributed.mean(engine.losses_of_step().float().mean()).item()
        norm = state.gradient_norm.item()
        reason = self._reason(engine, loss, norm)
        # Gradients are the same on all processes, their rounding need not be.
        if not distributed.most(torch.tensor(float(bool(reason)), device=state.device)):
            if not math.isfinite(norm):
                return
            kept = _MEMORY if state.usual_norm else 0.0
            state.bad_in_a_row, state.usual_norm = 0, kept * state.usual_norm + (1 - kept) * norm
            return
        engine.leave_out_step()
        state.bad_steps += 1
        state.bad_in_a_row += 1
        state.metrics["bad_steps"] = state.bad_steps
        self._write(engine, {"step": engine.step, "loss": loss, "gradient_norm": norm, "reason": reason})
        if state.bad_in_a_row >= self.most:
            message = f"{self.most} steps in a row were bad, the last one, step {engine.step}, for {reason}."
            if self.watch is None:
                raise NonFiniteLossError(
                    f"{message} Lower --learning_rate, set --clip_norm 1.0, or train with --precision fp32."
                )
            self.watch.go_back(engine, message)

    def _reason(self, engine: PretrainingTrainer, loss: float, norm: float) -> str:
        """Why a step is bad; empty for a good one."""
        if not math.isfinite(loss):
            return f"a loss of {loss}"
        # With a loss scaler a norm that overflows is its own affair: it lowers the scale.
        if not math.isfinite(norm):
            return "" if engine.loss_scaler.is_enabled() else f"a norm of gradients of {norm}"
        if self.spike is not None and 0 < self.spike * engine.state.usual_norm < norm:
            return f"a norm of gradients of {norm:.3g}, {norm / engine.state.usual_norm:.0f} times the usual one"
        return ""

    def _write(self, engine: PretrainingTrainer, line: dict[str, object]) -> None:
        if not distributed.is_main():
            return
        logger.warning("step %d is left out, for %s", engine.step, line["reason"])
        sampler = getattr(engine.data_loader, "batch_sampler", None)
        if isinstance(sampler, GlobalBatchSampler):
            first = (engine.step - 1) * sampler.batch_size
            line["numbers"] = [*range(first, first + sampler.batch_size)]
        if self.log_path is not None:
            append_json(self.log_path, line)
