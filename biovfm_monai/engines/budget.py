"""How long a run is by what it may use, so that runs of different size can be compared at equal cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from biovfm_monai import distributed
from biovfm_monai.data import GlobalBatchSampler, MultiCrop, RandomResizedCrop
from biovfm_monai.engines.cost import Cost, blank_batch, cost_of, imagined
from biovfm_monai.errors import InputError
from biovfm_monai.methods import SSLMethod

__all__ = ["epochs_for", "epochs_within"]

logger = logging.getLogger(__name__)

_NEAR = 0.05
_UNITS = ("epochs", "samples", "tokens", "flops")


def epochs_for(
    budget: str | None,
    max_epochs: int,
    sampler: GlobalBatchSampler,
    method: SSLMethod,
    views: RandomResizedCrop | MultiCrop,
    crop_size: Sequence[int],
) -> int:
    """Epochs of a run: those that come nearest to its budget, but one at least; max_epochs where there is none.

    Args:
        budget: a number and its unit, such as "2e15 flops", "5e8 tokens", "100000 samples" or "15 epochs", as
            `Cost` counts them; None for no budget.
        max_epochs: what counts then.
        sampler: says how many samples an epoch has, and how many a micro-batch.
        method, views, crop_size: as `blank_batch` takes them.

    Raises:
        InputError: on a budget that is none.
    """
    if budget is None:
        return max_epochs
    count = sampler.batch_size // (sampler.accumulation_steps * distributed.world_size())

    def cost() -> Cost:
        network = imagined(method)
        return cost_of(network, blank_batch(network, views, crop_size, count), count)

    samples = sampler.batch_size * sampler.steps_per_epoch
    epochs = epochs_within(budget, samples, cost)
    if distributed.is_main():
        logger.info("a budget of %s is %d epoch(s), %d samples", budget, epochs, epochs * samples)
    return epochs


def epochs_within(budget: str, samples_per_epoch: int, cost: Callable[[], Cost]) -> int:
    """As `epochs_for`, with the cost of a sample, which is asked for when it matters; warns where it is far off.

    Raises:
        InputError: on a budget that is none.
    """
    amount, unit = _parsed(budget)
    if unit in ("tokens", "flops"):
        amount /= getattr(cost(), unit)
    exact = amount if unit == "epochs" else amount / samples_per_epoch
    epochs = max(round(exact), 1)
    if abs(epochs / exact - 1) > _NEAR and distributed.is_main():
        logger.warning(
            "a budget of %s is %.3g epochs of %d samples, and the run has %d, %.3g times as much. Shorter epochs come "
            "nearer to it: give --steps_per_epoch.", budget, exact, samples_per_epoch, epochs, epochs / exact,
        )  # fmt: skip
    return epochs


def _parsed(budget: str) -> tuple[float, str]:
    number, _, unit = str(budget).partition(" ")
    try:
        amount = float(number)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf") or unit not in _UNITS:
        raise InputError(
            f"budget {budget!r} must be a number above 0 and one of {', '.join(_UNITS)}. "
            'Give such as --budget "2e15 flops".'
        )
    return amount, unit
