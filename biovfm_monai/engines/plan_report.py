"""Plans in words and tables: what `biovfm plan` prints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from biovfm_monai.engines.memory import Memory
from biovfm_monai.engines.plan import Plan, make_plan, measured_rate
from biovfm_monai.errors import InputError, require_within

__all__ = ["plan_cells", "report_plans", "table_of"]


def report_plans(
    files: Sequence[str],
    overrides: Mapping[str, Any],
    processes: int = 1,
    memory: float | None = None,
    rate: float | str | None = None,
    price: float | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> str:
    """A plan, or a table of the plans of a grid of runs.

    Args:
        files, overrides, processes, memory: as in `make_plan`.
        rate: as in `measured_rate`, for the time; None for no time.
        price: of a device for an hour; None for no cost.
        grid: key of the configuration -> the values that runs are to have, each with each.

    Raises:
        InputError: when one of them cannot be used.
    """
    speed = None if rate is None else measured_rate(rate)
    if price is not None:
        require_within(0, price=price)
        if speed is None:
            raise InputError("price needs a rate, which tells the time. Give --rate, in FLOP/s of a device.")
    if grid is None:
        return _listing(make_plan(files, overrides, processes, memory), speed, price)
    if not isinstance(grid, Mapping) or not all(isinstance(found, list | tuple) and found for found in grid.values()):
        raise InputError(
            f"grid {grid!r} must have a list of values for each key. Give such as {{'batch_size':[8,16]}}."
        )
    rows: list[dict[str, str]] = []
    for values in itertools.product(*grid.values()):
        plan = make_plan(files, {**overrides, **dict(zip(grid, values, strict=True))}, processes, memory)
        given = {key.removesuffix("_target_").strip("#:"): value for key, value in zip(grid, values, strict=True)}
        rows.append(
            {key: str(value).rpartition(".")[2] for key, value in given.items()} | plan_cells(plan, speed, price)
        )
    return table_of([[*rows[0]], *([*row.values()] for row in rows)])


def _listing(plan: Plan, speed: float | None, price: float | None) -> str:
    """All of one plan, a line for each matter."""
    cost, memory = plan.cost, plan.memory
    tokens = cost.tokens * plan.samples
    run = f"{plan.steps:,} steps, {plan.samples:,} images, {tokens:.4g} tokens, {plan.flops:.4g} FLOPs"
    lines = [
        ("parameters", f"{plan.encoder_parameters:,} of the encoder, {plan.parameters:,} in all"),
        ("an image", f"{cost.tokens:,.0f} tokens, {cost.forward:.4g} FLOPs forward, {cost.flops:.4g} with backward"),
        ("a step", f"{plan.batch_size} images, {plan.micro_batch} at once on each of {plan.processes} process(es)"),
        ("the run", run),
        ("memory", f"{_gib(memory.peak)} at most ({plan.precision}, {plan.device}); {_parts(memory)}"),
    ]
    if plan.sharded is not None:
        lines.append(("sharded", f"{_gib(plan.sharded.peak)} at most of each process; {_parts(plan.sharded)}"))
    if plan.largest_micro_batch is not None:
        lines.append(("fits", f"micro-batches of up to {plan.largest_micro_batch} images"))
    if speed is not None:
        hours = plan.hours(speed)
        cost_text = "" if price is None else f", {hours * plan.processes * price:,.2f} at {price:g} an hour and device"
        lines.append(("time", f"{hours:,.2f} hours at {speed:.3g} FLOP/s a device{cost_text}"))
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def plan_cells(plan: Plan, speed: float | None, price: float | None) -> dict[str, str]:
    """One plan as a table's row: the column's name -> the number."""
    cells = {
        "parameters": f"{plan.parameters:,}", "FLOPs/image": f"{plan.cost.flops:.4g}",
        "tokens/image": f"{plan.cost.tokens:,.0f}", "images": f"{plan.samples:,}", "FLOPs": f"{plan.flops:.4g}",
        "memory": _gib(plan.memory.peak),
    }  # fmt: skip
    if plan.sharded is not None:
        cells["sharded"] = _gib(plan.sharded.peak)
    if plan.largest_micro_batch is not None:
        cells["fits"] = str(plan.largest_micro_batch)
    if speed is not None:
        cells["hours"] = f"{plan.hours(speed):,.2f}"
        if price is not None:
            cells["cost"] = f"{plan.hours(speed) * plan.processes * price:,.2f}"
    return cells


def table_of(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table, its cells put to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _parts(memory: Memory) -> str:
    return ", ".join(f"{name} {_gib(getattr(memory, name))}" for name in Memory._fields if name != "peak")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
