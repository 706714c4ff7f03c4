"""The parts of a report: tables, figures and matrices of what runs hold, each there only where something is in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.report.collect import DAMAGE, Run, damage_of
from biovfm_monai.evaluation.report.figures import (
    Shown,
    curve_figures,
    embedding_figure,
    encode_picture,
    scaling_figure,
)
from biovfm_monai.evaluation.scaling.table import groups_of, read_table
from biovfm_monai.files import checksum_of

__all__ = ["Section", "Table", "sections_of"]

_PICTURES = {
    "neighbours.png": ("Nearest neighbours", "test images, each with the training images most like it"),
    "tokenizer.png": ("Decoded tokens", "crops of each kind of image, and what the tokenizer decodes of them"),
    "reconstruction.png": ("Reconstructions", "images, what the network saw of them, and what it made of that"),
    "overlay.png": ("Segmentation overlays", "images, their true labels and those predicted"),
}
_BUDGET = 5_000_000
_MOST_ROWS, _MOST_MAPS, _MOST_CLASSES = 2000, 20, 40
_CARD = (
    "name", "version", "task", "description", "intended_use", "data_source", "data_type", "image_classes",
    "pred_classes", "references",
)  # fmt: skip
_PACKAGES = ("biovfm-monai", "monai", "torch", "numpy", "scikit-learn", "matplotlib")


@dataclass
class Table:
    """A table of the page; the first cell of a row names it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass
class Section:
    """A part of the page, which is there only if something is in it."""

    key: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Shown] = field(default_factory=list)
    matrices: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.tables or self.figures or self.matrices)


def _rows_of(summary: pd.DataFrame, names: Sequence[str]) -> list[Sequence[Any]]:
    """Rows in which something is known beside the name of the run."""
    if summary.empty:
        return []
    return [row for row in summary[list(names)].to_numpy(object).tolist() if any(v is not None for v in row[1:])]


def sections_of(runs: Sequence[Run], tables: Mapping[Path, bool], summary: pd.DataFrame) -> list[Section]:
    """The parts of the page that have something to show, in order.

    Args:
        runs: as collected.
        tables: of runs, and fits, with whether somebody named them.
        summary: a row per run.

    Raises:
        InputError: when a table or fit that was named cannot be read.
    """
    of_tables, scaling, aside = _given(tables)
    what = ("run", "method", "network", "depth", "width", "parameters", "steps", "images", "loss")
    cost = ("run", "hours", "images per second", "peak memory, GiB", "FLOP/s per device", "MFU", "waiting for data")
    listed = Section("runs", "Runs", tables=of_tables)
    if runs:
        trained = _rows_of(summary, what)
        without = [[run.name] + [None] * (len(what) - 1) for run in runs if run.name not in {row[0] for row in trained}]
        listed.tables.insert(0, Table("Finished runs", what, [*trained, *without]))
    costs = _rows_of(summary, cost)
    note = "Hours are those in the log; a run that was gone on with counts what the log kept."
    found = [
        listed,
        Section("curves", "Training curves", figures=curve_figures(runs)),
        _scores(runs),
        scaling,
        _confusions(runs),
        _maps(runs),
        *_pictures(runs),
        Section("cost", "Cost", tables=[Table("Time, speed and memory", cost, costs, note)] if costs else []),
        _data_card(runs),
        _environment(runs),
        _files(runs, aside),
    ]
    return [section for section in found if section]


def _given(paths: Mapping[Path, bool]) -> tuple[list[Table], Section, list[Sequence[str]]]:
    """Tables of runs, the laws that were fitted to some, and what cannot be read though nobody named it."""
    shown, scaling = [], Section("scaling", "Scaling")
    aside: list[Sequence[str]] = []
    for path, named in paths.items():
        try:
            if path.suffix == ".json":
                _add_fit(path, scaling)
            else:
                shown.append(_table(path))
        except DAMAGE as error:
            if named:
                raise InputError(
                    f"{path}: no table of runs, nor a fit of `biovfm scale fit`: {damage_of(error, path)}. Make it "
                    "anew, or leave it out."
                ) from error
            aside.append([path.parent.name, f"{path.name}: {damage_of(error, path)}"])
    return shown, scaling, aside


def _table(path: Path) -> Table:
    table = read_table(path, [])
    note = f"The first {_MOST_ROWS} of {len(table)} rows." if len(table) > _MOST_ROWS else ""
    rows = table.head(_MOST_ROWS).astype(object).to_numpy().tolist()
    return Table(path.name, [str(column) for column in table], rows, note)


def _add_fit(path: Path, section: Section) -> None:
    fit = dict(json.loads(path.read_text(encoding="utf-8")))
    rows = [
        [label, of["law"], name, known["value"], *known["interval"], of["r2"], of["runs"], " ".join(of["warnings"])]
        for label, of in fit["fits"].items()
        for name, known in of["parameters"].items()
    ]
    head = ("runs", "law", "parameter", "value", "lower", "upper", "R²", "number", "warnings")
    shown = Table(f"{path.name}: {fit['y']} over {fit['x']}", head, rows, f"95 %: {fit['intervals']}")
    # Both may have been moved together since.
    given = Path(fit["table"])
    places = [place for place in (path.parent / given, path.parent / given.name) if place.is_file()]
    source = next((place for place in places if checksum_of(place) == fit["sha256"]), None)
    if source is None:
        what = "has changed since" if places else "is not beside it"
        section.text += f"No plot of {path.name}: its table {given.name} {what}. "
    else:
        table = read_table(source, [fit["x"], fit["y"], *fit["by"]])
        section.figures.append(scaling_figure(table, fit, dict(groups_of(table, fit["by"], [fit["x"], fit["y"]]))))
    section.tables.append(shown)


def _scores(runs: Sequence[Run]) -> Section:
    rows: dict[str, list[list[Any]]] = {}
    head = ("run", "score", "value", "95 % from", "to", "interval")
    for run in runs:
        for of in run.scores:
            rows.setdefault(of.task, []).append([run.name, of.name, of.value, of.low, of.high, of.interval])
    text = "Intervals over images take each image as one patient, and are too narrow where patients have several."
    return Section("scores", "Scores", text, [Table(task, head, of) for task, of in rows.items()])


def _confusions(runs: Sequence[Run]) -> Section:
    section = Section("confusion", "Confusion matrices", "Rows are true classes, columns predicted ones.")
    for run in runs:
        for of in run.confusions:
            if len(of.classes) > _MOST_CLASSES:
                section.text += f" Not shown: {run.name}, {of.task}, {len(of.classes)} classes."
                continue
            shares = of.counts / of.counts.sum(1, keepdims=True).clip(1)
            section.matrices.append({
                "title": f"{run.name}, {of.task}", "classes": of.classes,
                "rows": [
                    (name, list(zip(counts, share, strict=True)))
                    for name, counts, share in zip(of.classes, of.counts.tolist(), shares.tolist(), strict=True)
                ],
            })  # fmt: skip
    return section


def _maps(runs: Sequence[Run]) -> Section:
    having = [run for run in runs if run.embeddings is not None]
    section = Section(
        "map", "Embedding maps", figures=[f for run in having[:_MOST_MAPS] if (f := embedding_figure(run))]
    )
    if len(having) > _MOST_MAPS:
        section.text = f"Of the first {_MOST_MAPS} of {len(having)} runs that have embeddings."
    return section


def _pictures(runs: Sequence[Run]) -> list[Section]:
    count = sum(len(run.pictures) for run in runs)
    sections = []
    for file, (title, what) in _PICTURES.items():
        section = Section(file.partition(".")[0], title)
        for run in runs:
            if file not in run.pictures:
                continue
            uri = encode_picture(run.pictures[file], _BUDGET // max(count, 12))
            if uri is None:
                section.text += f"Too large to show: {run.name}. "
            else:
                section.figures.append(Shown(run.name, uri, f"Rows of {what}."))
        sections.append(section)
    return sections


def _data_card(runs: Sequence[Run]) -> Section:
    """What bundles say of their data; one card for runs that agree in it."""
    cards: dict[str, tuple[list[Sequence[Any]], list[str]]] = {}
    for run in runs:
        rows: list[Sequence[Any]] = [
            [name.replace("_", " "), _words(run.metadata[name])] for name in _CARD if name in run.metadata
        ]
        prepared = run.about.get("preprocessing", {})
        rows += [[f"preprocessing: {name}", _words(value)] for name, value in prepared.items() if value is not None]
        if rows:
            cards.setdefault(str(rows), (rows, []))[1].append(run.name)
    return Section(
        "data", "Data card", tables=[Table(", ".join(of), ("field", "value"), rows) for rows, of in cards.values()]
    )


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_words(of)}" for name, of in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _environment(runs: Sequence[Run]) -> Section:
    rows: list[Sequence[Any]] = []
    for run in runs:
        training = run.about.get("training", {})
        of = [
            training.get("biovfm_monai"),
            training.get("torch"),
            *(run.metadata.get(f"{n}_version") for n in ("monai", "numpy")),
        ]
        if any(of):
            rows.append([run.name, *of])
    here: list[Sequence[Any]] = [["Python", platform.python_version()], ["system", platform.system()]]
    for name in _PACKAGES:
        try:
            here.append([name, version(name)])
        except PackageNotFoundError:
            here.append([name, "not installed as a package"])
    head = ("run", "biovfm-monai", "torch", "MONAI of its bundle", "NumPy of its bundle")
    tables = [Table("What runs were made with", head, rows)] if rows else []
    return Section(
        "environment",
        "Environment",
        tables=[*tables, Table("What this page was made with", ("package", "version"), here)],
    )


def _files(runs: Sequence[Run], aside: Sequence[Sequence[str]]) -> Section:
    """What was looked for and not found, and what is damaged."""
    section = Section("files", "Files that were looked for", "A page says nothing about what its runs do not hold.")
    damaged = [*([run.name, problem] for run in runs for problem in run.problems()), *aside]
    if damaged:
        section.tables.append(Table("Set aside", ("run", "file and what is wrong with it"), damaged))
    if runs:
        rows: list[Sequence[Any]] = [
            [run.name, ", ".join(name for name, state in run.files.items() if state == "read") or None,
             ", ".join(name for name, state in run.files.items() if state == "not found") or None]
            for run in runs
        ]  # fmt: skip
        section.tables.append(Table("Read and not found", ("run", "read", "not found"), rows))
    return section
