"""Segmentation of few or many labelled volumes: our network, pretrained and not, beside MONAI's from scratch.

    python benchmarks/segmentation_3d.py --data FOLDER --out FOLDER [--seconds 60] [--pretraining 200] [--seeds 3]
        [--networks "ours, pretrained" UNETR ...] [--shares 1 0.25 0.05]

DATA is MSD's Task04, hippocampus MRI (http://medicaldecathlon.com): images/ and labels/, files of the same names. Of
192 volumes 112 are for training, 16 to choose by, and 64 to test, always the same ones. All networks train in fp32 on
one core for the same seconds of its time, with the same crops, changes, loss, schedule and batches, on 112, 28 or 6 of
the volumes; the smaller share is part of the larger one. A network's rate is the one of `RATES` with the best Dice on
the 16 after a third of the time on all 112, with a seed that is not used again. "ours, pretrained" begins with an
encoder that learned, in the seconds of --pretraining, from all 112 volumes without labels (MAE), and has layer decay of
0.75; ours have `UNETRDecoder`, since `LightDecoder` learns more slowly from random weights. Scores: Dice and Hausdorff
distance (95 %, mm) of the anterior and the posterior hippocampus; a distance is of the volumes in which the structure
was found at all, the others are counted. A run is a row of OUT/rows.csv; what stands there is not run again. At the
end: OUT/table.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from monai.networks import one_hot
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR
from monai.transforms import (
    Compose,
    LoadImaged,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandScaleIntensityd,
    RandSpatialCropd,
    ScaleIntensityRanged,
    SpatialPadd,
)
from monai.utils import set_determinism
from quality_3d import ENCODER, PATCH, images_of, pretrained
from runs import Shown, comparison_arguments, run_all, write_comparison
from torch import Tensor, nn
from training import fine_tune

from biovfm_monai.checkpoints import encoder_to_finetune, save_encoder
from biovfm_monai.data.modalities import mri
from biovfm_monai.data.modalities.base import SlicesFirstd
from biovfm_monai.networks import Segmenter, UNETRDecoder, spad_vit_tiny

CLASSES, CROP, BATCH = 3, (32, 64, 32), 2
RATES, SELECTION_SEED = (0.001, 0.003, 0.01), 100
TRAINING, CHOOSING = 112, 16
SHARES = (1.0, 0.25, 0.05)
KEY = ("network", "share", "seed", "rate", "seconds")
BOTH = ("image", "label")
SCORES = {
    "dice_anterior": Shown("Dice, anterior", 1, 3),
    "dice_posterior": Shown("posterior", 1, 3),
    "hd95_anterior": Shown("HD95, anterior (mm)", 1, 2),
    "hd95_posterior": Shown("posterior (mm)", 1, 2),
    "not_found": Shown("not found", 1, 0),
}


def ours(encoder_path: str | None = None) -> Segmenter:
    """A small U-Net's decoder on a SPAD-ViT, fresh or from an encoder file."""
    encoder = encoder_to_finetune(spad_vit_tiny(1, CROP, PATCH, **ENCODER), encoder_path)
    return Segmenter(encoder, CLASSES, UNETRDecoder(encoder, width=8))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ours, pretrained": ours,
    "ours, random init": ours,
    "UNETR": partial(UNETR, 1, CLASSES, CROP, feature_size=8, hidden_size=96, mlp_dim=384, num_heads=3),
    "SwinUNETR": partial(SwinUNETR, 1, CLASSES, feature_size=12),
    "DynUNet": partial(
        DynUNet, 3, 1, CLASSES, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[16, 32, 64, 128], norm_name="instance"
    ),
    "SegResNet": partial(SegResNet, 3, 8, 1, CLASSES),
}


@lru_cache
def volumes(folder: Path) -> list[dict[str, Any]]:
    """Volumes in [-1, 1] and their label maps, 1 x D x H x W, no smaller than a crop."""
    transform = Compose(
        [
            LoadImaged(BOTH, ensure_channel_first=True), SlicesFirstd(BOTH), mri(("image",)),
            ScaleIntensityRanged("image", 0, 1, -1, 1), SpatialPadd("image", CROP, value=-1),
            SpatialPadd("label", CROP),
        ]
    )  # fmt: skip
    items = [{"image": str(path), "label": str(folder / "labels" / path.name)} for path in images_of(folder)]
    return list(CacheDataset(items, transform, num_workers=1, progress=False))


def batches(items: list[dict[str, Any]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops of images and of label maps, changed, without end."""
    change = Compose(
        [
            RandAffined(
                BOTH, prob=0.5, rotate_range=[0.2] * 3, scale_range=[0.15] * 3, mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandSpatialCropd(BOTH, CROP, random_size=False), RandFlipd(BOTH, 0.5, 2),
            RandAdjustContrastd("image", 0.3, (0.7, 1.5)), RandScaleIntensityd("image", 0.2, 0.5),
        ]
    )  # fmt: skip
    change.set_random_state(seed)
    order = np.random.default_rng(seed)
    while True:
        chosen = [change(items[row]) for row in order.choice(len(items), BATCH, replace=len(items) < BATCH)]
        image, label = (torch.stack([sample[key].as_tensor() for sample in chosen]) for key in BOTH)
        yield image, label


@torch.inference_mode()
def scores(network: nn.Module, items: list[dict[str, Any]]) -> dict[str, float]:
    """Means over volumes of the scores of each structure."""
    network.eval()
    inferer = SlidingWindowInferer(CROP, sw_batch_size=4, overlap=0.25, mode="gaussian")
    dice = DiceMetric(include_background=False, reduction="mean_batch")
    distance = HausdorffDistanceMetric(include_background=False, percentile=95, reduction="none")
    for item in items:
        label = one_hot(item["label"].as_tensor()[None], CLASSES)
        found = one_hot(inferer(item["image"].as_tensor()[None], network).argmax(1, keepdim=True), CLASSES)
        dice(found, label)
        distance(found, label, spacing=[float(mm) for mm in item["image"].pixdim])
    far = distance.aggregate()
    parts = ("anterior", "posterior")
    return (
        {f"dice_{part}": float(value) for part, value in zip(parts, dice.aggregate(), strict=True)}
        | {f"hd95_{part}": float(far[:, n][far[:, n].isfinite()].mean()) for n, part in enumerate(parts)}
        | {"not_found": int((~far.isfinite()).sum())}
    )


def row_of(
    network: str, share: float, seed: int, rate: float, seconds: float, data: Path, encoder: str
) -> dict[str, Any]:
    """Train and score: one row of the result."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    items = volumes(data)
    set_determinism(seed)
    starts_from = (encoder,) if network == "ours, pretrained" else ()
    model = NETWORKS[network](*starts_from)
    about = {"network": network, "share": share, "seed": seed, "rate": rate, "seconds": seconds}
    about["parameters"] = sum(p.numel() for p in model.parameters())
    known = items[: max(round(share * TRAINING), 1)]
    decay, loss_of = 0.75 if starts_from else 1.0, DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    about["steps"] = fine_tune(model, batches(known, seed), loss_of, rate, decay, seconds)
    choosing = seed == SELECTION_SEED
    judged = items[TRAINING : TRAINING + CHOOSING] if choosing else items[TRAINING + CHOOSING :]
    return about | scores(model, judged)


def encoder_file(data: Path, out: Path, seed: int, seconds: float) -> str:
    """An encoder that saw the training volumes without labels, trained where it is not there yet."""
    path = out / f"encoder_{seed}.safetensors"
    if not path.exists():
        save_encoder(pretrained("mae", images_of(data)[:TRAINING], seconds, seed), path)
    return str(path)


def main() -> None:
    """Choose rates, train and score everything, and write the table."""
    parser = comparison_arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the labelled training volumes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = arguments.data
    seeds = [SELECTION_SEED, *range(arguments.seeds)]
    encoders = {seed: encoder_file(data, arguments.out, seed, arguments.pretraining) for seed in seeds}
    first = {"share": 1.0, "seed": SELECTION_SEED, "seconds": arguments.seconds / 3, "data": data}
    first["encoder"] = encoders[SELECTION_SEED]
    trials = [{**first, "network": name, "rate": rate} for name in arguments.networks for rate in RATES]
    tried = run_all(row_of, trials, KEY, arguments.out / "rates.csv", arguments.workers)
    tried["dice"] = tried.dice_anterior + tried.dice_posterior
    rates = {name: of.loc[of.dice.idxmax(), "rate"] for name, of in tried.groupby("network")}
    print("rates:", rates, flush=True)
    runs = [
        {"network": name, "share": share, "seed": seed, "rate": rates[name], "seconds": arguments.seconds}
        | {"data": data, "encoder": encoders[seed]}
        for seed in range(arguments.seeds)
        for share in arguments.shares
        for name in arguments.networks
    ]
    rows = run_all(row_of, runs, KEY, arguments.out / "rows.csv", arguments.workers)
    tables = {f"{share:.0%} of the labels": of for share, of in rows.groupby("share", sort=False)}
    write_comparison(tables, list(NETWORKS), SCORES, arguments.out / "table.md")


if __name__ == "__main__":
    main()
