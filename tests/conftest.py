"""Shared by all tests: few threads, since tests run in parallel, and the sample images written once per process."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import run_python

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles/biovfm_mae_pretraining"


def pytest_configure(config: pytest.Config) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # torch makes this folder as soon as monai is imported, which is after this; parallel workers inherit it.
        folder = tempfile.TemporaryDirectory(prefix="compiler-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        _hide_from_programs(config)


def _hide_from_programs(config: pytest.Config) -> None:
    """Let programs that tests start find no transformers, as most users: MONAI takes seconds to import it."""
    folder = tempfile.TemporaryDirectory(prefix="hidden-")
    config.add_cleanup(folder.cleanup)
    (Path(folder.name) / "transformers.py").write_text("raise ImportError('hidden by the tests')\n")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder.name, os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample images as a dataset folder."""
    from biovfm_monai.data import write_samples

    return Path(write_samples(tmp_path_factory.mktemp("data") / "samples"))


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program with this interpreter; returns what it printed."""

    def call(*arguments: str | Path, cwd: Path, timeout: int = 240, **env: str) -> subprocess.CompletedProcess[str]:
        return run_python(arguments, cwd, timeout, **env)

    return call
