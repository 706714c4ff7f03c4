"""Two network namespaces as two hosts, with a torchrun agent in each and a folder that both see."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch
from programs import torchrun
from safetensors.torch import load_file

from biovfm_monai.checkpoints.state import states_in
from biovfm_monai.shipped import shipped_folder

BUNDLE = shipped_folder("bundles") / "biovfm_mae_pretraining"
# An agent that shares its store tells a newcomer of a later round nothing of it (torch 2.13), which then waits in vain.
SETTINGS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
IP = shutil.which("ip")
HOSTS, PORT = ("10.213.47.1", "10.213.47.2"), 29417


def ip(*arguments, check=True):
    subprocess.run([IP, *arguments], check=check, capture_output=True, timeout=30)


@pytest.fixture
def hosts():
    """Names of two namespaces, joined by a cable whose ends are called wire."""
    names = [f"biovfm{os.getpid()}-{number}" for number in (0, 1)]
    if IP is None:
        pytest.skip("there is no `ip`, which makes network namespaces")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for name, address in zip(names, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def training(root):
    options = {"max_epochs": 3, "steps_per_epoch": 40, "batch_size": 8, "encoder::depth": 1, "resume": True}
    pairs = [part for name, value in options.items() for part in (f"--{name}", value)]
    logged = ["--train::handlers::1::interval", 1]
    return [
        "monai.bundle",
        "run",
        "--config_file",
        BUNDLE / "configs/train.json",
        "--bundle_root",
        root,
        *pairs,
        *logged,
    ]


@contextmanager
def agents():
    """Start a host's agent, by its number; all that are left are killed with their workers."""
    started = []

    def start(number, name, root):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{HOSTS[0]}:{PORT}", "--rdzv_id", "training"]
        own = ["--rdzv_conf", f"is_host={int(number == 0)}", "--local_addr", HOSTS[number], "--max_restarts", 3]
        command = [IP, "netns", "exec", name, *launcher, *meeting, *own, "-m", *training(root)]
        log = (root.parent / f"host{number}.log").open("a")
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **SETTINGS, "TMPDIR": str(root.parent)},
        )  # fmt: skip
        started.append((process, log))
        return process

    try:
        yield start
    finally:
        for process, log in started:
            kill(process)
            log.close()


def kill(process):
    """An agent and all its workers, as when the power fails: workers have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
    process.wait(timeout=30)


def wait_for(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, "the agent has ended"
        time.sleep(0.1)
    raise AssertionError("it did not happen in two minutes")


def result(root):
    losses = [json.loads(line)["loss"] for line in (root / "eval/log.jsonl").read_text().splitlines()]
    return losses, load_file(root / "models/encoder.safetensors")


@pytest.mark.slow
def test_a_host_that_fails_and_comes_back_changes_nothing(hosts, tmp_path):
    torchrun(2, ["-m", *training(tmp_path / "undisturbed")], tmp_path)
    root = tmp_path / "hosts" / "root"
    root.mkdir(parents=True)
    with agents() as start:
        first, second = (start(number, name, root) for number, name in enumerate(hosts))
        wait_for(lambda: states_in(root / "models/state"), first)
        kill(second)
        assert first.poll() is None
        second = start(1, hosts[1], root)
        assert first.wait(timeout=120) == second.wait(timeout=120) == 0, (root.parent / "host0.log").read_text()
    printed = (root.parent / "host0.log").read_text()
    assert "resumed from" in printed
    (losses, weights), (expected_losses, expected) = result(root), result(tmp_path / "undisturbed")
    assert losses == expected_losses
    assert len(losses) == 120
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
