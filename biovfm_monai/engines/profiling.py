"""A trace of a few training steps: https://docs.pytorch.org/docs/stable/profiler.html, shown by https://ui.perfetto.dev."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ignite.engine import Engine, Events
from torch.profiler import ProfilerActivity, profile

from biovfm_monai import distributed
from biovfm_monai.engines.trainer import PretrainingTrainer
from biovfm_monai.errors import require_within

__all__ = ["ProfileHandler"]

logger = logging.getLogger(__name__)

_TALK = ("nccl", "gloo:")


class ProfileHandler:
    """Write `trace_rank<n>.json` of a few iterations of each process, and what share of them is communication.

    That share, "communication", goes to `engine.state.metrics`: the time in which a collective is under way, whether
    or not the process computes meanwhile, as a share of the traced time.

    Args:
        folder: where the traces go.
        first: iteration, from the start of this run, at which they begin, so that what is slow at first is left out.
        iterations: that they show.
    """

    def __init__(self, folder: str | Path, first: int = 5, iterations: int = 3) -> None:
        require_within(1, whole=True, first=first, iterations=iterations)
        self.folder, self.first, self.iterations = Path(folder), first, iterations
        self._profile: profile | None = None
        self._done = 0

    def attach(self, engine: PretrainingTrainer) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE | Events.EXCEPTION_RAISED, self._give_up)

    def _start(self) -> None:
        self._done = 0

    def _begin(self, engine: PretrainingTrainer) -> None:
        if self._done == self.first - 1 and self._profile is None:
            gpu = [ProfilerActivity.CUDA] if engine.state.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()

    def _count(self, engine: PretrainingTrainer) -> None:
        self._done += 1
        if self._profile is not None and self._done == self.first - 1 + self.iterations:
            self._profile.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"trace_rank{distributed.rank()}.json"
            self._profile.export_chrome_trace(str(path))
            spans = [(event.time_range.start, event.time_range.end, event.name) for event in self._profile.events()]
            traced = _covered((start, end) for start, end, _ in spans)
            talk = _covered((start, end) for start, end, name in spans if name.startswith(_TALK))
            engine.state.metrics["communication"] = share = talk / traced if traced else 0.0
            self._profile = None
            if distributed.is_main():
                logger.info("%s: %d iterations, of which %.0f%% communication", path, self.iterations, 100 * share)

    def _give_up(self, _: Engine, error: BaseException | None = None) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        if self._done < self.first - 1 + self.iterations and distributed.is_main():
            logger.warning("the run ended before the iterations that were to be traced. Give a longer one.")
        if error is not None:
            raise error


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
