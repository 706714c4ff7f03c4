"""Why a method's frozen features are weak: scores after each block, and fine-tuned, on OrganAMNIST.

    python benchmarks/quality_2d_blocks.py --data FOLDER --out FOLDER [--seconds 170] [--tuning 60] [--seeds 3]

DATA and OUT are those of quality_2d.py, and so are training, rates (read from docs/results) and the linear probe. The
mean of the patch tokens after each block is probed; then the whole encoder is fine-tuned with all labels for the
seconds of --tuning, as in classification_2d.py. Beside it stands the untrained encoder, treated likewise. A run is a
row of OUT/blocks.csv; what stands there is not run again.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from classification_2d import batches
from monai.utils import set_determinism
from quality_2d import TASKS, WIDTH, embedded, images_of, packed, pretrained, scores_of, untrained
from runs import run_all
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional
from training import fine_tune

from biovfm_monai.evaluation.features import PooledFeatures
from biovfm_monai.networks import Classifier, ViT

TASK, METHODS, TUNING_RATE, LAYER_DECAY = "organamnist", ("MAE", "SimMIM", "I-JEPA", "masked tokens"), 0.001, 0.75
CONTROL = "random init"
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


def fine_tuned(encoder: ViT, store: Path, layer_decay: float, seconds: float) -> float:
    """AUC on the test images after all of the encoder learned from all labels."""
    images, labels = images_of(store, "training")
    names = np.unique(labels)
    network = Classifier(encoder, len(names))
    views = batches(images, torch.from_numpy(np.searchsorted(names, labels)))
    larger = ((fitted(part, encoder), classes) for part, classes in views)
    fine_tune(network, larger, functional.cross_entropy, TUNING_RATE, layer_decay, seconds)
    judged, truth = images_of(store, "test")
    logits = embedded(lambda part: network.eval()(fitted(part, encoder)), judged)
    return float(roc_auc_score(truth, torch.from_numpy(logits).softmax(1).numpy(), multi_class="ovr"))


def row_of(method: str, seed: int, rate: float, seconds: float, tuning: float, store: Path) -> dict[str, Any]:
    """Train, probe after each block and fine-tune: one row of the result."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    set_determinism(seed)
    encoder = untrained(TASKS[TASK])
    if method != CONTROL:
        run, _ = pretrained(method, TASK, store, rate, seed, seconds)
        encoder = cast(ViT, run.method.trained)
    blocks = {f"block {number}": auc for number, auc in enumerate(of_blocks(encoder.eval(), store), 1)}
    set_determinism(seed)
    tuned = fine_tuned(encoder, store, 1.0 if method == CONTROL else LAYER_DECAY, tuning)
    return {"method": method, "seed": seed, "seconds": seconds, "tuning": tuning, **blocks, "fine-tuned": tuned}


def main() -> None:
    """Train, probe and fine-tune all, and print a table of means and standard deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--tuning", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    store = packed(arguments.data, arguments.out, TASK)
    rates = pd.read_csv(RATES).groupby("method").rate.first()
    runs = [
        {"method": method, "seed": seed, "seconds": arguments.seconds, "tuning": arguments.tuning}
        | {"rate": rates[method], "store": store}
        for seed in range(arguments.seeds)
        for method in (*METHODS, CONTROL)
    ]
    rows = run_all(
        row_of, runs, ("method", "seed", "seconds", "tuning"), arguments.out / "blocks.csv", arguments.workers
    )
    scores = [name for name in rows if name.startswith("block") or name == "fine-tuned"]
    of = 100 * rows.groupby("method", sort=False)[scores].agg(["mean", "std"])
    print(of.round(2).to_string())


if __name__ == "__main__":
    main()
