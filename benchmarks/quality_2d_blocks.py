"""Why a method's frozen features are weak: the linear probe after each block, on OrganAMNIST.

    python benchmarks/quality_2d_blocks.py --data FOLDER --out FOLDER [--seconds 170] [--seeds 3] [--methods SimMIM]

DATA and OUT are those of quality_2d.py, and so are training, rates (read from docs/results) and the linear probe, of
the mean of the patch tokens after each block. Beside it stands the untrained encoder. A run is a row of
OUT/blocks.csv; what stands there is not run again.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from monai.utils import set_determinism
from quality_2d import TASKS, WIDTH, embedded, images_of, packed, pretrained, scores_of, untrained
from runs import run_all
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from biovfm_monai.evaluation.features import PooledFeatures
from biovfm_monai.networks import ViT

TASK, METHODS, CONTROL = "organamnist", ("MAE", "DINOv2", "SimMIM", "I-JEPA", "masked tokens"), "random init"
RATES = Path(__file__).parents[1] / "docs/results/quality_2d_rows.csv"


def of_blocks(encoder: ViT, store: Path) -> list[float]:
    """AUC of the linear probe after each block."""
    pooled = PooledFeatures(encoder).eval()
    images, labels = {}, {}
    for section in ("training", "validation", "test"):
        image, labels[section] = images_of(store, section)
        images[section] = embedded(lambda part: pooled(fitted(part, encoder)), image)[:, pooled.poolings["last"]]
    with threadpool_limits(1):
        return [
            scores_of({section: found[:, start : start + WIDTH] for section, found in images.items()}, labels)["auc"]
            for start in range(0, WIDTH * len(encoder.blocks), WIDTH)
        ]


def fitted(images: Tensor, encoder: ViT) -> Tensor:
    """Images of the size that the encoder takes."""
    return functional.interpolate(images, encoder.img_size, mode="bilinear")


def row_of(method: str, seed: int, rate: float, seconds: float, store: Path) -> dict[str, Any]:
    """Train, and probe after each block: one row of the result."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    set_determinism(seed)
    encoder = untrained(TASKS[TASK])
    if method != CONTROL:
        run, _ = pretrained(method, TASK, store, rate, seed, seconds)
        encoder = cast(ViT, run.method.trained)
    blocks = {f"block {number}": auc for number, auc in enumerate(of_blocks(encoder.eval(), store), 1)}
    return {"method": method, "seed": seed, "seconds": seconds, **blocks}


def main() -> None:
    """Train and probe all, and print a table of means and standard deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    store = packed(arguments.data, arguments.out, TASK)
    rates = pd.read_csv(RATES).groupby("method").rate.first()
    runs = [
        {"method": method, "seed": seed, "seconds": arguments.seconds} | {"rate": rates[method], "store": store}
        for seed in range(arguments.seeds)
        for method in (*arguments.methods, CONTROL)
    ]
    rows = run_all(row_of, runs, ("method", "seed", "seconds"), arguments.out / "blocks.csv", arguments.workers)
    scores = [name for name in rows if name.startswith("block")]
    of = 100 * rows.groupby("method", sort=False)[scores].agg(["mean", "std"])
    print(of.round(2).to_string())


if __name__ == "__main__":
    main()
