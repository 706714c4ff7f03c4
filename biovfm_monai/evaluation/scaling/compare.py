"""Methods at equal cost, and the runs worth their cost, as in https://arxiv.org/abs/2203.15556."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.scaling.fit import FittedLaw, fit_law, fit_runs, limits
from biovfm_monai.evaluation.scaling.laws import LogLinear
from biovfm_monai.evaluation.scaling.table import groups_of, read_table
from biovfm_monai.files import write_json

__all__ = ["compare_at", "compare_table", "comparison", "frontier", "optimal_size"]

_ALIKE = ("task", "protocol", "modality", "fraction")


def frontier(cost: np.ndarray, score: np.ndarray, falling: bool = False) -> np.ndarray:
    """Indices of the runs that no cheaper or equally cheap run equals or beats, from cheap to dear.

    Args:
        cost: of each run.
        score: of each run.
        falling: whether lower scores are better, as of a loss.
    """
    merit = -score if falling else score
    order = np.lexsort((-merit, cost))
    best = np.maximum.accumulate(merit[order])
    return order[np.concatenate([[True], best[1:] > best[:-1]])]


def optimal_size(cost: np.ndarray, score: np.ndarray, size: np.ndarray, falling: bool = False) -> FittedLaw:
    """How the size of the best run grows with the cost: size = factor x cost^slope, on the frontier.

    Raises:
        InputError: when the frontier has fewer than three runs.
    """
    found = frontier(cost, score, falling)
    return fit_law(LogLinear(), cost[found], size[found])


def compare_at(
    runs: dict[str, tuple[np.ndarray, np.ndarray]],
    budgets: Sequence[float],
    law: str | None = None,
    perfect: float | None = None,
) -> list[dict[str, Any]]:
    """What methods reach at equal cost, by their fitted laws, and by how much they differ.

    Args:
        runs: method -> costs and scores of its runs.
        budgets: costs at which they are compared, each within those of all methods' runs.
        law, perfect: as in `fit_runs`.

    Returns:
        For each budget "budget"; "scores", method -> "value" and 95 % "interval"; and "differences" of pairs likewise,
        with "beyond_chance", whether 0 lies outside the interval.

    Raises:
        InputError: when a budget lies outside the runs of a method, or there is one method only.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} method(s) cannot be compared. Name with --by the column that tells them apart.")
    for method, (cost, _) in runs.items():
        for budget in budgets:
            if not cost.min() <= budget <= cost.max():
                raise InputError(
                    f"{budget:g} lies outside the costs of {method}, {cost.min():g} to {cost.max():g}, where its law "
                    "is a guess. Compare within them."
                )
    fits = {
        method: fit_runs(*points, law, perfect, seed=number)[0] for number, (method, points) in enumerate(runs.items())
    }
    at = {method: fitted.at(budgets) for method, fitted in fits.items()}
    rows = []
    for number, budget in enumerate(budgets):
        scores = {method: _told(value[number], draws[number]) for method, (value, draws) in at.items()}
        pairs = {}
        for one, other in itertools.combinations(at, 2):
            pair = _told(*(a[number] - b[number] for a, b in zip(at[one], at[other], strict=True)))
            pairs[f"{one} - {other}"] = pair | {"beyond_chance": not pair["interval"][0] <= 0 <= pair["interval"][1]}
        rows.append({"budget": float(budget), "scores": scores, "differences": pairs})
    return rows


def _told(value: float, draws: np.ndarray) -> dict[str, Any]:
    return {"value": float(value), "interval": limits(draws[None])[0]}


def compare_table(
    path: str | Path,
    x: str,
    y: str,
    by: str = "method",
    at: Sequence[float] = (),
    within: Sequence[str] | None = None,
    law: str | None = None,
    perfect: float | None = None,
    out: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The runs worth their cost in a table, and its methods at equal cost, for each group of runs that can be compared.

    Args:
        path: CSV or Parquet table with a row for each run.
        x, y, by: columns of costs, scores and methods.
        at: costs; none for one in the middle, by ratio, of what all methods' runs of a group have.
        within: columns in which runs that are compared agree; None for those of task, protocol, modality and fraction
            that the table has.
        law, perfect: as in `fit_runs`; a `perfect` of 0 says that lower scores are better.
        out: JSON file for the result; None for no file.

    Returns:
        For each group "frontier", a list of its rows, and "equal_cost", what `compare_at` tells.

    Raises:
        InputError: when the table cannot be used, or methods of a group have no cost in common.
    """
    table = read_table(path, [x, y, by, *(within or ())])
    if within is None:
        within = [name for name in _ALIKE if name in table and name != by]
    result: dict[str, dict[str, Any]] = {}
    for label, alike in groups_of(table, within, [x, y]):
        try:
            best, rows = _compared(alike, x, y, by, at, law, perfect)
        except InputError as error:
            raise InputError(f"{path}, {label}: {error}") from error
        result[label] = {"frontier": json.loads(best.to_json(orient="records")), "equal_cost": rows}
    if out is not None:
        write_json(out, result)
    return result


def _compared(
    table: pd.DataFrame, x: str, y: str, by: str, at: Sequence[float], law: str | None, perfect: float | None
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    runs = {label: (rows[x].to_numpy(), rows[y].to_numpy()) for label, rows in groups_of(table, [by], [x, y])}
    if not at:
        low, high = max(cost.min() for cost, _ in runs.values()), min(cost.max() for cost, _ in runs.values())
        if low > high:
            raise InputError(f"no cost {x!r} lies within the runs of all methods. Add runs of equal cost.")
        at = [float(np.sqrt(low * high))]
    best = table.iloc[frontier(table[x].to_numpy(), table[y].to_numpy(), falling=perfect == 0)]
    return best, compare_at(runs, at, law, perfect)


def comparison(result: Mapping[str, Mapping[str, Any]]) -> str:
    """What `compare_table` returns, in words."""
    lines = []
    for label, group in result.items():
        lines += [f"{label}: runs that no cheaper one beats", pd.DataFrame(group["frontier"]).to_string(index=False)]
        for row in group["equal_cost"]:
            lines.append(f"at {row['budget']:.4g}:")
            for name, of in (row["scores"] | row["differences"]).items():
                chance = "" if of.get("beyond_chance", True) else ", no more than chance"
                low, high = of["interval"]
                lines.append(f"    {name}: {of['value']:.4g} [{low:.4g}, {high:.4g}]{chance}")
    return "\n".join(lines)
