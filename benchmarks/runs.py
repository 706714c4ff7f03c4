"""Runs of a benchmark that can be stopped: each is a row of a table, and what stands there is not run again."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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
