"""Run a study: each run trains by its bundle and is scored in processes of its own; what is there is not done again."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import pandas as pd
from monai.bundle import ConfigParser

from biovfm_monai.checkpoints import encoder_info
from biovfm_monai.data.columns import share_of
from biovfm_monai.errors import InputError, reason_of, require_within
from biovfm_monai.evaluation.probe import HEADLINES
from biovfm_monai.evaluation.scaling.launch import alone, gpu, launched
from biovfm_monai.evaluation.scaling.score import ENCODER, RUN, scores_file
from biovfm_monai.evaluation.scaling.study import FRACTION, StudyRun, read_study
from biovfm_monai.files import write_atomically, write_json

__all__ = ["finish_run", "run_study"]

logger = logging.getLogger(__name__)

# In a folder of their own, so that a report does not take them for scores.
_SETTINGS, _TRAINED = "study/settings.json", "study/trained.json"


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
    # Runs side by side on one machine would otherwise each start as many threads as it has cores.
    threads = max((os.cpu_count() or 1) // workers, 1) if launcher == "local" else None
    work = partial(finish_run, threads=threads)
    for folder, reason in launched(work, folders, Path(out), launcher, workers, options or {}):
        if reason is None:
            _write_table(folders, table)
        else:
            failed[folder.name] = reason
            logger.warning("%s: %s", folder.name, reason)
    return table, failed


def finish_run(folder: Path, threads: int | None = None) -> str | None:
    """Do what a run still lacks.

    Args:
        folder: of the run.
        threads: for its programs, where OMP_NUM_THREADS does not say; None for as many as torch takes.

    Returns:
        The reason why that failed, if it did.
    """
    try:
        return _finished(folder, json.loads((folder / RUN).read_text(encoding="utf-8")), threads)
    except (OSError, ValueError) as error:
        return reason_of(error)
    except Exception as error:  # what nobody foresaw of one run must not end the others
        logger.exception("%s", folder.name)
        return f"{type(error).__name__}: {error}"


def _finished(folder: Path, run: Mapping[str, Any], threads: int | None) -> str | None:
    with alone(folder / ".lock") as lock, gpu(folder.parent.parent) as (device, taken):
        locks = [lock, *taken]
        environment = ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}) | os.environ
        environment |= {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        if not (folder / _TRAINED).exists():
            files = [*run["files"], str(folder / _SETTINGS)]
            train = ["monai.bundle", "run", "--config_file", str(files), "--bundle_root", str(folder)]
            if reason := _failure(folder, [*train, "--resume", "True"], environment, locks):
                return reason
            _note_training(folder, run)
        if all((folder / scores_file(name)).exists() for name in run["benchmarks"]):
            return None
        score = ["biovfm_monai.evaluation.scaling", str(folder), "cpu" if device is None else "cuda"]
        return _failure(folder, score, environment, locks)


def _prepared(run: StudyRun, folder: Path) -> Path:
    """Write down what a run is, once; what is planned of it becomes part of its rows."""
    given = {"files": list(run.files), "settings": run.settings, "benchmarks": run.benchmarks}
    path = folder / RUN
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        _require_same(path, known, json.loads(json.dumps(given)))
    else:
        plan = run.plan()
        planned = {"encoder_parameters": plan.encoder_parameters, "flops_per_image": plan.cost.flops}
        write_json(folder / _SETTINGS, run.settings)
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


def _failure(
    folder: Path, command: Sequence[str], environment: Mapping[str, str], locks: Sequence[IO[str]]
) -> str | None:
    """Run a module, and say what went wrong, if anything did. What it prints goes to log.txt."""
    path = folder / "log.txt"
    with path.open("ab") as log:
        begun = log.tell()
        status = _call(command, log, environment, locks)
    if status == 0:
        return None
    with path.open("rb") as log:
        log.seek(begun)
        lines = log.read().decode(errors="replace").split("\n")
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()] or [""]
    return f"ended with status {status}, see {path}: {said[-1].removeprefix('error: ')}"


def _call(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str], locks: Sequence[IO[str]]) -> int:
    """Run a module; it holds the locks, too, so that it is waited for if this process is killed."""
    held = [lock.fileno() for lock in locks]
    return subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-m", *command], stdout=log, stderr=log, env=environment, pass_fds=held, check=False
    ).returncode


def _note_training(folder: Path, run: Mapping[str, Any]) -> None:
    """Keep what the training took and found."""
    lines = [json.loads(line) for line in (folder / "eval/log.jsonl").read_text(encoding="utf-8").splitlines()]
    # A run that was killed has lost the line of its last steps, so time is by the samples that have one.
    logged = sum(line["seconds"] * line["images_per_second"] for line in lines)
    samples = encoder_info(folder / ENCODER)["training"]["samples_seen"]
    found = {
        "images": _images(folder, run), "samples": samples, "flops": samples * run["flops_per_image"],
        "loss": lines[-1]["loss"], "seconds": samples * sum(line["seconds"] for line in lines) / logged,
    }  # fmt: skip
    write_json(folder / _TRAINED, found)


def _images(folder: Path, run: Mapping[str, Any]) -> int:
    """How many images it was shown crops of."""
    parser = ConfigParser()
    parser.read_config([*run["files"], str(folder / _SETTINGS)])
    parser["bundle_root"] = str(folder)
    items, fraction, seed = (parser.get_parsed_content(key) for key in ("datalist", FRACTION, "seed"))
    return int(share_of(items, fraction, seed).sum())


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What a run found, if it is finished."""
    if not (folder / _TRAINED).exists():
        return
    run, trained = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (RUN, _TRAINED))
    row = {"run": folder.name, **run["about"], "encoder_parameters": run["encoder_parameters"], **trained}
    if not run["benchmarks"]:
        yield row
    for task in run["benchmarks"]:
        path = folder / scores_file(task)
        if path.exists():
            scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
            for probe, of in scores["encoder"].items():
                found = {name: of[name] for name in HEADLINES if name in of}
                first = next(iter(found))
                found |= {f"{name}_{first}": scores[name][probe][first] for name in ("random_init", "raw_pixels")}
                yield {**row, "task": task, "protocol": f"{probe} probe", **found}


def _write_table(folders: Sequence[Path], table: Path) -> None:
    with write_atomically(table) as draft:
        pd.DataFrame([row for folder in folders for row in _rows(folder)]).to_parquet(draft)
