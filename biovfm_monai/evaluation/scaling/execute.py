"""Run a study: each run trains by its bundle and is scored in processes of its own; what is there is not done again."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import joblib
import pandas as pd
import torch

from biovfm_monai.checkpoints import encoder_info
from biovfm_monai.data.jobs import share_out
from biovfm_monai.errors import InputError, require_within
from biovfm_monai.evaluation.scaling.study import StudyRun, read_study
from biovfm_monai.files import write_atomically, write_json

__all__ = ["finish_run", "run_study"]

logger = logging.getLogger(__name__)

_LAUNCHERS = {"local": None, "ray": "ray", "slurm": "submitit"}
"""How runs are started, and what has to be installed for it."""


def run_study(
    path: str | Path,
    out: str | Path,
    launcher: str = "local",
    workers: int = 1,
    options: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, str]]:
    """Train and score all runs of a study, each in out/runs/NAME, and put what they found into out/runs.parquet.

    What a run has finished is not done again, and what it began goes on, so that a study that was stopped in any way is
    started again by the same call, and may have got further runs meanwhile.

    Args:
        path: as of `read_study`.
        out: folder for runs and table.
        launcher: "local", on this machine, "ray", on the cluster that Ray finds, or "slurm", an array job by submitit.
        workers: runs at a time.
        options: of submitit, such as {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 600}.

    Returns:
        The table: a row for each run, benchmark and probe ("protocol"), or for each run of a study without benchmarks.
        And the reasons why runs have failed, by name.

    Raises:
        InputError: when the study cannot be used, or is another one than that of the folder.
    """
    require_within(1, whole=True, workers=workers)
    runs = read_study(path)
    folders = [_prepared(run, Path(out) / "runs" / run.name) for run in runs]
    table, failed = Path(out) / "runs.parquet", {}
    for folder, reason in _launched(folders, Path(out), launcher, workers, options or {}):
        if reason is None:
            _write_table(folders, table)
        else:
            failed[folder.name] = reason
            logger.warning("%s: %s", folder.name, reason)
    return table, failed


def finish_run(folder: Path) -> tuple[Path, str | None]:
    """Do what a run still lacks.

    Returns:
        The folder, and why it failed; None where it did not.
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    with _alone(folder / ".lock") as lock, _gpu(folder.parent.parent) as device:
        for file, command in _commands(folder, run, "cpu" if device is None else "cuda"):
            if not (folder / file).exists() and (reason := _failure(folder, command, lock, device)):
                return folder, reason
            if file == "trained.json":
                _note_training(folder, run)
    return folder, None


def _prepared(run: StudyRun, folder: Path) -> Path:
    """Write down what a run is, once; what is planned of it becomes part of its rows."""
    given = {"files": list(run.files), "settings": run.settings, "benchmarks": run.benchmarks}
    path = folder / "run.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        _require_same(path, known, json.loads(json.dumps(given)))
    else:
        plan = run.plan()
        planned = {"encoder_parameters": plan.encoder_parameters, "flops_per_image": plan.cost.flops}
        write_json(folder / "settings.json", run.settings)
        write_json(path, {"about": run.about, **given, **planned})
    return folder


def _require_same(path: Path, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    differ = [
        f"{part} {key}: {known[part].get(key)!r} before, {given[part].get(key)!r} now"
        for part in ("settings", "benchmarks")
        for key in sorted({*known[part], *given[part]})
        if known[part].get(key) != given[part].get(key)
    ]
    if known["files"] != given["files"]:
        differ.append(f"files: {known['files']} before, {given['files']} now")
    if differ:
        raise InputError(f"{path}: this run was begun otherwise: {'; '.join(differ)}. Give another --out, or undo it.")


def _commands(folder: Path, run: Mapping[str, Any], device: str) -> Iterator[tuple[str, list[str]]]:
    """Files that a run leaves, in order, and the arguments of Python that make them."""
    files = [*run["files"], str(folder / "settings.json")]
    train = ["-m", "monai.bundle", "run", "--config_file", str(files), "--bundle_root", str(folder), "--resume", "True"]
    yield "trained.json", train
    encoder = str(folder / "models/encoder.safetensors")
    for name, given in run["benchmarks"].items():
        options = {**given, "device": device, "cache": str(folder / "features"), "out": str(folder / _scores(name))}
        path = options.pop("path")
        probe = ["-m", "biovfm_monai.cli", "probe", path, encoder]
        yield _scores(name), [*probe, *(f"--{key}={value}" for key, value in options.items() if value is not None)]


def _scores(benchmark: str) -> str:
    return f"probe_{benchmark}.json"


def _failure(folder: Path, command: Sequence[str], lock: IO[str], device: str | None) -> str | None:
    """Run Python, and say what went wrong, if anything did. What it prints goes to log.txt."""
    path = folder / "log.txt"
    with path.open("ab") as log:
        begun = log.tell()
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        status = _call(command, log, environment, lock)
    if status == 0:
        return None
    with path.open("rb") as log:
        log.seek(begun)
        lines = log.read().decode(errors="replace").split("\n")
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()] or [""]
    return f"ended with status {status}, see {path}: {said[-1].removeprefix('error: ')}"


def _call(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str], lock: IO[str]) -> int:
    """Run Python on; it holds the lock, too, so that it is waited for if this process is killed."""
    held = [lock.fileno()]
    return subprocess.run(  # noqa: S603 - our own
        [sys.executable, *command], stdout=log, stderr=log, env=environment, pass_fds=held, check=False
    ).returncode


def _note_training(folder: Path, run: Mapping[str, Any]) -> None:
    """Keep what the training took and found."""
    if (folder / "trained.json").exists():
        return
    lines = [json.loads(line) for line in (folder / "eval/log.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = encoder_info(folder / "models/encoder.safetensors")["training"]["samples_seen"]
    found = {
        "samples": samples, "flops": samples * run["flops_per_image"], "loss": lines[-1]["loss"],
        "seconds": round(sum(line["seconds"] for line in lines), 3),
    }  # fmt: skip
    write_json(folder / "trained.json", found)


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What a run found, if it is finished."""
    if not (folder / "trained.json").exists():
        return
    run, trained = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("run.json", "trained.json"))
    row = {"run": folder.name, **run["about"], "encoder_parameters": run["encoder_parameters"], **trained}
    if not run["benchmarks"]:
        yield row
    for task in run["benchmarks"]:
        path = folder / _scores(task)
        if path.exists():
            scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
            for probe, of in scores["encoder"].items():
                controls = {f"{name}_auc": scores[name][probe]["auc"] for name in ("random_init", "raw_pixels")}
                found = {"auc": of["auc"], "accuracy": of["accuracy"], **controls}
                yield {**row, "task": task, "protocol": f"{probe} probe", **found}


def _write_table(folders: Sequence[Path], table: Path) -> None:
    with write_atomically(table) as draft:
        pd.DataFrame([row for folder in folders for row in _rows(folder)]).to_parquet(draft)


def _launched(
    folders: Sequence[Path], out: Path, launcher: str, workers: int, options: Mapping[str, Any]
) -> Iterator[tuple[Path, str | None]]:
    """Runs as they end."""
    if launcher not in _LAUNCHERS:
        raise InputError(f"launcher {launcher!r} is unknown. Give one of {', '.join(_LAUNCHERS)}.")
    needed = _LAUNCHERS[launcher]
    if needed is not None and find_spec(needed) is None:
        raise InputError(f"launcher {launcher} needs {needed}. Install biovfm-monai[{launcher}].")
    if launcher == "slurm":
        import submitit  # noqa: PLC0415 - an extra

        # Where there is no Slurm it starts processes on this machine.
        executor = submitit.AutoExecutor(folder=out / "slurm")
        executor.update_parameters(**{"slurm_array_parallelism": workers, **options})
        jobs = executor.map_array(finish_run, folders)
        yield from (job.result() for job in submitit.helpers.as_completed(jobs))
        return
    if launcher == "ray":
        from ray.util.joblib import register_ray  # noqa: PLC0415 - an extra

        register_ray()
    # Work is done in processes of its own, so threads are enough here.
    with joblib.parallel_config(backend="ray" if launcher == "ray" else "threading"):
        yield from share_out((joblib.delayed(finish_run)(folder) for folder in folders), workers, ordered=False)


@contextmanager
def _alone(path: Path) -> Iterator[IO[str]]:
    """Wait until no other process works in a folder, even one that has outlived what started it."""
    with path.open("w", encoding="utf-8") as lock:
        if not _taken(lock):
            logger.info("%s: another process is at work there, and is waited for", path.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def _gpu(out: Path) -> Iterator[str | None]:
    """A GPU of this machine that no other run of the study has, or the first one; None where there is none."""
    if not torch.cuda.is_available():
        yield None
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(n) for n in range(torch.cuda.device_count())] if given is None else given.split(",")
    with ExitStack() as opened:
        locks = ((out / f".gpu-{platform.node()}-{device}").open("w", encoding="utf-8") for device in devices)
        free = (device for device, lock in zip(devices, locks, strict=True) if _taken(opened.enter_context(lock)))
        yield next(free, devices[0])


def _taken(lock: IO[str]) -> bool:
    """Take a lock, if no other process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
