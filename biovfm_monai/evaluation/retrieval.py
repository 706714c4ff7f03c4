"""Images of the same class among those most alike, as in https://arxiv.org/abs/2409.09430, on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.knn import standardised
from biovfm_monai.evaluation.metrics import TASKS, bootstrap_means

__all__ = ["Retrieved", "rank_scores", "require_classes", "retrieval_probe"]

_AT = (1, 5, 10)
_CELLS = 2**20


@dataclass(frozen=True)
class Retrieved:
    """What is found with the pooling that is best on the validation part.

    Args:
        settings: "pooling".
        validation_precision: mean average precision of the validation part, by which it was chosen.
        by_image: as `rank_scores` of the test part.
    """

    settings: dict[str, str | float]
    validation_precision: float
    by_image: Mapping[str, np.ndarray]

    def scored(
        self,
        labels: np.ndarray,  # noqa: ARG002
        task: str,  # noqa: ARG002
        subjects: Sequence[Any] | None = None,
        draws: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Means over images, and as in `Chosen.scored` "intervals", "settings" and what it was chosen by."""
        return {
            **{name: float(values.mean()) for name, values in self.by_image.items()},
            "intervals": bootstrap_means(self.by_image, subjects, draws, seed), "settings": self.settings,
            "validation_mean_average_precision": self.validation_precision,
        }  # fmt: skip


def require_classes(task: str) -> None:
    """Refuse findings: images that share some of theirs and not others are neither alike nor different.

    Raises:
        InputError: on a task with findings.
    """
    if task == TASKS[3]:
        raise InputError("retrieval needs one class per image, and this task has findings. Leave it out.")


def rank_scores(
    train: np.ndarray, train_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """How well each query's class comes first among all training images, the most similar one first.

    Features are compared as in `knn_accuracy`; a training image of the query's class is relevant. Average precision is
    the mean, over relevant images, of the share that are relevant down to there. Queries are ranked a block at a time,
    so that memory does not grow with the product of both counts.

    Args:
        train, queries: images x features.
        train_labels, labels: a class per image; each query's is in the training images.

    Returns:
        "mean_average_precision", and "precision_at_1", "_5" and "_10": a number for each query, of which a mean is the
        score.

    Raises:
        InputError: when there are fewer than 10 training images.
    """
    if len(train) < _AT[-1]:
        raise InputError(f"retrieval needs at least {_AT[-1]} training images, got {len(train)}. Add some.")
    prepare = standardised(train)
    gallery, places = prepare.transform(train), np.arange(1, len(train) + 1)
    blocks = min(-(-len(queries) * len(train) // _CELLS), len(queries))
    found = []
    for block, truth in zip(np.array_split(queries, blocks), np.array_split(labels, blocks), strict=True):
        order = np.argsort(-(prepare.transform(block) @ gallery.T), axis=1, kind="stable")
        relevant = train_labels[order] == truth[:, None]
        precision = relevant.cumsum(1) / places
        average = (precision * relevant).sum(1) / relevant.sum(1)
        found.append(np.column_stack([average, precision[:, [at - 1 for at in _AT]]]))
    names = ("mean_average_precision", *(f"precision_at_{at}" for at in _AT))
    return dict(zip(names, np.concatenate(found).T, strict=True))


def retrieval_probe(features: Mapping[str, Sequence[np.ndarray]], labels: Sequence[np.ndarray], task: str) -> Retrieved:
    """The best pooling by mean average precision of the validation part; the training part is what is searched.

    Args:
        features, labels, task: as in `linear_probe`.

    Raises:
        InputError: on findings, or fewer than 10 training images.
    """
    require_classes(task)
    found = {}
    for pooling, (train, validation, _) in features.items():
        by_image = rank_scores(train, labels[0], validation, labels[1])
        found[pooling] = float(by_image["mean_average_precision"].mean())
    best = max(found, key=lambda pooling: found[pooling])
    train, _, test = features[best]
    return Retrieved({"pooling": best}, found[best], rank_scores(train, labels[0], test, labels[2]))
