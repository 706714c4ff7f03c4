"""The files for schedulers: Slurm's script run with stand-ins for its commands, the Kubernetes example parsed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from torch.distributed.run import get_args_parser

from biovfm_monai.checkpoints.state import states_in
from biovfm_monai.data import write_samples
from biovfm_monai.shipped import shipped_folder

ROOT = Path(__file__).parents[2]
COMMANDS = {
    # A task on each of one node: after the options its command, which gets the signal that Slurm sends to tasks.
    "srun": 'until [ "$1" = torchrun ]; do shift; done\nexec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi',
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "${@/gpu/2}"',
}


@pytest.fixture
def job(tmp_path):
    """Start the script for a job of one node with two processes."""
    for name, body in COMMANDS.items():
        command = tmp_path / "commands" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'commands'}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"),
        "PYTHON": sys.executable, "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path),
        "BUNDLE": str(shipped_folder("bundles") / "biovfm_mae_pretraining"),
    }  # fmt: skip
    started = []

    def start(*overrides):
        options = {"max_epochs": 2, "steps_per_epoch": 30, "batch_size": 8, "encoder::depth": 1} | dict(overrides)
        given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        script = [
            "bash",
            str(shipped_folder("configs") / "slurm.sbatch"),
            str(tmp_path / "samples"),
            str(tmp_path / "out"),
        ]
        with (tmp_path / "printed").open("a") as printed:
            process = subprocess.Popen([*script, *given], env=environment, stdout=printed, stderr=printed)
        started.append(process)
        return process

    yield start
    for process in started:
        for one in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            one.kill()
        process.kill()
        process.wait(30)


@pytest.mark.slow
def test_a_job_that_is_stopped_by_the_time_limit_is_queued_again_and_ends_and_one_that_fails_is_not(job, tmp_path):
    write_samples(tmp_path / "samples")
    log, states = tmp_path / "out/eval/log.jsonl", tmp_path / "out/models/state"
    process = job(("train::handlers::1::interval", 1))
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, (tmp_path / "printed").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # As --signal=TERM does: to the tasks, not to the script.
    (agent,) = [one for one in psutil.Process(process.pid).children() if "torch.distributed.run" in one.cmdline()]
    agent.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    assert [state.name.endswith("-stopped") for state in states_in(states)][:1] == [True]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert job(("train::handlers::1::interval", 1)).wait(120) == 0, (tmp_path / "printed").read_text()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 61))
    assert job(("batch_size", 7)).wait(120) != 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_the_kubernetes_example_starts_what_torchrun_and_the_bundle_know():
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/multi-node.md").read_text(), re.DOTALL)
    spec = yaml.safe_load(text)["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    program, *arguments = container["command"]
    assert program == "torchrun"
    known = get_args_parser().parse_args(arguments)
    assert known.module
    assert [known.training_script, *known.training_script_args[:1]] == ["monai.bundle", "run"]
    given = dict(part.removeprefix("--").split("=") for part in known.training_script_args[1:])
    config = ROOT / given.pop("config_file").removeprefix("/opt/biovfm/")
    assert given.keys() <= json.loads(config.read_text()).keys()
    assert all(isinstance(variable["value"], str) for variable in container["env"])
