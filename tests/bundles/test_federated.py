"""Bundles as clients of federated learning by MONAI's own client, as docs/federated.md has it."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from conftest import BUNDLE
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject
from workflows import write_subjects

from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle_federated")
RATE = 1e-3


@contextmanager
def client_of(root, schedule, overrides, **options):
    """A client whose learning rate is the same in every round."""
    steady = {f"{schedule}#lr#warmup": 0, f"{schedule}#lr#end": "@learning_rate", "learning_rate": RATE}
    client = MonaiAlgo(root.name, send_weight_diff=False, train_kwargs={**overrides, **steady}, **options)
    client.initialize({ExtraItems.APP_ROOT: str(root.parent), ExtraItems.CLIENT_NAME: "hospital"})
    try:
        yield client
    finally:
        client.finalize()


def weights_of(client):
    return {name: value.clone() for name, value in client.get_weights().weights.items()}


def require_two_rounds(client, steps):
    """Each round changes the weights by what its few steps can, from those given, which are not what it has."""
    given = weights_of(client)
    for _ in range(2):
        client.train(ExchangeObject(weights=given))
        assert client.get_weights().statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == steps
        got = weights_of(client)
        changed = torch.stack([(got[name] - value).abs().max() for name, value in given.items()])
        # Adam's steps are about as long as the learning rate.
        assert changed.median() > RATE / 2
        assert changed.max() < 3 * steps * RATE
        given = {name: value + 1 for name, value in got.items()}


def test_the_pretraining_bundle_is_trained_in_rounds(tmp_path, samples, monkeypatch):
    root = copy_bundle(BUNDLE.name, tmp_path / "app")
    shutil.copytree(samples, root / "samples")
    monkeypatch.chdir(tmp_path)
    overrides = {"steps_per_epoch": 2, "batch_size": 4, "encoder#depth": 1}
    with client_of(root, "train#trainer#schedules", overrides, config_evaluate_filename=None) as client:
        require_two_rounds(client, 2)


def test_a_segmentation_bundle_is_trained_and_evaluated_in_rounds(tmp_path, monkeypatch):
    root = copy_bundle("brain_mri_segmentation", tmp_path / "app")
    monkeypatch.chdir(tmp_path)
    overrides = {"dataset_dir": str(write_subjects(tmp_path / "data")), "encoder#depth": 1, "samples_per_volume": 2}
    with client_of(root, "train#handlers#0#schedules", overrides, eval_kwargs=dict(overrides)) as client:
        require_two_rounds(client, 3)
        metrics = client.evaluate(ExchangeObject(weights=weights_of(client))).metrics
        assert 0 <= metrics["val_mean_dice"] <= 1
