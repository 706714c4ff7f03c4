"""How fast a run is, what it waits for and how its loss falls: shown, logged and kept as JSON lines."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

from biovfm_monai import distributed
from biovfm_monai.engines.trainer import PretrainingTrainer
from biovfm_monai.engines.usage import BatchCosts, peak_flops, peak_memory
from biovfm_monai.files import append_json, cut_json_lines

__all__ = ["ProgressHandler"]

logger = logging.getLogger(__name__)


class ProgressHandler:
    """Progress bar in a terminal, log lines elsewhere, and one JSON line per interval.

    Each interval's mean loss over all processes, rates, share of time spent waiting for data and the learning rate go
    to `engine.state.metrics` on every process; the main process shows and writes them. It writes the means of all
    other scalars of the output, too, and what other handlers have put into `engine.state.metrics` last.

    Rates are of images, and from the first whole interval on of tokens and of floating-point operations, as `Cost`
    counts them; "mfu" is the latter's share of `peak_flops`. Those "per_device" and "peak_memory_gib" are this
    process's.

    Args:
        log_path: JSON-lines file; what it holds beyond the step a run starts from is dropped. None for no file.
        interval: optimizer steps per line; the first step has a line of its own.
    """

    def __init__(self, log_path: str | Path | None = None, interval: int = 50) -> None:
        self.log_path = None if log_path is None else Path(log_path)
        self.interval = interval
        self._waited = self._asked = self._begun = 0.0
        self._scalars: dict[str, list[torch.Tensor]] = {}
        self._replaced: list[torch.Tensor] = []
        self._samples = 0
        self._bar: tqdm | None = None
        self._costs: BatchCosts | None = None

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        engine.state.replaced_images = 0
        engine.state_dict_user_keys.append("replaced_images")
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._receive)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._finish)

    def _start(self, engine: PretrainingTrainer) -> None:
        self._finish(engine)
        self._costs = BatchCosts(engine.method)
        self._reset(engine)
        if not distributed.is_main():
            return
        if self.log_path is not None:
            cut_json_lines(self.log_path, engine.step)
        # disable=None: no bar where standard error is no terminal.
        self._bar = tqdm(total=engine.total_steps, initial=engine.step, unit="step", disable=None)

    def _reset(self, engine: PretrainingTrainer) -> None:
        self._scalars, self._replaced, self._waited = {}, [], 0.0
        if self._costs is not None:
            self._costs.reset()
        self._samples, self._begun = engine.samples_seen, time.perf_counter()

    def _ask(self) -> None:
        self._asked = time.perf_counter()

    def _receive(self) -> None:
        self._waited += time.perf_counter() - self._asked

    def _count(self, engine: PretrainingTrainer) -> None:
        for name, value in engine.state.output[0].items():
            if isinstance(value, torch.Tensor) and value.ndim == 0:
                self._scalars.setdefault(name, []).append(value)
        if "replaced" in engine.state.batch:
            self._replaced.append(engine.state.batch["replaced"].sum())
        if engine.state.iteration % engine.accumulation_steps:
            return
        if self._bar is not None:
            self._bar.update()
        if engine.step == 1 or engine.step % self.interval == 0 or engine.step == engine.total_steps:
            self._report(engine)
            self._reset(engine)

    def _report(self, engine: PretrainingTrainer) -> None:
        # Reading the means waits for the device, so the clock is read after it.
        means = torch.stack([torch.stack(values).float().mean() for values in self._scalars.values()])
        scalars = dict(zip(self._scalars, distributed.mean(means).tolist(), strict=True))
        seconds = time.perf_counter() - self._begun
        metrics = {
            "loss": scalars["loss"],
            "learning_rate": engine.optimizer.param_groups[0]["lr"],
            **self._rates(engine, seconds),
            "data_wait": self._waited / seconds,
            "peak_memory_gib": peak_memory(engine.state.device),
        }
        if self._replaced:
            count = torch.stack(self._replaced).sum().float().to(engine.state.device)
            engine.state.replaced_images += int(distributed.total(count))
            metrics["replaced_images"] = engine.state.replaced_images
        # "loss" is the name of each iteration's own in TensorBoard and MLflow.
        engine.state.metrics.update({"mean_loss" if name == "loss" else name: value for name, value in metrics.items()})
        if not distributed.is_main():
            return
        if self.log_path is not None:
            others = {name: value for name, value in engine.state.metrics.items() if name != "mean_loss"}
            measured = {name: value for name, value in {**metrics, **scalars, **others}.items() if _is_finite(value)}
            line = {"step": engine.step, "samples": engine.samples_seen, "seconds": round(seconds, 3), **measured}
            append_json(self.log_path, line)
        self._show(engine, metrics)

    def _rates(self, engine: PretrainingTrainer, seconds: float) -> dict[str, float]:
        """Images, tokens and operations per second; the clock does not run while they are counted."""
        images, devices = (engine.samples_seen - self._samples) / seconds, distributed.world_size()
        rates = {"images_per_second": images, "images_per_second_per_device": images / devices}
        cost = None if self._costs is None else self._costs.total(count=engine.step % self.interval == 0)
        if cost is None:
            return rates
        return rates | {
            "tokens_per_second": devices * cost.tokens / seconds,
            "tokens_per_second_per_device": cost.tokens / seconds,
            "flops_per_second_per_device": cost.flops / seconds,
            "mfu": cost.flops / seconds / peak_flops(engine.state.device, engine.dtype),
        }

    def _show(self, engine: PretrainingTrainer, metrics: dict[str, Any]) -> None:
        rate = metrics["images_per_second"]
        text = (
            f"loss {metrics['loss']:.4f}, rate {metrics['learning_rate']:.2e}, "
            f"{rate:.0f} images/s, {metrics['data_wait']:.0%} waiting for data"
        )
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        images = (engine.total_steps - engine.step) * (engine.samples_seen / max(engine.step, 1))
        left = time.strftime("%H:%M:%S", time.gmtime(images / max(rate, 1e-9)))
        logger.info("step %d of %d: %s, %s left", engine.step, engine.total_steps, text, left)

    def _finish(self, _: Engine, error: BaseException | None = None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._costs is not None:
            self._costs.close()
        if error is not None:
            raise error


def _is_finite(value: Any) -> bool:
    # JSON has no infinity, which is what fp16 now and then has for a norm of gradients.
    return isinstance(value, int | float) and math.isfinite(value)
