"""Benchmarks of many runs: each is a row of a table, and what stands there is not run again."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd


def run_all(
    row_of: Callable[..., dict[str, Any]], runs: list[dict[str, Any]], key: Sequence[str], path: Path, workers: int
) -> pd.DataFrame:
    """Run what the table has no row of, and add it.

    Args:
        row_of: called with a run's entries as arguments; gives a row, with all columns.
        runs: what to run.
        key: entries of a run that are columns, too, and tell runs apart.
        path: of the table, .csv.
        workers: processes.

    Returns:
        The rows of the runs.
    """
    done = set(pd.read_csv(path)[list(key)].itertuples(index=False, name=None)) if path.exists() else set()
    left = [run for run in runs if tuple(run[part] for part in key) not in done]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(row_of, **run) for run in left]):
            row = finished.result()
            begun = path.exists()
            fields = pd.read_csv(path, nrows=0).columns if begun else list(row)
            with path.open("a", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fields)
                if not begun:
                    writer.writeheader()
                writer.writerow(row)
            print(json.dumps(row), flush=True)
    rows, wanted = pd.read_csv(path), {tuple(run[part] for part in key) for run in runs}
    return rows[[row in wanted for row in rows[list(key)].itertuples(index=False, name=None)]]


def comparison_arguments(description: str | None) -> argparse.ArgumentParser:
    """What comparisons of fine-tuned networks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pretraining", type=float, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    return parser


class Shown(NamedTuple):
    """How a table shows a score: its title, what it is multiplied by, and the digits after the point."""

    title: str
    scale: int
    digits: int


def write_comparison(
    tables: Mapping[str, pd.DataFrame], networks: Sequence[str], scores: Mapping[str, Shown], path: Path
) -> None:
    """Mean and standard deviation over seeds of each network's scores; a table per title, as Markdown."""
    lines = []
    for title, rows in tables.items():
        titles = [title, "parameters", "steps", *(shown.title for shown in scores.values())]
        lines += ["", f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
        for name in networks:
            of = rows[rows.network == name]
            if of.empty:
                continue
            cells = [name, f"{of.parameters.iloc[0]:,}", f"{of.steps.mean():.0f}"]
            for score, (_, scale, digits) in scores.items():
                mean, spread = scale * of[score].mean(), scale * of[score].std()
                cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    print("\n".join(lines))
