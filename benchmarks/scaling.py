"""How fast a masked autoencoder trains with each overlay on and off, and by two processes as against one.

    python benchmarks/scaling.py [--encoders vit_base vit_large] [--processes 1 2] [--overlays none bf16 ...]
        [--batch 64] [--steps 20] [--rounds 3] [--size 224] [--store STORE [--workers 8]]

Synthetic images, the published decoder, AdamW, gradients clipped; on a GPU per process where there is one, else on the
CPU with a thread per process. `--batch` is of each process, so that two have twice the work. Overlays take turns in one
job: each trains `--steps` steps a round, of which the first quarter does not count. "images/s" is of all processes, by
the median of all steps that count; with --store each overlay has a turn more with the images of a store or folder, as
the bundle biovfm_mae_pretraining reads and changes them, in so many workers of each process; "of peak" is model FLOPs
by time and the device's peak; "memory" what the tensors of a GPU took at most; "efficiency" images/s as a share of so
many times those of one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader, Dataset

from biovfm_monai import distributed, networks, parallelism
from biovfm_monai.data import GlobalBatchSampler
from biovfm_monai.engines import PretrainingTrainer, parameter_groups
from biovfm_monai.engines.cost import flops_of, imagined, outlined
from biovfm_monai.engines.usage import peak_flops
from biovfm_monai.methods import MAE
from biovfm_monai.shipped import shipped_folder

OVERLAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {"precision": "bf16"},
    "static graph": {"static_graph": True},
    "selective checkpointing": {"checkpointing": "selective"},
    "full checkpointing": {"checkpointing": "full"},
    "compiled": {"compiled": True},
    "sharded": {"sharding": "full"},
    "sharded, bf16, compiled": {"sharding": "full", "precision": "bf16", "compiled": True},
}


class Noise(Dataset):
    """The same image, endlessly."""

    def __init__(self, size: int) -> None:
        self.image = torch.randn(3, size, size)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"image": self.image, "key": torch.tensor(number)}


def source_of(store: str | None, options: dict[str, Any], device: torch.device) -> tuple[DataLoader, Any]:
    """Where images come from, and what makes the method's batches of them."""
    count, size = options["batch"] * distributed.world_size(), (options["size"],) * 2
    if store is None:
        loader = DataLoader(Noise(options["size"]), batch_sampler=GlobalBatchSampler(count, options["steps"]))
        return loader, lambda images, *_, **__: {key: x.to(device) for key, x in images.items()}
    parser = ConfigParser()
    parser.read_config(str(shipped_folder("bundles") / "biovfm_mae_pretraining/configs/train.json"))
    given = {"dataset_dir": store, "batch_size": count, "steps_per_epoch": options["steps"], "img_size": size}
    given |= {"crop_size": size, "num_workers": options["workers"]}
    parser.update(given)
    return parser.get_parsed_content("train#dataloader"), parser.get_parsed_content("views")


def steps_of(name: str, store: str | None, options: dict[str, Any]) -> tuple[list[float], float, float]:
    """Seconds of each counted step of an overlay, share of the device's peak, and GiB of a GPU's tensors."""
    device, overlay = distributed.device(), OVERLAYS[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    method = MAE(getattr(networks, options["encoder"])(img_size=(options["size"],) * 2))
    network = parallelism.parallel(method, device, **overlay)
    loader, prepare_batch = source_of(store, options, device)
    clock: list[float] = []
    trainer = PretrainingTrainer(
        device, 1, loader, network, torch.optim.AdamW(parameter_groups(network), 1e-4, fused=True),
        prepare_batch=prepare_batch,
        precision=overlay.get("precision", "fp32"), clip_norm=1.0,
    )  # fmt: skip

    def note(_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    seconds = [later - earlier for earlier, later in pairwise(clock)][options["steps"] // 4 :]
    blank = {"image": torch.empty(options["batch"], 3, *(options["size"],) * 2), "key": torch.arange(options["batch"])}
    flops = flops_of(imagined(method), outlined(blank))[1]
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return seconds, flops / peak_flops(device, trainer.dtype), memory


def turns_of(name: str, store: str | None) -> list[tuple[str, tuple[str, str | None]]]:
    """The rows of an overlay, and what takes a turn for each."""
    return [(name, (name, None)), *([(f"{name}, from the store", (name, store))] if store else [])]


def worker(options: dict[str, Any], out: str) -> None:
    """Let overlays take turns, and have the main process write what each took."""
    torch.set_num_threads(1)
    distributed.initialize()
    found: dict[str, dict[str, float]] = {}
    turns = {row: turn for name in options["overlays"] for row, turn in turns_of(name, options["store"])}
    seconds: dict[str, list[float]] = {row: [] for row in turns}
    for _ in range(options["rounds"]):
        for row, (name, store) in turns.items():
            measured, of_peak, memory = steps_of(name, store, options)
            seconds[row] += measured
            step = statistics.median(seconds[row])
            images = options["batch"] * distributed.world_size() / step
            found[row] = {"images": images, "of_peak": of_peak / step, "memory": memory}
    if distributed.is_main():
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    distributed.finalize()


def measure(options: dict[str, Any], processes: int) -> dict[str, dict[str, float]]:
    """What a job of so many processes finds."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, __file__, "--worker", json.dumps(options), out]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=3600)
        found: dict[str, dict[str, float]] = json.loads(Path(out).read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Print a table."""
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["vit_base", "vit_large"])
    parser.add_argument("--overlays", nargs="+", default=list(OVERLAYS), choices=list(OVERLAYS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--store", help="also measure with the images of a store or folder")
    for name, value in (("batch", 64), ("steps", 20), ("rounds", 3), ("size", 224), ("workers", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    print("| encoder | overlay | processes | images/s | efficiency | of peak | memory |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for encoder in chosen.encoders:
        options = {**vars(chosen), "encoder": encoder}
        found = {processes: measure(options, processes) for processes in chosen.processes}
        for row in found[chosen.processes[0]]:
            for processes in chosen.processes:
                images, of_peak, memory = found[processes][row].values()
                alone = found[1][row]["images"] if 1 in found else float("nan")
                shown = "" if math.isnan(memory) else f"{memory:.1f} GiB"
                cells = f"{encoder} | {row} | {processes} | {images:.3g} | {images / alone / processes:.2f}"
                print(f"| {cells} | {of_peak:.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
