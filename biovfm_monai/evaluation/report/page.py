"""One page about finished runs that needs nothing but itself (https://www.w3.org/TR/WCAG22/ for who reads it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.report.collect import Run, collect_runs
from biovfm_monai.evaluation.report.find import find_runs
from biovfm_monai.evaluation.report.sections import sections_of
from biovfm_monai.evaluation.report.tracking import write_mlflow
from biovfm_monai.files import write_atomically

__all__ = ["write_report"]


def write_report(paths: Sequence[str | Path], out: str | Path, mlflow: str | Path | None = None) -> list[Run]:
    """Write a page about finished runs, and its numbers beside it as NAME_runs.csv, NAME_scores.csv, NAME_curves.csv.

    Nothing of the runs is run, and no file of theirs is changed. What is damaged is set aside by name on the page.

    Args:
        paths: as of `find_runs`.
        out: .html file to write.
        mlflow: SQLite file to which the same numbers go as MLflow runs (extra `mlflow`); None for no file.

    Returns:
        The runs.

    Raises:
        InputError: when there is nothing to report, or `out` is no .html file.
    """
    out = Path(out)
    if out.suffix != ".html":
        raise InputError(f"{out}: the report is a page. Give --out a name that ends in .html.")
    named, tables = find_runs(paths)
    runs = collect_runs(named)
    summary = _summary(runs)
    sections = sections_of(runs, tables, summary)
    loader = PackageLoader("biovfm_monai.evaluation.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["cell"] = _cell
    page = environment.get_template("report.html.j2").render(sections=sections, runs=len(runs))
    with write_atomically(out) as draft:
        draft.write_text(page, encoding="utf-8")
    curves = [run.curves.assign(run=run.name)[["run", "name", "step", "value"]] for run in runs]
    scores = [asdict(score) for run in runs for score in run.scores]
    columns = ["run", "task", "name", "value", "low", "high", "interval"]
    for name, table in {
        "runs": summary, "scores": pd.DataFrame(scores, columns=columns),
        "curves": pd.concat(curves) if curves else pd.DataFrame(columns=["run", "name", "step", "value"]),
    }.items():  # fmt: skip
        with write_atomically(out.with_name(f"{out.stem}_{name}.csv")) as draft:
            table.to_csv(draft, index=False)
    if mlflow is not None:
        write_mlflow(runs, mlflow)
    return runs


def _cell(value: Any) -> str:
    """A value as the page shows it."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _summary(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per run: what was trained, for how long, at what cost."""
    rows = []
    for run in runs:
        training, network = run.about.get("training", {}), run.about.get("network", {})
        seconds, rate = run.total("seconds"), run.last("flops_per_second_per_device")
        steps = None if run.curves.empty else int(run.curves["step"].max())
        rows.append({
            "run": run.name,
            "method": training.get("method"),
            "network": str(network.get("_target_", "")).rpartition(".")[2] or None,
            "depth": network.get("depth"),
            "width": network.get("embed_dim"),
            "parameters": run.parameters,
            "steps": training.get("steps", steps),
            "images": training.get("samples_seen", run.last("samples")),
            "loss": training.get("loss", run.last("loss")),
            "hours": None if seconds is None else seconds / 3600,
            "images per second": run.last("images_per_second"),
            "peak memory, GiB": run.last("peak_memory_gib"),
            "FLOP/s per device": rate,
            "MFU": run.last("mfu"),
            "waiting for data": run.last("data_wait"),
        })  # fmt: skip
    return pd.DataFrame(rows).astype(object).where(lambda table: table.notna(), None)
