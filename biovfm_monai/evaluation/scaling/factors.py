"""What the benefit of scaling goes with: properties of tasks, and how slopes correlate with them, as BioVFM asks."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import PermutationMethod, false_discovery_control, pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import davies_bouldin_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biovfm_monai.errors import InputError, require_within
from biovfm_monai.evaluation.scaling.fit import fit_law
from biovfm_monai.evaluation.scaling.laws import LogLinear
from biovfm_monai.evaluation.scaling.table import groups_of, read_table
from biovfm_monai.files import write_atomically

__all__ = ["compressibility", "correlate", "factor_table", "label_noise", "separation"]

_FEWEST_TASKS = 4


def compressibility(images: Iterable[np.ndarray]) -> float:
    """Median over images of size after gzip (level 9) by size before: small for images with little in them.

    Args:
        images: arrays of any shape and type; their bytes are compressed in C order.
    """
    raw = (np.ascontiguousarray(image).tobytes() for image in images)
    return float(np.median([len(gzip.compress(content, 9, mtime=0)) / len(content) for content in raw]))


def separation(features: np.ndarray, labels: Sequence[Any]) -> float:
    """Davies-Bouldin index of classes in the space of the given features, each standardised: small where apart.

    Args:
        features: images x features, such as the embeddings of an encoder; say which with the number.
        labels: a class for each image.
    """
    return float(davies_bouldin_score(StandardScaler().fit_transform(features), labels))


def label_noise(features: np.ndarray, labels: Sequence[Any], folds: int = 5, seed: int = 0) -> float:
    """Share of labels that confident learning takes for wrong (https://arxiv.org/abs/1911.00068).

    It counts an image when a logistic regression that was not fitted to it gives another class a probability no smaller
    than images of that class get for their own, on average, and no other class a larger one among such.

    Args:
        features: images x features.
        labels: a class for each image.
        folds: of the cross-validation, no more than images of the rarest class.
        seed: of the split.

    Raises:
        InputError: when there is one class only, or one has fewer images than folds.
    """
    classes, label = np.unique(labels, return_inverse=True)
    if len(classes) < 2 or np.bincount(label).min() < folds:
        raise InputError(f"label noise needs two classes with {folds} images or more each. Leave out rare classes.")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    likely = cross_val_predict(model, features, label, cv=split, method="predict_proba")
    own = np.array([likely[label == c, c].mean() for c in range(len(classes))])
    confident = np.where(likely >= own, likely, -1.0)
    return float(((confident.max(1) >= 0) & (confident.argmax(1) != label)).mean())


def correlate(
    benefits: pd.DataFrame, properties: pd.DataFrame, permutations: int = 9999, seed: int = 0
) -> pd.DataFrame:
    """Pearson's correlation of each benefit with each property over tasks.

    Args:
        benefits: tasks x methods.
        properties: tasks x properties; of the tasks that both have the correlation is taken.
        permutations: of the test; all of them where there are no more.
        seed: of it.

    Returns:
        A row for each pair: "method", "factor", "tasks", "r", "p_value" (two-sided, by permutation of tasks) and
        "p_adjusted" for the number of pairs (Benjamini and Hochberg).

    Raises:
        InputError: when there are fewer than four tasks, or a column is constant or holds no finite number.
    """
    tasks = benefits.index.intersection(properties.index)
    if len(tasks) < _FEWEST_TASKS:
        raise InputError(
            f"{len(tasks)} task(s) have both a benefit and properties; a correlation needs {_FEWEST_TASKS}. Add tasks."
        )
    benefits, properties = benefits.loc[tasks], properties.loc[tasks]
    for name, column in (*benefits.items(), *properties.items()):
        if not np.isfinite(column.to_numpy(float)).all() or column.nunique() == 1:
            raise InputError(f"{name!r} must be finite, and not the same for all tasks. Leave it out.")
    rows = []
    for method, benefit in benefits.items():
        for factor, value in properties.items():
            # Each pair has the same permutations, whichever others are asked for.
            test = PermutationMethod(n_resamples=permutations, rng=np.random.default_rng(seed))
            found = pearsonr(value.to_numpy(float), benefit.to_numpy(float), method=test)
            rows.append((method, factor, len(tasks), float(found.statistic), float(found.pvalue)))
    table = pd.DataFrame(rows, columns=["method", "factor", "tasks", "r", "p_value"])
    return table.assign(p_adjusted=false_discovery_control(table.p_value))


def factor_table(
    path: str | Path,
    properties: str | Path,
    x: str,
    y: str,
    by: Sequence[str] = ("method",),
    task: str = "task",
    out: str | Path | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> tuple[pd.DataFrame, list[str]]:
    """Fit the log-linear law to each task of a table of runs, and correlate its slopes with properties of the tasks.

    Args:
        path: CSV or Parquet table with a row for each run.
        properties: CSV or Parquet table with a row for each task; all its other columns of numbers are properties.
        x, y, task: columns of sizes, scores and tasks; `properties` has the last one, too.
        by: columns that tell methods apart, such as method and protocol.
        out: CSV file for the result; None for no file.
        permutations, seed: as in `correlate`.

    Returns:
        What `correlate` does, and the tasks left out for want of properties.

    Raises:
        InputError: when a table cannot be used.
    """
    require_within(99, whole=True, permutations=permutations)
    slopes: dict[str, dict[str, float]] = {}
    runs = read_table(path, [x, y, *by, task])
    for _, rows in groups_of(runs, [*by, task], [x, y]):
        fitted, first = fit_law(LogLinear(), rows[x].to_numpy(), rows[y].to_numpy(), draws=1), rows.iloc[0]
        method = ", ".join(str(first[name]) for name in by)
        slopes.setdefault(method, {})[str(first[task])] = float(fitted.found[0])
    known = read_table(properties, [task]).astype({task: str}).set_index(task).select_dtypes("number")
    if known.empty:
        raise InputError(f"{properties}: has no column of numbers besides {task!r}. Add properties.")
    if not known.index.is_unique:
        raise InputError(f"{properties}: names a task more than once. Leave one row for each.")
    benefits = pd.DataFrame(slopes)
    result = correlate(benefits, known, permutations, seed)
    if out is not None:
        with write_atomically(out) as draft:
            result.to_csv(draft, index=False)
    return result, sorted(set(benefits.index) - set(known.index))
