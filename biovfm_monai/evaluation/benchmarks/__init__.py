"""Labelled tasks to measure an encoder on, one file each."""

from __future__ import annotations

from collections.abc import Sequence

from biovfm_monai.evaluation.benchmarks.base import Benchmark
from biovfm_monai.evaluation.benchmarks.dataset import dataset
from biovfm_monai.evaluation.benchmarks.medmnist import medmnist

__all__ = ["Benchmark", "dataset", "medmnist", "open_benchmark"]


def open_benchmark(path: str, task: str | None = None, modality: str | Sequence[str] | None = None) -> Benchmark:
    """An archive of MedMNIST, .npz, or else a dataset folder or store, as `medmnist` and `dataset` read them."""
    return medmnist(path) if path.endswith(".npz") else dataset(path, task, modality)
