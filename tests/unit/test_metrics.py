"""Scores of predictions against MedMNIST's own definition and scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.metrics import (
    TASKS,
    auc,
    bootstrap,
    bootstrap_means,
    calibration_error,
    check_labels,
    ranked_auc,
    scores_of,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def predictions(task, rng, count=200):
    """Labels as an archive of MedMNIST has them, and better than chance probabilities with ties."""
    if task == TASKS[3]:
        labels = rng.integers(0, 2, (count, 5))
        return labels, np.round(np.clip(0.3 * labels + 0.7 * rng.random((count, 5)), 0.01, 0.99), 2)
    classes = 2 if task == TASKS[1] else 4
    labels = rng.integers(0, classes, (count, 1))
    likely = np.round(rng.random((count, classes)) + 0.5 * (labels == np.arange(classes)) + 0.01, 1)
    return labels, likely / likely.sum(1, keepdims=True)


def medmnist(y_true, y_score, task):
    """AUC and accuracy as the evaluator of medmnist 3.0.2 computes them, step by step.

    It is told here, since the package needs torchvision.
    """
    y_true, areas, rates = y_true.squeeze(), [], []
    if task == TASKS[3]:
        for label in range(y_score.shape[1]):
            areas.append(roc_auc_score(y_true[:, label], y_score[:, label]))
            rates.append(accuracy_score(y_true[:, label], y_score[:, label] > 0.5))
        return sum(areas) / len(areas), sum(rates) / len(rates)
    if task == TASKS[1]:
        return roc_auc_score(y_true, y_score[:, -1]), accuracy_score(y_true, y_score[:, -1] > 0.5)
    for label in range(y_score.shape[1]):
        areas.append(roc_auc_score((y_true == label).astype(float), y_score[:, label]))
    return sum(areas) / len(areas), accuracy_score(y_true, y_score.argmax(-1))


@pytest.mark.parametrize("task", TASKS)
def test_auc_and_accuracy_are_those_of_medmnists_evaluator(task, rng):
    raw, likely = predictions(task, rng)
    labels = check_labels(raw, likely.shape[1], task, "test")
    found = scores_of(labels, likely, task)
    assert (found["auc"], found["accuracy"]) == medmnist(raw, likely, task)
    assert auc(labels, likely, task) == found["auc"] > 0.6
    assert ranked_auc(labels, likely, task) == pytest.approx(found["auc"], rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_the_bootstrap_is_scikit_learns_scores_of_the_patients_it_draws(task, rng):
    raw, likely = predictions(task, rng)
    labels, subjects = check_labels(raw, likely.shape[1], task, "test"), np.repeat(np.arange(50), 4)
    found = bootstrap(labels, likely, task, subjects, draws=15, seed=3)
    again, draws = np.random.default_rng(3), []
    for _ in range(15):
        chosen = again.integers(50, size=50)
        rows = np.concatenate([np.flatnonzero(subjects == patient) for patient in chosen])
        of = scores_of(labels[rows], likely[rows], task)
        draws.append([of[name] for name in found])
    expected = np.percentile(draws, [2.5, 97.5], axis=0).T
    assert np.array(list(found.values())) == pytest.approx(expected, rel=1e-9)


def test_patients_with_many_images_alike_widen_the_interval(rng):
    labels = np.repeat(rng.integers(0, 2, 40), 10)
    likely = np.clip(np.repeat(rng.normal(0.5, 0.3, 40), 10) + 0.2 * (labels - 0.5), 0, 1)
    likely = np.stack([1 - likely, likely], 1)
    by_patient = bootstrap(labels, likely, TASKS[1], np.repeat(np.arange(40), 10), 200)["auc"]
    by_image = bootstrap(labels, likely, TASKS[1], None, 200)["auc"]
    assert np.ptp(by_patient) > 2 * np.ptp(by_image)


def test_one_patient_has_no_interval(rng):
    labels, likely = rng.integers(0, 2, 20), rng.random((20, 2))
    assert np.isnan([*bootstrap(labels, likely, TASKS[1], ["a"] * 20, 9).values()]).all()
    assert np.isnan(bootstrap_means({"dice": rng.random(3)}, ["a"] * 3)["dice"]).all()


def test_intervals_of_an_accuracy_cover_the_truth_in_nine_of_ten(rng):
    covered = 0
    for seed in range(60):
        labels = rng.integers(0, 2, 150)
        right = rng.random(150) < 0.8
        likely = np.where(right, labels, 1 - labels)
        low, high = bootstrap(labels, np.stack([1 - likely, likely], 1), TASKS[1], None, 100, seed)["accuracy"]
        covered += low <= 0.8 <= high
    assert covered >= 53


def test_calibration_error_is_nothing_where_probabilities_hold_and_the_gap_where_they_are_off(rng):
    likely = np.full((1000, 2), [0.3, 0.7])
    labels = (np.arange(1000) < 700).astype(int)
    assert calibration_error(labels, likely, TASKS[1]) == pytest.approx(0, abs=1e-9)
    assert calibration_error(1 - labels, likely, TASKS[1]) == pytest.approx(0.4)
    assert calibration_error(labels[:, None], likely[:, 1:], TASKS[3]) == pytest.approx(0, abs=1e-9)


def test_grades_far_off_cost_more_kappa_than_grades_nearby():
    labels = np.tile(np.arange(4), 5)
    near, far = (np.eye(4)[np.where(labels == 3, said, labels)] * 0.9 + 0.025 for said in (2, 0))
    assert scores_of(labels, near, TASKS[2])["kappa"] > scores_of(labels, far, TASKS[2])["kappa"] + 0.1
    assert balanced_accuracy_score(labels, near.argmax(1)) == scores_of(labels, far, TASKS[2])["balanced_accuracy"]


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        ([[0], [1], [0]], TASKS[0], "the test part has no image of class 2"),
        ([[1], [1], [1]], TASKS[0], "one class only"),
        ([[0], [1], [3]], TASKS[0], "no whole numbers from 0 to 2"),
        ([[0], [0.5], [1]], TASKS[0], "no whole numbers from 0 to 2"),
        ([[0], [np.nan], [1]], TASKS[0], "no whole numbers from 0 to 2"),
        ([[0, 1], [1, 0]], TASKS[0], "labels of shape"),
        ([], TASKS[0], "labels of shape"),
        ([[0, 1, 1], [1, 0, 1]], TASKS[3], "finding 2 is the same in all of the test part"),
        ([[0], [1]], "regression", "task 'regression' must be one of"),
        ([[0], [1], [2]], TASKS[1], "a binary-class task has 2 classes, and this one 3"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_scored_are_refused(labels, task, message):
    with pytest.raises(InputError, match=message):
        check_labels(np.array(labels), 3, task, "test")


def test_predictions_with_nan_are_refused():
    with pytest.raises(InputError, match="NaN"):
        scores_of(np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 1]]), TASKS[0])
