"""Which images make up each batch: a pure function of how many images came before, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from biovfm_monai import distributed
from biovfm_monai.errors import InputError

__all__ = ["GlobalBatchSampler"]


class GlobalBatchSampler(Sampler[list[int]]):
    """Numbers 0, 1, 2, ... in batches, each process and accumulation step taking its share of the global batch.

    A dataset that draws from the number alone (`RandomCropDataset`) then gives the same images in the same order on
    one process or many. Each iteration starts at number `samples_seen`, which the trainer sets, and ends with the
    epoch; it is all the state that a run needs to continue where it was.

    Args:
        batch_size: images per optimizer step, over all processes and accumulation steps.
        steps_per_epoch: optimizer steps after which one iteration over the sampler ends.
        accumulation_steps: micro-batches per optimizer step.

    Raises:
        InputError: when the batch cannot be shared out evenly, or a number means nothing.
    """

    def __init__(self, batch_size: int, steps_per_epoch: int, accumulation_steps: int = 1) -> None:
        for name, value in (("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch)):
            if not isinstance(value, int):
                raise InputError(f"{name} {value!r} must be a whole number. Correct --{name}.")
        if steps_per_epoch < 1:
            raise InputError(f"steps_per_epoch {steps_per_epoch} must be above 0. Correct --steps_per_epoch.")
        shares = distributed.world_size() * accumulation_steps
        if batch_size < 1 or batch_size % shares:
            raise InputError(
                f"batch_size {batch_size} cannot be shared out over {distributed.world_size()} process(es) times "
                f"{accumulation_steps} accumulation step(s). Give a batch_size that is a multiple of {shares}."
            )
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.accumulation_steps = accumulation_steps
        self.samples_seen = 0

    def __len__(self) -> int:
        """Micro-batches of one epoch on this process."""
        return self.steps_per_epoch * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's numbers, one micro-batch at a time."""
        world, rank, begin = distributed.world_size(), distributed.rank(), self.samples_seen
        micro = self.batch_size // (world * self.accumulation_steps)
        for step in range(self.steps_per_epoch - begin // self.batch_size % self.steps_per_epoch):
            first = begin + step * self.batch_size
            for part in range(self.accumulation_steps):
                start = first + (part * world + rank) * micro
                yield list(range(start, start + micro))
