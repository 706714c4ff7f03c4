"""Launchers other than torchrun, and what is said when processes do not find, fit or outlive each other."""

import json
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from programs import started

from biovfm_monai import distributed
from biovfm_monai.errors import InputError, report_input_errors

SCRIPT = str(Path(__file__).with_name("bad_launches.py"))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def by_srun(rank):
    """What srun sets for a task of two, of which each has one process; the port follows from the job's number."""
    job = os.getpid() % 10000
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip


def by_variables(port):
    """Torch's own variables, inside a task of Slurm's that started both processes."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return lambda rank: {
        **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0",
    }  # fmt: skip


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("launcher", ["srun", pytest.param("variables", marks=pytest.mark.slow)])
def test_without_torchrun_two_processes_meet_are_refused_what_does_not_fit_and_end_with_a_line_each(launcher, tmp_path):
    environment = by_srun if launcher == "srun" else by_variables(free_port())
    with ExitStack() as stack:
        both = [stack.enter_context(started([SCRIPT, tmp_path], tmp_path, **environment(rank))) for rank in (0, 1)]
        for process, _ in both:
            process.join(120)
        printed = [errors.read_text() for _, (_, errors) in both]
        assert [process.exitcode for process, _ in both] == [1, 1], printed
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["environment"] == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        assert (found["size"], found["here"]) == (2, 2)
        batch, *networks = found["said"]
        assert batch == (
            "batch_size 7 cannot be shared out over 2 process(es) times 1 accumulation step(s). Give a batch_size that "
            "is a multiple of 2."
        )
        other = "processes 1 have another network than process 0. Start all with the same configuration."
        assert networks == [other, other]
    errors = [[line for line in text.splitlines() if "error: " in line] for text in printed]
    assert "error: another process was waited for in vain (" in errors[0][0]
    assert f"error: {tmp_path}/no data" in errors[1][0]
    assert [len(lines) for lines in errors] == [1, 1]
    assert "Traceback" not in "".join(printed)


@pytest.mark.xdist_group("distributed")
def test_who_waits_for_a_process_that_hangs_ends_after_the_timeout_with_one_line(tmp_path):
    environment = by_variables(free_port())
    with ExitStack() as stack:
        (process, (_, errors)), (late, _) = (
            stack.enter_context(started([SCRIPT, tmp_path, "late"], tmp_path, **environment(rank))) for rank in (0, 1)
        )
        process.join(120)
        assert (process.exitcode, late.exitcode) == (1, None)
        (line,) = [line for line in errors.read_text().splitlines() if "error: " in line]
    assert "another process was waited for in vain (" in line
    assert "8000ms" in line


@pytest.mark.parametrize(
    "case", ["the port is taken", "nobody listens", "no such host", "no host answers", "the others stay away"]
)
def test_who_does_not_meet_the_others_says_where_within_its_timeout(case, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if case == "the port is taken" else free_port()
        # Of RFC 5737, for examples: nobody has this address.
        hosts = {"no such host": "no.such.host.invalid", "no host answers": "192.0.2.1"}
        host = hosts.get(case, "127.0.0.1")
        first = case in ("the port is taken", "the others stay away")
        settings = {"MASTER_ADDR": host, "MASTER_PORT": port, "RANK": 1 - first, "WORLD_SIZE": 2, "LOCAL_RANK": 0}
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("SLURM_LOCALID", "0")  # to be as it was afterwards
        begun = time.monotonic()
        with pytest.raises(InputError, match=rf"^{host}:{port}: process {1 - first} did not meet the others there \("):
            distributed.initialize(timeout=1)
        assert time.monotonic() - begun < 60


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_a_launcher_that_says_too_little_is_told_what_is_missing(missing, monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(InputError, match=f"{missing} expected, but not set"):
        distributed.initialize(timeout=1)


def test_a_script_of_slurm_that_starts_one_process_waits_for_nobody(monkeypatch):
    for name, value in {**by_srun(0), "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    distributed.initialize(timeout=1)
    assert distributed.world_size() == 1


def test_a_process_that_is_late_is_told_as_the_reason(capsys):
    previous = sys.excepthook
    report_input_errors()
    try:
        error = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:119] Timed out waiting 1000ms for recv")
        sys.excepthook(RuntimeError, error, None)
    finally:
        sys.excepthook = previous
    printed = capsys.readouterr().err
    assert printed.startswith("error: another process was waited for in vain ([gloo")
    assert "machine, network or disk is gone or slow" in printed
    assert printed.count("\n") == 1
