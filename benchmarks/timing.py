"""Timing shared by the benchmarks: calls take turns, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

PRODUCT = 2048


def product(dtype: torch.dtype, device: str) -> Callable[[], None]:
    """A function that multiplies two square matrices."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype) for _ in range(2))
    return lambda: (a @ b, None)[1]


def timed(call: Callable[[], None], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(calls: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call, all of them taking turns."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timed(calls[name], device))
    return {name: statistics.median(values) for name, values in seconds.items()}
