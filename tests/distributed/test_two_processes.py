"""Two Gloo processes under torchrun are the same as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = str(Path(__file__).with_name("two_processes.py"))


def launch(processes, out, accumulation=1, epochs=2, resume="anew"):
    out.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable,
        *(torchrun if processes > 1 else []),
        SCRIPT,
        str(out),
        str(accumulation),
        str(epochs),
        resume,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return launch(1, out)[0]


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_end_with_the_weights_of_one_and_share_out_its_images(alone, tmp_path, accumulation):
    first, second = launch(2, tmp_path, accumulation)
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    assert first["weights"] == second["weights"]
    assert sorted(first["numbers"] + second["numbers"]) == alone["numbers"] == list(range(80))


@pytest.mark.xdist_group("distributed")
def test_a_run_stopped_on_one_process_goes_on_with_two(alone, tmp_path):
    begun = launch(1, tmp_path, epochs=1)[0]
    first, second = launch(2, tmp_path, resume="resume")
    assert begun["numbers"] + sorted(first["numbers"] + second["numbers"]) == list(range(80))
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    assert len(losses(tmp_path)) == 10
