"""Tables of runs: read, checked, fitted group by group (`biovfm scale fit`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.scaling.fit import LEVEL, fit_runs
from biovfm_monai.files import checksum_of, write_json

__all__ = ["fit_table", "groups_of", "listing", "read_table"]

# What makes scores incomparable.
_KEPT_APART = ("task", "protocol")
_DESIGN = ("method", "preset", "modality", "fraction")


def read_table(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV or Parquet table that has some columns.

    Raises:
        InputError: when it cannot be read, has no row, or lacks one of them.
    """
    path = Path(path)
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise InputError(f"{path}: a table must be .csv or .parquet. Save it as one.")
    try:
        table = readers[path.suffix](path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a table ({error}). Give another file.") from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise InputError(f"{path}: has no column {', '.join(missing)}; its columns: {', '.join(map(str, table))}.")
    if table.empty:
        raise InputError(f"{path}: has no row. Add runs.")
    return table


def groups_of(table: pd.DataFrame, by: Sequence[str], numbers: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Rows that agree in some columns, by their values, in order, without those of protocols that have no such number.

    Raises:
        InputError: when a column that has to hold finite numbers does not, runs of a group differ in "task" or
            "protocol", or two groups have the same label.
    """
    table = _having(table, numbers)
    for name in numbers:
        values = pd.to_numeric(table[name], errors="coerce")
        wrong = np.flatnonzero(~np.isfinite(values.to_numpy(float)))
        if len(wrong):
            raise InputError(
                f"column {name!r} holds no finite number in {len(wrong)} row(s), first {table[name].iloc[wrong[0]]!r} "
                f"in row {table.index[wrong[0]] + 1}. Correct or leave out those rows."
            )
        table = table.assign(**{name: values.astype(float)})
    groups = table.groupby(list(by), dropna=False) if by else [((), table)]
    labels = set()
    for values, rows in groups:
        label = ", ".join(str(value) for value in values) or "all"
        for name in _KEPT_APART:
            found = sorted(str(value) for value in rows[name].unique()) if name in rows else []
            if len(found) > 1:
                raise InputError(
                    f"runs of {label} differ in {name}: {', '.join(found)}. Add {name} to the columns that keep runs "
                    "apart (--by), or leave rows out."
                )
        if label in labels:
            raise InputError(f"two groups of runs are both called {label!r}. Rename values of {', '.join(by)}.")
        labels.add(label)
        yield label, rows


def _having(table: pd.DataFrame, numbers: Sequence[str]) -> pd.DataFrame:
    """Rows of protocols that have these numbers in some row: of retrieval there is no AUC."""
    if "protocol" not in table:
        return table
    known = table.groupby("protocol", dropna=False)[[*numbers]].transform("count").gt(0).all(axis=1)
    return table[known] if known.any() else table


def fit_table(
    path: str | Path,
    x: str,
    y: str,
    by: Sequence[str] = (),
    law: str | None = None,
    out: str | Path | None = None,
    perfect: float | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a law to a table with one row per run, for each group of rows.

    Args:
        path: CSV or Parquet file.
        x, y: columns of sizes or costs, and of scores.
        by: columns; rows that agree in them are fitted together.
        law, perfect, draws, seed: as in `fit_runs`.
        out: JSON file for the result; None for no file.

    Returns:
        "fits", group -> what `fit_runs` tells, with "trend_p_adjusted" for the number of groups (Benjamini and
        Hochberg) and "trend", whether that is below 0.05; and how it was done, "table" being as seen from `out`.

    Raises:
        InputError: when the table cannot be used.
    """
    fits: dict[str, Any] = {}
    for label, rows in groups_of(read_table(path, [x, y, *by]), by, [x, y]):
        try:
            fits[label] = fit_runs(rows[x].to_numpy(), rows[y].to_numpy(), law, perfect, draws, seed)[1]
        except InputError as error:
            raise InputError(f"{path}, {label}: {error}") from error
        pooled = [name for name in _DESIGN if name in rows and rows.groupby(x)[name].nunique(dropna=False).max() > 1]
        if pooled:
            fits[label]["warnings"].append(
                f"runs of one {x} that differ in {', '.join(pooled)} are fitted together: add it to --by, unless that "
                "is meant."
            )
    adjusted = false_discovery_control([fit["trend_p_value"] for fit in fits.values()])
    for fit, p in zip(fits.values(), adjusted, strict=True):
        fit |= {"trend_p_adjusted": float(p), "trend": bool(p < 1 - LEVEL)}
        if not fit["trend"]:
            corrected = f", corrected for {len(fits)} fits" if len(fits) > 1 else ""
            fit["warnings"].insert(
                0, f"no trend: a slope as steep comes by chance with probability {p:.2g}{corrected}."
            )
    result = {
        "table": str(path) if out is None else os.path.relpath(path, Path(out).parent),
        "sha256": checksum_of(Path(path)), "x": x, "y": y, "by": list(by), "level": LEVEL,
        "intervals": f"parametric bootstrap over runs, {draws} draws, seed {seed}", "fits": fits,
    }  # fmt: skip
    if out is not None:
        write_json(out, result)
    return result


def listing(result: dict[str, Any]) -> str:
    """The result of `fit_table` in words."""
    lines = []
    for label, fit in result["fits"].items():
        found = ", ".join(
            f"{name} {of['value']:.4g} [{of['interval'][0]:.4g}, {of['interval'][1]:.4g}]"
            for name, of in fit["parameters"].items()
        )
        lines.append(f"{label}: {fit['law']}, {found}; R2 {fit['r2']:.2f}, {fit['runs']} runs")
        lines += [f"    {warning}" for warning in fit["warnings"]]
    return "\n".join(lines)
