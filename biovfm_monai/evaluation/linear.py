"""Linear probes: all learning rates and poolings at once, as in DINOv2 (https://arxiv.org/abs/2304.07193); few-shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai.errors import InputError, require_within
from biovfm_monai.evaluation.metrics import TASKS, auc, bootstrap, ranked_auc, scores_of

__all__ = [
    "RATES", "STRENGTHS", "Chosen", "few_shot", "linear_probe", "logistic_probe", "loss_of_rates", "probabilities",
    "train_linear",
]  # fmt: skip

RATES = tuple(float(rate) for rate in np.geomspace(1e-4, 1, 13))
STRENGTHS = tuple(float(strength) for strength in np.geomspace(1e-4, 10, 6))


@dataclass(frozen=True)
class Chosen:
    """The probe that is best on the validation part, and what it says of the test part.

    Args:
        settings: its settings, such as "pooling" and "rate".
        validation_auc: by which it was chosen.
        likely: probabilities of the test part, images x classes.
    """

    settings: dict[str, str | float]
    validation_auc: float
    likely: np.ndarray

    def scored(
        self,
        labels: np.ndarray,
        task: str,
        subjects: Sequence[Any] | None = None,
        draws: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """As `scores_of` the test part's labels, "intervals" as from `bootstrap`, "settings" and "validation_auc"."""
        return {
            **scores_of(labels, self.likely, task),
            "intervals": bootstrap(labels, self.likely, task, subjects, draws, seed),
            "settings": self.settings, "validation_auc": self.validation_auc,
        }  # fmt: skip


def train_linear(
    features: Sequence[Tensor],
    labels: Tensor,
    outputs: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Train a linear classifier for each set of features and each learning rate, all at once.

    They are trained by SGD (momentum 0.9, rates falling to 0 by a cosine) from zero weights on the same batches; one
    product of matrices makes the logits of all rates. Each is what it would be alone.

    Args:
        features: sets of images x features.
        labels: int64, images; or float, images x outputs, of findings.
        outputs: classes, or findings.
        rates: learning rates.
        epochs: passes over the images.
        batch_size: images a step.
        seed: of the order of images.

    Returns:
        For each set the weights, rates x features x outputs, and biases, rates x 1 x outputs.
    """
    count, device = len(labels), labels.device
    rate = torch.tensor(list(rates), device=device)[:, None, None]
    weights = [torch.zeros(len(rates), x.shape[1], outputs, device=device, requires_grad=True) for x in features]
    biases = [torch.zeros(len(rates), 1, outputs, device=device, requires_grad=True) for _ in features]
    optimizer = torch.optim.SGD([*weights, *biases], lr=1.0, momentum=0.9)
    steps = epochs * -(-count // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=order).to(device).split(batch_size):
            losses = [
                loss_of_rates(_logits(x[rows], w, b), labels[rows])
                for x, w, b in zip(features, weights, biases, strict=True)
            ]
            gradients = torch.autograd.grad(losses, [*weights, *biases])
            # Momentum is linear in the gradients, so scaling them by a rate is training with that rate.
            for parameter, gradient in zip([*weights, *biases], gradients, strict=True):
                parameter.grad = gradient * rate
            optimizer.step()
            schedule.step()
    return [(w.detach(), b.detach()) for w, b in zip(weights, biases, strict=True)]


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rates x images x outputs, by one product for all rates."""
    rates, width, outputs = weight.shape
    product = x @ weight.transpose(0, 1).reshape(width, rates * outputs)
    return product.view(len(x), rates, outputs).transpose(0, 1) + bias


def loss_of_rates(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over images (and findings), sum over rates: logits are rates x images x outputs, labels of the images."""
    rates = len(logits)
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits)) * rates
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(rates)) * rates


def linear_probe(
    features: Mapping[str, Sequence[np.ndarray]],
    labels: Sequence[np.ndarray],
    num_classes: int,
    task: str,
    rates: Sequence[float] = RATES,
    epochs: int = 20,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Chosen:
    """The best pooling and learning rate by AUC on the validation part; features standardised by the training part.

    Args:
        features: pooling -> training, validation and test part, images x features.
        labels: of these parts, as from `check_labels`.
        num_classes, task: as in `check_labels`.
        rates, epochs, batch_size, seed: as in `train_linear`.
        device: where it is trained.
    """
    require_within(1, whole=True, epochs=epochs, batch_size=batch_size)
    scaled: dict[str, list[Tensor]] = {}
    for pooling, parts in features.items():
        scaler = StandardScaler().fit(parts[0])
        scaled[pooling] = [torch.from_numpy(scaler.transform(part)).float().to(device) for part in parts]
    several = task == TASKS[3]
    truth = torch.from_numpy(labels[0]).to(device)
    trained = train_linear(
        [of[0] for of in scaled.values()], truth.float() if several else truth, num_classes, rates, epochs,
        batch_size, seed,
    )  # fmt: skip
    best: Chosen | None = None
    for (pooling, of), (weight, bias) in zip(scaled.items(), trained, strict=True):
        validation, test = (probabilities(_logits(part, weight, bias), task) for part in of[1:])
        for number, rate in enumerate(rates):
            score = ranked_auc(labels[1], validation[number], task)
            if best is None or score > best.validation_auc:
                best = Chosen({"pooling": pooling, "rate": rate}, score, test[number])
    assert best is not None  # noqa: S101 - there is a pooling and a rate
    return best


def probabilities(logits: Tensor, task: str) -> np.ndarray:
    """Of classes, or of findings each on its own, in float64."""
    logits = logits.double()
    return (logits.sigmoid() if task == TASKS[3] else logits.softmax(-1)).cpu().numpy()


def logistic_probe(
    features: Mapping[str, Sequence[np.ndarray]],
    labels: Sequence[np.ndarray],
    task: str,
    strengths: Sequence[float] = STRENGTHS,
) -> Chosen:
    """scikit-learn's logistic regression with the best pooling and C by AUC on the validation part.

    Args:
        features, labels, task: as in `linear_probe`.
        strengths: values of C.
    """
    found = []
    for pooling, parts in features.items():
        for strength in strengths:
            model = _logistic(strength, task).fit(parts[0], labels[0])
            score = ranked_auc(labels[1], model.predict_proba(parts[1]), task)
            found.append(Chosen({"pooling": pooling, "C": strength}, score, model.predict_proba(parts[2])))
    return max(found, key=lambda chosen: chosen.validation_auc)


def _logistic(strength: float, task: str) -> OneVsRestClassifier:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    return OneVsRestClassifier(model) if task == TASKS[3] else model


def few_shot(
    features: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    task: str,
    shots: int,
    repeats: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """AUC of a logistic regression (C 1) on a few training images of each class, drawn anew each time.

    Args:
        features, labels: training and test part.
        task: one of `TASKS` but findings, of which images have several.
        shots: images of each class.
        repeats: how often.
        seed: of the draws.

    Returns:
        "auc", its mean, and "std" over repeats.

    Raises:
        InputError: on findings, or when a class has fewer training images than shots.
    """
    if task == TASKS[3]:
        raise InputError("few-shot needs one class per image, and this task has findings. Leave it out.")
    classes, counts = np.unique(labels[0], return_counts=True)
    if counts.min() < shots:
        raise InputError(f"{shots} shots are more than the {counts.min()} images of the rarest class. Give fewer.")
    random, scores = np.random.default_rng(seed), []
    for _ in range(repeats):
        rows = np.concatenate([random.choice(np.flatnonzero(labels[0] == c), shots, replace=False) for c in classes])
        model = _logistic(1.0, task).fit(features[0][rows], labels[0][rows])
        scores.append(auc(labels[1], model.predict_proba(features[1]), task))
    return {"auc": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)) if repeats > 1 else 0.0}
