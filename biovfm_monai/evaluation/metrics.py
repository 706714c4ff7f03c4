"""Scores of predictions; AUC and accuracy as MedMNIST has them (https://doi.org/10.1038/s41597-022-01721-8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    log_loss,
    matthews_corrcoef,
    roc_auc_score,
)  # fmt: skip

from biovfm_monai.errors import InputError, require_within

__all__ = [
    "TASKS", "auc", "bootstrap", "bootstrap_means", "calibration_error", "check_labels", "classify", "ranked_auc",
    "scores_of",
]  # fmt: skip

TASKS = ("multi-class", "binary-class", "ordinal-regression", "multi-label, binary-class")
_BINS = 15


def check_labels(labels: np.ndarray, num_classes: int, task: str, part: str) -> np.ndarray:
    """Labels of a part of a benchmark, once it is known that they can be scored.

    Args:
        labels: a class from 0 per image, or of multi-label tasks images x findings of 0 and 1.
        num_classes: classes, or findings.
        task: one of `TASKS`.
        part: its name, for errors.

    Returns:
        int64, images, or images x findings.

    Raises:
        InputError: on an unknown task, no label, one that is none of the task's, one class only, or a class or finding
            that the part lacks.
    """
    if task not in TASKS:
        raise InputError(f"task {task!r} must be one of {', '.join(map(repr, TASKS))}. Correct it.")
    several = task == TASKS[3]
    found = np.asarray(labels)
    found = found[:, None] if found.ndim == 1 else found
    if not len(found) or found.ndim != 2 or found.shape[1] != (num_classes if several else 1):
        raise InputError(f"the {part} part has labels of shape {np.shape(labels)} for a {task} task. Correct them.")
    top = 1 if several else num_classes - 1
    if not np.isin(found, range(top + 1)).all():
        raise InputError(f"the {part} part has labels that are no whole numbers from 0 to {top}. Correct them.")
    found = found.astype(np.int64)
    if task == TASKS[1] and num_classes != 2:
        raise InputError(f"a {task} task has 2 classes, and this one {num_classes}. Name another task.")
    if several:
        missing = [str(c) for c in range(num_classes) if len(np.unique(found[:, c])) < 2]
        if missing:
            raise InputError(f"finding {', '.join(missing)} is the same in all of the {part} part. Leave it out.")
        return found
    missing = [str(c) for c in range(num_classes) if c not in found]
    if num_classes < 2 or len(missing) > num_classes - 2:
        raise InputError(f"the {part} part has one class only, and there is nothing to tell apart. Add others.")
    if missing:
        raise InputError(f"the {part} part has no image of class {', '.join(missing)}. Split the data anew.")
    return found[:, 0]


def auc(labels: np.ndarray, likely: np.ndarray, task: str) -> float:
    """Mean area under the ROC curve of each class against all others; of a binary task that of the second class.

    Args:
        labels: as from `check_labels`.
        likely: images x classes, probabilities or other scores.
        task: one of `TASKS`.
    """
    truth, score = _against_others(labels, likely, task)
    areas = [roc_auc_score(truth[:, c], score[:, c]) for c in range(truth.shape[1])]
    return float(sum(areas) / len(areas))


def ranked_auc(labels: np.ndarray, likely: np.ndarray, task: str) -> float:
    """As `auc`, to rounding, by ranks of all columns at once: for choosing among many probes."""
    truth, score = _against_others(labels, likely, task)
    positive = truth.sum(0)
    above = (rankdata(score, axis=0) * truth).sum(0) - positive * (positive + 1) / 2
    return float((above / (positive * (len(truth) - positive))).mean())


def _against_others(labels: np.ndarray, likely: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns of 0 and 1, and a score for each, of which the mean AUC is taken."""
    if task == TASKS[3]:
        return labels, likely
    if task == TASKS[1]:
        return labels[:, None], likely[:, -1:]
    return (labels[:, None] == np.arange(likely.shape[1])).astype(int), likely


def classify(likely: np.ndarray, task: str) -> np.ndarray:
    """The likeliest class, or of two classes and of findings what is above 0.5, as MedMNIST has it."""
    if task == TASKS[3]:
        return (likely > 0.5).astype(int)
    return (likely[:, -1] > 0.5).astype(int) if task == TASKS[1] else likely.argmax(1)


def calibration_error(labels: np.ndarray, likely: np.ndarray, task: str) -> float:
    """Expected calibration error over 15 bins of equal width (https://arxiv.org/abs/1706.04599).

    Of one class out of several it is that of the likeliest class's probability, of findings of each one's.
    """
    if task == TASKS[3]:
        sure, right = likely.ravel(), labels.ravel()
    else:
        sure, right = likely.max(1), likely.argmax(1) == labels
    which = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(which, sure, _BINS) - np.bincount(which, right, _BINS)
    return float(np.abs(gap).sum() / len(sure))


def scores_of(labels: np.ndarray, likely: np.ndarray, task: str) -> dict[str, float]:
    """All scores of predictions.

    Args:
        labels: as from `check_labels`.
        likely: images x classes, probabilities.
        task: one of `TASKS`.

    Returns:
        "auc", "accuracy", "balanced_accuracy", "mcc", "calibration_error" and "log_loss"; of findings the means over
        findings; of grades, too, "kappa", weighted by squared differences.

    Raises:
        InputError: when a probability is not finite.
    """
    if not np.isfinite(likely).all():
        raise InputError("predictions hold NaN or infinite numbers. Look for them in the features.")
    found = classify(likely, task)
    pairs = list(zip(labels.T, found.T, strict=True)) if task == TASKS[3] else [(labels, found)]
    means = {
        name: float(sum(score(truth, said) for truth, said in pairs) / len(pairs))
        for name, score in (
            ("accuracy", accuracy_score), ("balanced_accuracy", balanced_accuracy_score), ("mcc", matthews_corrcoef),
        )
    }  # fmt: skip
    truth, score = _against_others(labels, likely, task)
    loss = (
        np.mean([log_loss(truth[:, c], score[:, c], labels=[0, 1]) for c in range(truth.shape[1])])
        if task in (TASKS[1], TASKS[3])
        else log_loss(labels, likely, labels=range(likely.shape[1]))
    )
    ordered = {"kappa": float(cohen_kappa_score(labels, found, weights="quadratic"))} if task == TASKS[2] else {}
    about = {"calibration_error": calibration_error(labels, likely, task), "log_loss": float(loss)}
    return {"auc": auc(labels, likely, task)} | means | ordered | about


def bootstrap(
    labels: np.ndarray,
    likely: np.ndarray,
    task: str,
    subjects: Sequence[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % percentile intervals of AUC, accuracy and balanced accuracy, over patients.

    Args:
        labels, likely, task: as in `scores_of`.
        subjects: of each image; a patient's images are drawn together. None where each image is a patient.
        draws: of the bootstrap; one without a class gives no AUC and is left out of it.
        seed: of it.

    Returns:
        Name -> lower and upper end; NaN where there are fewer than two patients, or where more than half of the draws
        lack a class.
    """
    truth, score = _against_others(labels, likely, task)
    right = classify(likely, task) == labels
    found: dict[str, list[float]] = {"auc": [], "accuracy": [], "balanced_accuracy": []}
    sorted_by = [_Ranked(truth[:, c], score[:, c]) for c in range(truth.shape[1])]
    one_hot = _one_hot(labels, likely, task)
    for weight in _drawn(len(labels), subjects, draws, seed):
        found["auc"].append(float(np.mean([ranked.auc(weight) for ranked in sorted_by])))
        found["accuracy"].append(float(np.average(right, axis=0, weights=weight).mean()))
        found["balanced_accuracy"].append(_balanced(one_hot, right, weight))
    return {name: _percentiles(np.array(values), draws) for name, values in found.items()}


def bootstrap_means(
    values: Mapping[str, np.ndarray], subjects: Sequence[Any] | None = None, draws: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """95 % percentile intervals of means over images, over patients.

    Args:
        values: name -> a number of each image.
        subjects, draws, seed: as in `bootstrap`.

    Returns:
        Name -> lower and upper end; NaN where there are fewer than two patients.
    """
    table = np.stack([*values.values()])
    means = [table @ weight / weight.sum() for weight in _drawn(table.shape[1], subjects, draws, seed)]
    columns = np.transpose(means) if means else np.empty((len(values), 0))
    return {name: _percentiles(of, draws) for name, of in zip(values, columns, strict=True)}


def _drawn(images: int, subjects: Sequence[Any] | None, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is in a draw of patients, for each draw; none where draws of patients could not differ."""
    require_within(1, whole=True, draws=draws)
    _, patient = np.unique(np.arange(images) if subjects is None else np.asarray(subjects), return_inverse=True)
    count, random = int(patient.max()) + 1, np.random.default_rng(seed)
    for _ in range(draws if count > 1 else 0):
        yield np.bincount(random.integers(count, size=count), minlength=count)[patient].astype(float)


def _one_hot(labels: np.ndarray, likely: np.ndarray, task: str) -> np.ndarray:
    """Images x classes x findings, of which a mean over classes and findings is balanced."""
    if task == TASKS[3]:
        return np.stack([labels == 0, labels == 1], 1)
    return (labels[:, None] == np.arange(likely.shape[1]))[:, :, None]


def _balanced(one_hot: np.ndarray, right: np.ndarray, weight: np.ndarray) -> float:
    of_class = np.einsum("n,ncf->cf", weight, one_hot)
    hits = np.einsum("n,ncf,nf->cf", weight, one_hot, right.reshape(len(weight), -1))
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(hits / of_class, axis=0).mean())


def _percentiles(values: np.ndarray, draws: int) -> list[float]:
    known = values[np.isfinite(values)]
    if len(known) < draws / 2:
        return [float("nan")] * 2
    return [float(end) for end in np.percentile(known, [2.5, 97.5])]


class _Ranked:
    """One class's scores in order, so that each draw's AUC takes no sorting."""

    def __init__(self, truth: np.ndarray, score: np.ndarray) -> None:
        self.order = np.argsort(score, kind="stable")
        self.truth, ordered = truth[self.order].astype(float), score[self.order]
        self.starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))

    def auc(self, weight: np.ndarray) -> float:
        """The weighted AUC; NaN without a class."""
        weight = weight[self.order]
        positive = np.add.reduceat(weight * self.truth, self.starts)
        negative = np.add.reduceat(weight * (1 - self.truth), self.starts)
        pairs = positive.sum() * negative.sum()
        return float((positive * (negative.cumsum() - negative / 2)).sum() / pairs) if pairs else float("nan")
