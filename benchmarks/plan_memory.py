"""What `biovfm plan` says of a step's memory and operations, against real steps on the CPU.

    python benchmarks/plan_memory.py [--only TEXT] [--threads 1] [--room 1.25]

Each row is a job of its own that trains a shipped bundle with an overlay or two, with its own views and optimizer, for
two steps, and by two processes for three: the buffers that DDP makes in the second one are full in the third.
"measured" is how far the resident memory of a process rose at most, from when the data were read, libraries loaded and
warm, to the end, where malloc gives back at once what is freed (MALLOC_MMAP_THRESHOLD_=131072); "as it comes" the same
with malloc left as it is. Operations are counted by torch's counter around the method's real pass. The last row of the
first table is the largest micro-batch that is planned to fit into a room.

The second table is of one of two processes that meet through Gloo: "states" are weights, gradients and the optimizer's
states, planned, and summed up over the storages of what the process has after the last step, when gradients that were
accumulated are shared out, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biovfm_monai import distributed, parallelism
from biovfm_monai.data import write_samples
from biovfm_monai.engines import PretrainingTrainer, make_plan
from biovfm_monai.methods import MAE
from biovfm_monai.networks import ViT
from biovfm_monai.shipped import shipped_folder

FP32 = {"precision": "fp32", "device": "cpu"}
MAE_2D, DINOV2 = (["biovfm_mae_pretraining", "vit_small", name] for name in ("mae", "dinov2"))
BASE = {"encoder#_target_": "biovfm_monai.networks.vit_base"}
KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "MAE ViT-S/16, 224 px, batch 16": (MAE_2D, {"batch_size": 16}),
    "MAE ViT-B/16, 224 px, batch 8": (MAE_2D, {"batch_size": 8, **BASE}),
    "DINOv2 ViT-S/16, 224 and 112 px, batch 4": (DINOV2, {"batch_size": 4, "method#prototypes": 4096}),
    "DINOv2 ViT-B/16, 224 and 112 px, batch 2": (DINOV2, {"batch_size": 2, "method#prototypes": 4096, **BASE}),
}
RUNS = {
    **{
        f"{name}{'' if kind == 'none' else f', {kind}'}": (files, {**given, "checkpointing": kind})
        for name, (files, given) in KINDS.items()
        for kind in ("none", "selective", "full")
    },
    "MAE ViT-S/8, 32 x 64 x 64, batch 16": (
        ["mri_mae_pretraining", "mae"],
        {"batch_size": 16, "encoder#_target_": "biovfm_monai.networks.spad_vit_small", "encoder#depth": 12},
    ),
}  # fmt: skip
FITTED = "MAE ViT-S/16, 224 px, batch 16"
OF_TWO = {
    f"{name}{how}": (KINDS[name][0], {**KINDS[name][1], **options})
    for name, how, options in (
        (FITTED, ", copies", {}),
        (FITTED, ", sharded", {"sharding": "full"}),
        (FITTED, ", sharded, full", {"sharding": "full", "checkpointing": "full"}),
        (FITTED, ", sharded, 2 accumulated", {"sharding": "full", "accumulation_steps": 2}),
        ("DINOv2 ViT-S/16, 224 and 112 px, batch 4", ", sharded", {"sharding": "full"}),
    )
}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def files_of(names: list[str]) -> list[str]:
    """The configuration of a bundle, and of overlays."""
    bundle = shipped_folder("bundles") / names[0] / "configs/train.json"
    return [str(bundle), *(str(shipped_folder("configs") / f"{name}.json") for name in names[1:])]


def resident(key: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM the most since it was set back."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def warm_up() -> None:
    """A step of a small method, so that libraries have made what they keep."""
    method = MAE(ViT(1, (64, 64), 16, embed_dim=96, depth=2, num_heads=3))
    optimizer = torch.optim.AdamW(method.parameters(), fused=True)
    method({"image": torch.randn(4, 1, 64, 64)})["loss"].backward()
    torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
    optimizer.step()


def write_volumes(folder: Path) -> None:
    """Isotropic volumes of noise, for the run that is planned for such."""
    folder.mkdir(parents=True)
    for number in range(4):
        voxels = np.random.default_rng(number).random((96, 96, 64), dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / f"{number}.nii.gz")


def train(names: list[str], overrides: dict[str, Any], dataset_dir: str) -> tuple[PretrainingTrainer, Any, int]:
    """A few steps of a bundle: its trainer, a batch, and bytes by which the process grew."""
    steps = 2 if distributed.world_size() == 1 else 3
    given = {**FP32, "max_epochs": 1, "steps_per_epoch": steps, "dataset_dir": dataset_dir, **overrides}
    parser, data = ConfigParser(), ConfigParser()
    for made in (parser, data):
        made.read_config(files_of(names))
        made.update(given)
    loader = data.get_parsed_content("train#dataloader")
    batch = next(iter(loader))
    parser.update({"train#handlers": [], "train#dataset": None, "train#sampler": None, "train#dataloader": "@loader"})
    parser["loader"] = loader
    warm_up()
    begin = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    trainer = parser.get_parsed_content("train#trainer")
    trainer.run()
    return trainer, batch, resident("VmHWM") - begin


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of this process's parts of tensors, once however many share a storage."""
    found = [parallelism.local(x).untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes() for one in found}.values())


def measure(names: list[str], overrides: dict[str, Any], dataset_dir: str, threads: int) -> dict[str, float]:
    """Memory and states of this process, and operations of one batch where it is alone."""
    torch.set_num_threads(threads)
    distributed.initialize()
    trainer, batch, risen = train(names, overrides, dataset_dir)
    weights = [*trainer.network.parameters()]
    states = [x for state in trainer.optimizer.state.values() for x in state.values()]
    held = storages([*weights, *trainer.network.buffers(), *(p.grad for p in weights), *states])
    found = {"bytes": risen, "states": held, "flops": 0.0}
    if distributed.world_size() == 1:
        views = trainer.prepare_batch({**batch, "key": torch.arange(len(batch["key"]))}, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng():
            torch.manual_seed(0)
            trainer.method(views)["loss"].backward()
        found["flops"] = counter.get_total_flops() / len(batch["key"])
    return found


def job(given: list[Any], processes: int = 1, **environment: str) -> dict[str, float]:
    """What the first process of a job finds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", json.dumps(given)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        subprocess.run([*command, "--out", str(out)], check=True, env=variables, stdout=subprocess.DEVNULL)
        found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return found


def compare(name: str, names: list[str], overrides: dict[str, Any], dataset_dir: str, threads: int) -> None:
    """Print the row of one process."""
    plan = make_plan(files_of(names), {**FP32, **overrides})
    given = [names, overrides, dataset_dir, threads]
    found, default = job(given, **GIVES_BACK), job(given)
    print(
        f"| {name} | {_mib(plan.memory.peak)} | {_mib(found['bytes'])} | {plan.memory.peak / found['bytes']:.2f} "
        f"| {_mib(default['bytes'])} | {plan.cost.flops:.6e} | {found['flops']:.6e} |",
        flush=True,
    )


def compare_two(name: str, names: list[str], overrides: dict[str, Any], dataset_dir: str, threads: int) -> None:
    """Print the row of one of two processes."""
    plan = make_plan(files_of(names), {**FP32, **overrides}, processes=2)
    memory = plan.sharded if plan.sharded is not None and "sharding" in overrides else plan.memory
    found = job([names, overrides, dataset_dir, threads], 2, **GIVES_BACK)
    planned = memory.weights + memory.gradients + memory.optimizer
    print(
        f"| {name} | {_mib(planned)} | {_mib(found['states'])} | {_mib(memory.peak)} | {_mib(found['bytes'])} "
        f"| {memory.peak / found['bytes']:.2f} |",
        flush=True,
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument(
        "--room", type=float, default=1.25, help="GiB, of which the largest micro-batch is found and run"
    )
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        found = measure(*json.loads(arguments.worker))
        if distributed.is_main():
            Path(arguments.out).write_text(json.dumps(found), encoding="utf-8")
        distributed.finalize()
        return
    alone, fitted = dict(RUNS), f"MAE ViT-S/16, in {arguments.room} GiB"
    if arguments.only in fitted:
        names, overrides = RUNS[FITTED]
        largest = make_plan(files_of(names), {**FP32, **overrides}, memory=arguments.room).largest_micro_batch
        alone[f"{fitted}: batch {largest}"] = names, {**overrides, "batch_size": largest}
    with tempfile.TemporaryDirectory() as folder:
        volumes, samples = f"{folder}/volumes", write_samples(f"{folder}/samples")
        write_volumes(Path(volumes))
        for runs, row, columns in (
            (alone, compare, ("planned", "measured", "ratio", "as it comes", "FLOPs per image, planned", "counted")),
            (OF_TWO, compare_two, ("states, planned", "counted", "peak, planned", "measured", "ratio")),
        ):
            print(f"| run | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
            for name, (names, overrides) in runs.items():
                if arguments.only in name:
                    data = volumes if names[0] == "mri_mae_pretraining" else samples
                    row(name, names, overrides, data, arguments.threads)


if __name__ == "__main__":
    main()
