"""What an encoder of volumes is worth without fine-tuning: hippocampus MRI, a voxel-wise linear probe.

    python benchmarks/quality_3d.py --data FOLDER [--seconds 240] [--seeds 3] [--methods mae lejepa]

FOLDER is MSD's Task04 (http://medicaldecathlon.com): images/ and labels/ with files of the same names. A SPAD-ViT 96
wide and 4 deep with patches of 4 x 4 x 4 voxels learns from two thirds of the volumes without labels, by an overlay on
the bundle `mri_mae_pretraining`, in bf16 (fp32 on processors without) for so many seconds of one core. Then it is
frozen: one linear layer, trained with the labels of the same volumes, maps tokens to logits, which are interpolated
to voxels. Dice of the anterior and the posterior hippocampus on the last third, beside the same probe of the
untrained encoder and of the patches' pixels.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.data import CacheDataset
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.transforms import Compose, LoadImaged, SpatialPadd
from torch import Tensor
from training import train

from biovfm_monai.data.modalities import mri
from biovfm_monai.data.modalities.base import SlicesFirstd
from biovfm_monai.engines import fast_precision
from biovfm_monai.evaluation.voxels import token_maps, train_voxel_layers
from biovfm_monai.networks import ViT, spad_vit_tiny

BUNDLE = "mri_mae_pretraining"
METHODS = {"mae": None, "lejepa": "lejepa", "dinov2": "dinov2", "moco_v3": "moco_v3"}
VIEW, PATCH, WHOLE = (24, 24, 24), 4, (48, 64, 48)
ENCODER = {"embed_dim": 96, "depth": 4, "num_heads": 3}
CLASSES, STEPS, BATCH, RATE = 3, 600, 8, 0.05


def read(folder: Path) -> list[dict[str, Any]]:
    """Volumes in [-1, 1] and their label maps, 1 x D x H x W, padded to one size."""
    items = [{"image": str(path), "label": str(folder / "labels" / path.name)} for path in images_of(folder)]
    both = ("image", "label")
    transform = Compose(
        [LoadImaged(both, ensure_channel_first=True), SlicesFirstd(both), mri(("image",)), SpatialPadd(both, WHOLE)]
    )
    return [
        {"image": sample["image"].as_tensor().float() * 2 - 1, "label": sample["label"].as_tensor().long()}
        for sample in CacheDataset(items, transform, num_workers=1, progress=False)
    ]


def images_of(folder: Path) -> list[Path]:
    """The volumes' files, in an order of their own but always the same one."""
    paths = sorted((folder / "images").glob("*.nii*"))
    if not paths:
        raise SystemExit(f"no NIfTI file in {folder}/images: --data is the folder of MSD's Task04 (images/, labels/)")
    return [paths[place] for place in np.random.default_rng(0).permutation(len(paths))]


def maps_of(volumes: list[dict[str, Any]], encoder: ViT, raw: bool = False) -> Tensor:
    """Volumes x features x grid."""
    return torch.cat([token_maps(encoder.eval(), volume["image"][None], raw=raw) for volume in volumes]).float()


def dice(maps: Tensor, volumes: list[dict[str, Any]], first_test: int, seed: int) -> tuple[float, float]:
    """Train the linear layer on the first volumes, and score the others: anterior, posterior."""
    labels = torch.cat([volume["label"] for volume in volumes])
    (layer,) = train_voxel_layers([(maps[:first_test], labels[:first_test])], CLASSES, [RATE], STEPS, BATCH, seed)
    metric = DiceMetric(include_background=False, reduction="mean_batch")
    with torch.inference_mode():
        for row in range(first_test, len(maps)):
            found = layer(maps[row : row + 1], WHOLE).argmax(1, keepdim=True)
            metric(one_hot(found, CLASSES), one_hot(labels[None, row : row + 1], CLASSES))
    anterior, posterior = metric.aggregate().tolist()
    return anterior, posterior


def pretrained(method: str, paths: list[Path], seconds: float, seed: int) -> ViT:
    """An encoder that has seen the volumes without labels."""
    overrides: dict[str, Any] = {
        "datalist": [{"image": str(path), "modality": "mri"} for path in paths], "img_size": [*VIEW],
        "crop_size": [*VIEW], "patch_size": [PATCH] * 3, "batch_size": 16, "learning_rate": 0.001,
        "precision": fast_precision("cpu"),
        **{f"encoder#{name}": value for name, value in ENCODER.items()},
    }  # fmt: skip
    if method in ("lejepa", "dinov2"):
        overrides["views#local_view#img_size"] = [12, 12, 12]
    run = train(BUNDLE, METHODS[method], overrides, seconds, seed)
    print(f"{method}, seed {seed}: {run.steps} steps, {run.cpu_seconds:.0f} s, loss {run.loss:.3f}", flush=True)
    return cast(ViT, run.method.trained)


def main() -> None:
    """Print a row per run, then mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["mae"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    volumes = read(arguments.data)
    first_test = len(volumes) * 2 // 3
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        untrained, paths = spad_vit_tiny(1, VIEW, PATCH, **ENCODER), images_of(arguments.data)[:first_test]
        contenders = {"raw pixels": untrained, "random init": untrained} | {
            name: pretrained(name, paths, arguments.seconds, seed) for name in arguments.methods
        }
        for name, encoder in contenders.items():
            scores = dice(maps_of(volumes, encoder, name == "raw pixels"), volumes, first_test, seed)
            found.setdefault(name, []).append(scores)
            print(f"{name:12} seed {seed}: anterior {scores[0]:.3f}, posterior {scores[1]:.3f}", flush=True)
    for name, rows in found.items():
        shown = []
        for part, values in zip(("anterior", "posterior"), zip(*rows, strict=True), strict=True):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown.append(f"{part} {statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"{name:12} {', '.join(shown)}")


if __name__ == "__main__":
    main()
