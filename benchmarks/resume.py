"""Whether a run that is stopped anywhere ends as one that was not: losses and weights compared bit for bit.

    python benchmarks/resume.py --out FOLDER [--method mae]

A shipped bundle, made small, is trained for 2 epochs of 6 steps, on one process and on two (Gloo, under torchrun). Then
it is stopped at twelve points, each time in a folder of its own, and started again with `--resume True`. At the end:
a table of the point, of what was left to go on from, and whether losses and weights are those of the undisturbed run
with as many processes; of a run on one, two, and one process, whether each image was seen once, in order.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from biovfm_monai import distributed
from biovfm_monai.checkpoints.state import newest_state, read_state, states_in
from biovfm_monai.data import write_samples
from biovfm_monai.engines import PretrainingTrainer
from biovfm_monai.errors import report_input_errors
from biovfm_monai.shipped import shipped_folder

STEPS, BATCH = 6, 8
SMALL = {
    "max_epochs": 2, "steps_per_epoch": STEPS, "batch_size": BATCH, "precision": "fp32", "img_size": [32, 32],
    "crop_size": [48, 48], "encoder::depth": 1,
}  # fmt: skip


class Point(NamedTuple):
    """Where a run is stopped."""

    name: str
    event: str
    at: int
    """Iteration, or number of the state that is written."""
    how: str
    processes: int = 1
    accumulation: int = 1


POINTS = [
    Point("SIGTERM in the first step", "step", 1, "TERM"),
    Point("SIGTERM in the middle of an epoch", "step", 3, "TERM"),
    Point("SIGUSR1 in the last step of an epoch", "step", 6, "USR1"),
    Point("SIGTERM between accumulation steps", "step", 7, "TERM", accumulation=2),
    Point("kill -9 in the first epoch", "step", 4, "KILL"),
    Point("kill -9 in the second epoch", "step", 9, "KILL"),
    Point("kill -9 between accumulation steps", "step", 15, "KILL", accumulation=2),
    Point("kill -9 half-way through writing a state", "write", 2, "KILL"),
    Point("the newest state cut short", "step", 13, "CUT"),
    Point("SIGTERM to one of two processes", "step", 8, "TERM", 2),
    Point("kill -9 of one of two processes", "step", 9, "KILL", 2),
    Point("kill -9 of one of two, writing", "write", 2, "KILL", 2),
]


def worker(out: Path, options: dict[str, Any], point: Point | None) -> None:
    """Train, and be stopped at a point, if there is one."""
    torch.set_num_threads(1)
    config = shipped_folder("bundles") / options.pop("bundle") / "configs/train.json"
    overlay = options.pop("overlay")
    configs = [str(config)] + ([str(shipped_folder("configs") / f"{overlay}.json")] if overlay else [])
    workflow = ConfigWorkflow(configs, workflow_type="train", logging_file=False, bundle_root=str(out), **options)
    workflow.initialize()
    trainer: PretrainingTrainer = workflow.parser.get_parsed_content("train#trainer")
    seen: list[int] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.extend(e.state.batch["key"].tolist()))
    begun = out / f"begun-{distributed.rank()}"
    # Started again by torchrun, it is not stopped once more.
    if point is not None and distributed.rank() == distributed.world_size() - 1 and not begun.exists():
        begun.touch()
        stop_at(trainer, point)
    if point is not None and point.event == "write" and distributed.is_main() and not (out / "begun-write").exists():
        (out / "begun-write").touch()
        stop_in_writing(point.at)
    workflow.run()
    with (out / f"seen-{distributed.rank()}.json").open("a") as file:
        file.write(json.dumps(seen) + "\n")
    workflow.finalize()


def stop_at(trainer: PretrainingTrainer, point: Point) -> None:
    """Signal this process at the beginning of an iteration."""
    if point.event == "step" and point.how != "CUT":
        number = getattr(signal, f"SIG{point.how}")
        trainer.add_event_handler(Events.ITERATION_STARTED(once=point.at), lambda _: os.kill(os.getpid(), number))


def stop_in_writing(count: int) -> None:
    """Kill this process when half of its share of a state is on disk."""
    write, left = HuggingFaceStorageWriter.write_data, [count]

    def dying(self: HuggingFaceStorageWriter, plan: Any, planner: Any) -> Any:
        done = write(self, plan, planner)
        left[0] -= 1
        if not left[0]:
            cut_short(Path(self.path))
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(HuggingFaceStorageWriter, "write_data", dying)  # noqa: B010 - mypy forbids the other way


def cut_short(state: Path) -> None:
    """Leave half of a file of a state."""
    file = next(state.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def launch(out: Path, options: dict[str, Any], processes: int, point: Point | None = None, resume: bool = False) -> int:
    """Run a worker on some processes; returns the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    given = [str(out), json.dumps({**options, "resume": resume}), json.dumps(point)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", *given]
    with (out / "printed.txt").open("a") as printed:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=printed, stderr=printed, env=environment, timeout=600, check=False)
    return done.returncode


def outcome(out: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and the last weights."""
    losses = [json.loads(line)["loss"] for line in (out / "eval/log.jsonl").read_text().splitlines()]
    return losses, read_state(newest_state(out / "models/state"), "method.")


def same(out: Path, expected: Path) -> tuple[str, str]:
    """Whether two runs logged the same losses, and ended with the same weights, bit for bit."""
    (losses, weights), (wanted, of) = outcome(out), outcome(expected)
    equal = weights.keys() == of.keys() and all(torch.equal(weights[name], of[name]) for name in of)
    return ("equal" if losses == wanted else "DIFFERENT"), ("equal" if equal else "DIFFERENT")


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--worker"]:
        report_input_errors()
        out, options, point = sys.argv[2:]
        found = json.loads(point)
        worker(Path(out), json.loads(options), None if found is None else Point(*found))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="mae", help="an overlay below configs/; mae is the bundle's own")
    parser.add_argument("--bundle", default="biovfm_mae_pretraining")
    parser.add_argument("--points", type=int, nargs="*", default=range(len(POINTS)), help="numbers of some, from 0")
    chosen = parser.parse_args()
    samples = write_samples(chosen.out / "samples")
    log = {"train::handlers::1::interval": 1, "dataset_dir": str(samples)}
    options = {**SMALL, **log, "bundle": chosen.bundle, "overlay": None if chosen.method == "mae" else chosen.method}
    wholes = {}
    points = [POINTS[number] for number in chosen.points]
    for processes, accumulation in sorted({(1, 1), *((point.processes, point.accumulation) for point in points)}):
        whole = wholes[processes, accumulation] = chosen.out / f"whole {processes} {accumulation}"
        launch(whole, {**options, "accumulation_steps": accumulation}, processes)
    print("| stopped by | status | went on from | losses | weights |\n|---|---:|---|---|---|")
    for point in points:
        out, given = chosen.out / point.name, {**options, "accumulation_steps": point.accumulation}
        status = launch(out, given, point.processes, point)
        states = states_in(out / "models/state")
        if point.how == "CUT":
            cut_short(states.pop(0))
        left = f"`{states[0].name}`" if states else "nothing"
        launch(out, given, point.processes, resume=True)
        whole = wholes[point.processes, point.accumulation]
        print(f"| {point.name} | {status} | {left} |", " | ".join(same(out, whole)), "|", flush=True)
    out = chosen.out / "one two one"
    first, second = (POINTS[1], Point("", "step", 8, "TERM", 2))
    launch(out, options, 1, first)
    (out / "begun-1").unlink(missing_ok=True)
    launch(out, options, 2, second, resume=True)
    launch(out, options, 1, resume=True)
    print("1, 2, 1 processes: each image once, in order:", in_order(out, wholes[1, 1]))


def in_order(out: Path, whole: Path) -> bool:
    """Whether the keys of all parts are those of the whole run, those of two processes side by side."""
    expected = json.loads((whole / "seen-0.json").read_text())
    parts = [json.loads(line) for line in (out / "seen-0.json").read_text().splitlines()]
    others = [json.loads(line) for line in (out / "seen-1.json").read_text().splitlines()]
    steps = [expected[n : n + BATCH] for n in range(0, len(expected), BATCH)]
    found = [parts[0][n : n + BATCH] for n in range(0, len(parts[0]), BATCH)]
    half = BATCH // 2
    found += [sorted(parts[1][n : n + half] + others[0][n : n + half]) for n in range(0, len(parts[1]), half)]
    found += [parts[2][n : n + BATCH] for n in range(0, len(parts[2]), BATCH)]
    return [sorted(step) for step in found] == [sorted(step) for step in steps]


if __name__ == "__main__":
    main()
