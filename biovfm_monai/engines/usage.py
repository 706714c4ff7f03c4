"""How well a run uses its device: model FLOPs utilisation as in PaLM (https://arxiv.org/abs/2204.02311), and memory."""

from __future__ import annotations

import logging
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from biovfm_monai.engines.cost import Cost, cost_of, imagined, outlined
from biovfm_monai.methods import SSLMethod

__all__ = ["BatchCosts", "machine_memory", "peak_flops", "peak_memory"]

logger = logging.getLogger(__name__)

# Dense half-precision products of NVIDIA's data sheets, FLOP/s; the first name that is part of the device's counts.
_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "A40": 149.7e12, "L40S": 362e12, "L4 ": 121e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
_SIDE, _ROUNDS = {"cpu": 1024, "cuda": 8192}, 5


class BatchCosts:
    """Sums up what the batches cost that a method is given; one of each shape is counted, and only when it is asked.

    Args:
        method: that is trained.
    """

    def __init__(self, method: SSLMethod) -> None:
        self.method = method
        self._shapes: dict[tuple, dict[str, Any]] = {}
        self._costs: dict[tuple, Cost | None] = {}
        self._given: dict[tuple, int] = {}
        self._handle = method.register_forward_pre_hook(self._see)

    def close(self) -> None:
        """Look at no more batches."""
        self._handle.remove()

    def reset(self) -> None:
        """Begin a new sum."""
        self._given = {}

    def total(self, count: bool = True) -> Cost | None:
        """Costs of all batches since the last reset; None when one cannot be counted, or is not, and must not be now.

        Args:
            count: whether shapes that were not counted yet may be, which takes about a second each.
        """
        new = self._given.keys() - self._costs.keys()
        if new and not count:
            return None
        for shape in new:
            self._costs[shape] = self._counted(self._shapes.pop(shape))
        costs = [(self._costs[shape], times) for shape, times in self._given.items()]
        known = [[times * value for value in cost] for cost, times in costs if cost is not None]
        return Cost(*map(sum, zip(*known, strict=True))) if known and len(known) == len(costs) else None

    def _see(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        (batch,) = arguments
        degree = int(torch.as_tensor(batch.get("anisotropy", 0)).max())
        shape = (degree, *(x.shape for x in batch.values() if isinstance(x, torch.Tensor)))
        if shape not in self._costs and shape not in self._shapes:
            self._shapes[shape] = outlined(batch)
        self._given[shape] = self._given.get(shape, 0) + 1

    def _counted(self, batch: Mapping[str, Any]) -> Cost | None:
        try:
            return cost_of(imagined(self.method), batch, 1)
        except Exception as error:  # noqa: BLE001 - a number of the log must not end a run
            logger.warning("operations cannot be counted: %s", " ".join(str(error).split()))
            return None


@cache
def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOP/s that a device can do: of half precision by its data sheet, else of a product of two matrices, timed.

    Args:
        device: whose products are meant.
        dtype: of the products; None for float32.
    """
    if device.type == "cuda" and dtype is not None:
        name = torch.cuda.get_device_name(device) + " "
        for part, peak in _PEAKS.items():
            if part in name:
                return peak
    side = _SIDE.get(device.type, _SIDE["cuda"])
    a, b = (torch.ones(side, side, device=device, dtype=dtype or torch.float32) for _ in range(2))
    return 2 * side**3 / statistics.median(_seconds(a, b) for _ in range(_ROUNDS))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    begun = time.perf_counter()
    # Reading a number waits for the device.
    (a @ b)[0, 0].item()
    return time.perf_counter() - begun


def peak_memory(device: torch.device) -> float:
    """GiB that were in use at most: of a GPU what its tensors took, else what this process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine_memory() -> float:
    """GiB that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
