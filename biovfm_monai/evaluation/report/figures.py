"""Figures as data URIs, in colours that colour-blind people tell apart (https://jfly.uni-koeln.de/color/)."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from biovfm_monai.evaluation.report.collect import Run

__all__ = ["Shown", "curve_figures", "embedding_figure", "encode_picture", "scaling_figure"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7F7F7F")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_POINTS = 200
_WIDTHS = (1000, 700, 480, 320, 200)


@dataclass(frozen=True)
class Shown:
    """A figure.

    Args:
        title: its caption.
        uri: what it shows, as a data URI.
        alt: the same in words.
        note: what to know of it.
    """

    title: str
    uri: str
    alt: str
    note: str = ""


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _svg(figure: Figure) -> str:
    # Without a date and with a fixed salt the same runs make the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "biovfm"}), io.BytesIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
        return _data_uri("svg+xml", buffer.getvalue())


def _style(number: int, line: bool = True) -> dict[str, Any]:
    marked = {"color": _COLOURS[number % 8], "marker": _MARKERS[number % 8], "markersize": 5}
    return marked | {"linestyle": _LINES[number % 4] if line else "none"}


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def curve_figures(runs: Sequence[Run]) -> list[Shown]:
    """Losses, and what was measured in validation, over optimizer steps; eight runs in one figure."""
    names = dict.fromkeys(name for run in runs for name in run.curves["name"].unique() if _is_shown(name))
    shown = []
    for name in names:
        having = [run for run in runs if (run.curves["name"] == name).any()]
        for part in (having[first : first + 8] for first in range(0, len(having), 8)):
            figure = Figure(figsize=(7, 4))
            axes = figure.add_subplot()
            words = []
            for number, run in enumerate(part):
                rows = run.curves[run.curves["name"] == name].sort_values("step")
                rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, _POINTS).round().astype(int))]
                often = max(len(rows) // 10, 1)
                axes.plot(
                    rows["step"], rows["value"], label=_plain(run.name), markevery=often, **_style(number)
                )  # fmt: skip
                words.append(f"{run.name} from {rows['value'].iloc[0]:.4g} to {rows['value'].iloc[-1]:.4g}")
            axes.set(xlabel="optimizer step", ylabel=_plain(name))
            _finish(figure)
            shown.append(Shown(f"{name}: {len(part)} run(s)", _svg(figure), f"Lines of {name}: {'; '.join(words)}."))
    return shown


def _is_shown(name: str) -> bool:
    return name.lower().endswith("loss") or name.startswith("val_")


def _finish(figure: Figure) -> None:
    axes = figure.axes[0]
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def embedding_figure(run: Run) -> Shown | None:
    """A map of a run's embeddings by UMAP (https://arxiv.org/abs/1802.03426) where it is installed, else by PCA."""
    if run.embeddings is None or min(run.embeddings.shape) < 3 or not np.isfinite(run.embeddings).all():
        return None
    scaled = StandardScaler().fit_transform(run.embeddings)
    if importlib.util.find_spec("umap") is not None and len(scaled) > 15:
        import umap  # noqa: PLC0415 - an extra, slow to import

        places, way = umap.UMAP(random_state=0).fit_transform(scaled), "UMAP"
        about = "Distances between groups mean little."
    else:
        pca = PCA(2, random_state=0).fit(scaled)
        places, way = pca.transform(scaled), "PCA"
        about = f"Two components hold {pca.explained_variance_ratio_.sum():.0%} of the variance."
    figure = Figure(figsize=(6, 5))
    axes = figure.add_subplot()
    labels = np.array(run.labels if run.labels is not None else ["image"] * len(places))
    classes = sorted(set(labels))
    for number, name in enumerate(classes):
        # Beyond eight classes a colour comes again, with another marker.
        marker = _MARKERS[(number + number // 8) % 8]
        here = places[labels == name]
        axes.plot(
            here[:, 0], here[:, 1], label=_plain(name), **_style(number, line=False) | {"marker": marker}, alpha=0.7
        )
    axes.set(xlabel=f"{way} 1", ylabel=f"{way} 2", xticks=[], yticks=[])
    _finish(figure)
    what = f"{len(places)} images of {len(classes)} class(es)" if run.labels is not None else f"{len(places)} images"
    return Shown(f"{run.name}: {what}, by {way}", _svg(figure), f"Scatter plot of {what}: nearer is more alike.", about)


def scaling_figure(table: pd.DataFrame, fit: dict[str, Any], rows: dict[str, pd.DataFrame]) -> Shown:
    """Runs and fitted laws, with a band of 95 % at each size.

    Args:
        table: with a row per run.
        fit: what `biovfm scale fit` wrote.
        rows: group -> rows of the table.
    """
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    words = []
    for number, (label, of) in enumerate(fit["fits"].items()):
        x, y = (rows[label][fit[name]].to_numpy(float) for name in ("x", "y"))
        style, curve = _style(number), of["curve"]
        axes.plot(x, y, **style | {"linestyle": "none"}, label=_plain(label))
        axes.plot(curve["x"], curve["y"], **style | {"marker": ""})
        axes.fill_between(curve["x"], curve["low"], curve["high"], color=style["color"], alpha=0.15, linewidth=0)
        ends = ", ".join(f"{curve[name][-1]:.4g}" for name in ("low", "high"))
        law = f"{curve['y'][-1]:.4g} ({ends}) by the law at the largest size"
        words.append(f"{label}: {len(x)} runs, {fit['y']} from {y.min():.4g} to {y.max():.4g}, {law}")
    axes.set(xscale="log", xlabel=_plain(fit["x"]), ylabel=_plain(fit["y"]))
    _finish(figure)
    title = f"{fit['y']} over {fit['x']}, {len(table)} runs"
    note = "Bands: 95 % of the law at each size, by the bootstrap of the intervals."
    return Shown(title, _svg(figure), f"Points, fitted lines and bands: {'; '.join(words)}.", note)


def encode_picture(image: Image.Image, budget: int) -> str | None:
    """A picture as a JPEG of at most `budget` bytes, as wide as that allows; None where none is small enough."""
    for width in _WIDTHS:
        small = image.copy()
        small.thumbnail((width, 4 * width))
        with io.BytesIO() as buffer:
            small.save(buffer, "JPEG", quality=85, optimize=True)
            if len(buffer.getvalue()) <= budget:
                return _data_uri("jpeg", buffer.getvalue())
    return None
