"""What `biovfm plan` says of a step's memory and operations, against real steps on the CPU.

    python benchmarks/plan_memory.py [--threads 1] [--room 1.25]

Each row is a process of its own that trains a shipped bundle with an overlay or two for two steps, with its own views
and optimizer. "measured" is how far its resident memory rose at most, from when the data were read, libraries loaded
and warm, to the end of the second step. Operations are counted by torch's counter around the method's real pass.
The last row is the largest micro-batch that is planned to fit into a room.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biovfm_monai.data import write_samples
from biovfm_monai.engines import make_plan
from biovfm_monai.methods import MAE
from biovfm_monai.networks import ViT
from biovfm_monai.shipped import shipped_folder

FP32 = {"precision": "fp32", "device": "cpu"}
RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "MAE ViT-S/16, 224 px, batch 16": (
        ["biovfm_mae_pretraining", "vit_small", "mae"], {"batch_size": 16},
    ),
    "the same, blocks computed anew": (
        ["biovfm_mae_pretraining", "vit_small", "mae"],
        {"batch_size": 16, "checkpointing": "full"},
    ),
    "MAE ViT-B/16, 224 px, batch 8": (
        ["biovfm_mae_pretraining", "vit_small", "mae"],
        {"batch_size": 8, "encoder#_target_": "biovfm_monai.networks.vit_base"},
    ),
    "MAE ViT-S/8, 32 x 64 x 64, batch 16": (
        ["mri_mae_pretraining", "mae"],
        {"batch_size": 16, "encoder#_target_": "biovfm_monai.networks.spad_vit_small", "encoder#depth": 12},
    ),
    "DINOv2 ViT-S/16, 224 and 112 px, batch 4": (
        ["biovfm_mae_pretraining", "vit_small", "dinov2"], {"batch_size": 4, "method#prototypes": 4096},
    ),
}  # fmt: skip

FITTED = "MAE ViT-S/16, 224 px, batch 16"


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


def measure(names: list[str], overrides: dict[str, Any], dataset_dir: str, threads: int) -> dict[str, float]:
    """Train two steps, and count the operations of one batch."""
    torch.set_num_threads(threads)
    parser = ConfigParser()
    parser.read_config(files_of(names))
    parser.update(
        {
            **FP32, "max_epochs": 1, "steps_per_epoch": 2, "dataset_dir": dataset_dir, "train#handlers": [],
            "train#dataset": None, "train#sampler": None, "train#dataloader": "@loader", **overrides,
        }
    )  # fmt: skip
    data = ConfigParser()
    data.read_config(files_of(names))
    data.update({**FP32, "steps_per_epoch": 2, "dataset_dir": dataset_dir, **overrides})
    loader = data.get_parsed_content("train#dataloader")
    batch = next(iter(loader))
    warm_up()
    parser["loader"] = loader
    begin = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    trainer = parser.get_parsed_content("train#trainer")
    trainer.run()
    risen = resident("VmHWM") - begin
    views = trainer.prepare_batch({**batch, "key": torch.arange(len(batch["key"]))}, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.method(views)["loss"].backward()
    return {"bytes": risen, "flops": counter.get_total_flops() / len(batch["key"])}


def compare(name: str, names: list[str], overrides: dict[str, Any], dataset_dir: str, threads: int) -> None:
    """Print the row of one run."""
    plan = make_plan(files_of(names), {**FP32, **overrides})
    given = json.dumps([names, overrides, dataset_dir, threads])
    done = subprocess.run([sys.executable, __file__, "--run", given], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    planned, measured = plan.memory.peak / 2**20, found["bytes"] / 2**20
    print(
        f"{name:42} {planned:5.0f} MiB {measured:5.0f} MiB {planned / measured:6.2f}  "
        f"{plan.cost.flops:.6e} {found['flops']:.6e}",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--room", type=float, default=1.25, help="GiB, of which the largest micro-batch is found and run"
    )
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(*json.loads(arguments.run))))
        return
    print(f"{'run':42} {'planned':>9} {'measured':>9} {'ratio':>6}  FLOPs per image, planned and counted")
    with tempfile.TemporaryDirectory() as folder:
        volumes, samples = f"{folder}/volumes", write_samples(f"{folder}/samples")
        write_volumes(Path(volumes))
        for name, (names, overrides) in RUNS.items():
            data = volumes if names[0] == "mri_mae_pretraining" else samples
            compare(name, names, overrides, data, arguments.threads)
        names, overrides = RUNS[FITTED]
        largest = make_plan(files_of(names), {**FP32, **overrides}, memory=arguments.room).largest_micro_batch
        name = f"MAE ViT-S/16, in {arguments.room} GiB: batch {largest}"
        compare(name, names, {**overrides, "batch_size": largest}, samples, arguments.threads)


if __name__ == "__main__":
    main()
