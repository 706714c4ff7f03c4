"""Labelled tasks to measure an encoder on, one file each."""

from biovfm_monai.evaluation.benchmarks.base import Benchmark
from biovfm_monai.evaluation.benchmarks.dataset import dataset
from biovfm_monai.evaluation.benchmarks.medmnist import medmnist

__all__ = ["Benchmark", "dataset", "medmnist"]
