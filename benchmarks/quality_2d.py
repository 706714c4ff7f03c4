"""What each method's encoder is worth after the same time on the same images: BloodMNIST, OrganAMNIST, MedNIST.

    python benchmarks/quality_2d.py --data FOLDER --out FOLDER [--seconds 60] [--seeds 3] [--workers 2]

DATA holds bloodmnist.npz, organamnist.npz (https://medmnist.com, 28 x 28 pixels) and a folder per class of MedNIST
(64 x 64) in mednist/. Images are packed once. Each method trains a ViT 96 wide and 4 deep without labels, by its
overlay on the bundle `biovfm_mae_pretraining`, in bf16 (fp32 on processors without) on one core, for the same seconds
of its time, on the training images; masked tokens take half of them for their tokenizer. Its rate is the one of `RATES`
that gives, in a third of the time, the best kNN accuracy on validation images of BloodMNIST with a seed that is not
used again. Frozen embeddings (mean of patch tokens) of the test images are then scored beside those of the untrained
encoder, of MONAI's `MaskedAutoEncoderViT` trained the same way (in fp32, since it fails in bf16), and the pixels
themselves. A run is a row of OUT/rows.csv; what stands there is not run again. At the end: OUT/table.md and
OUT/quality_2d.png.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from monai_mae import MonaiMAE
from runs import run_all
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F
from training import Trained, train

from biovfm_monai.data import Store, index, pack
from biovfm_monai.engines import fast_precision
from biovfm_monai.engines.collapse import effective_rank
from biovfm_monai.evaluation import knn_accuracy
from biovfm_monai.methods import SSLMethod
from biovfm_monai.networks import Embedder, ViT, vit_tiny

RATES = (0.0005, 0.002)
BUNDLE, BATCH, WIDTH, DEPTH, HEADS = "biovfm_mae_pretraining", 128, 96, 4, 3
# Published heads are for encoders eight times as wide. A teacher that keeps 0.992 of itself in a step, as published, is
# more than half its first weights after the 130 steps of DINOv2's minute.
METHODS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "MAE": (None, {}),
    "DINOv2": ("dinov2", {"method#hidden_dim": 512, "method#prototypes": 1024, "method#momentum": 0.9}),
    "LeJEPA": ("lejepa", {"method#projector_dims": [512, 512, 64], "method#num_slices": 256}),
    "MoCo v3": ("moco_v3", {"method#hidden_dim": 512}),
    "I-JEPA": ("ijepa", {}),
    "SimMIM": ("simmim", {}),
    "Barlow Twins": ("barlow_twins", {}),
    "VICReg": ("vicreg", {}),
    "masked tokens": ("masked_tokens", {"encoder#_target_": "biovfm_monai.networks.vit_tiny"}),
    "MONAI's MAE": (None, {}),
}
CONTROLS = ("MONAI's MAE", "random init", "raw pixels")
MOST_PROBED, STRENGTHS, SELECTION_SEED = 10_000, (0.01, 0.1, 1.0), 100
Embed = Callable[[Tensor], Tensor]
SCORES = {"auc": "linear-probe AUC", "knn": "kNN accuracy", "rank": "effective rank"}
KEY = ("task", "method", "seed", "rate", "seconds")
FIELDS = (*KEY, "steps", "images", "cpu_seconds", "loss", *SCORES)


class Task(NamedTuple):
    """Channels, size of images, of patches and of small views."""

    channels: int
    size: int
    patch: int
    local: int


TASKS = {"bloodmnist": Task(3, 28, 7, 14), "organamnist": Task(1, 28, 7, 14), "mednist": Task(1, 64, 16, 32)}


class PeersMAE(MonaiMAE, SSLMethod):
    """MONAI's network with the sizes of our encoder and of the bundle's decoder, as a method of the trainer."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.channels, (task.size, task.size), task.patch, (WIDTH, DEPTH, HEADS), (128, 2, 4))


def packed(data: Path, out: Path, name: str, settings: dict[str, Any] | None = None) -> Path:
    """The store of a task, packed where it is not ready; a folder per class is split here, seven to one to two.

    Args:
        data, out: folders of what there is, and for the store.
        name: of the task.
        settings: of `index`, for archives.
    """
    store, datalist = out / "stores" / name, out / "stores" / f"{name}.json"
    if not datalist.exists():
        datalist.parent.mkdir(parents=True, exist_ok=True)
        if (data / name).is_dir():
            # One modality for all, so that the views do not depend on the class.
            of_folders = {"/([^/]+)/[^/]+$": {"label": "\\1", "modality": "ct"}}
            index([data / name], datalist, settings=of_folders, validation=0.1, test=0.2)
        else:
            index([data / f"{name}.npz"], datalist, settings=settings)
    pack(datalist, store)
    return store


class InMemory(tuple[dict[str, Any], ...]):
    """Samples that a configuration takes as they are."""


@lru_cache
def in_memory(store: Path) -> InMemory:
    """The training images as they stand in the store."""
    of = Store(store)
    return InMemory(sample | {"image": sample["image"][...]} for sample in map(of.picture, range(len(of))))


@lru_cache
def images_of(store: Path, section: str) -> tuple[Tensor, np.ndarray]:
    """Images x C x H x W in [-1, 1], and their classes."""
    of = Store(store, section)
    images = torch.stack([of.picture(row)["image"][...][:, 0] for row in range(len(of))])
    labels = of.labels("label")
    return (images - 0.5) / 0.5, np.array(labels.names)[labels.codes]


@torch.inference_mode()
def embedded(network: Embed, images: Tensor) -> np.ndarray:
    """Images x features."""
    return torch.cat([network(part) for part in images.split(256)]).float().numpy()


def scores(network: Embed, store: Path) -> dict[str, float]:
    """The three scores of an embedding on the test images."""
    images = {section: images_of(store, section) for section in ("training", "validation", "test")}
    of = {section: embedded(network, image) for section, (image, _) in images.items()}
    with threadpool_limits(1):
        return scores_of(of, {section: label for section, (_, label) in images.items()})


def scores_of(of: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, float]:
    """The three scores of the test images' features, the probe's strength chosen on validation images."""
    chosen = np.random.default_rng(0).permutation(len(of["training"]))[:MOST_PROBED]
    probes = []
    for strength in STRENGTHS:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
        probe.fit(of["training"][chosen], labels["training"][chosen])
        probes.append((auc(probe, of["validation"], labels["validation"]), strength, probe))
    best = max(probes, key=lambda entry: entry[0])[-1]
    return {
        "auc": auc(best, of["test"], labels["test"]),
        "knn": knn_accuracy(of["training"], labels["training"], of["test"], labels["test"]),
        "rank": effective_rank(torch.from_numpy(of["test"][:2048])),
    }


def auc(probe: Any, features: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the area under the curve of that class against the others, as MedMNIST has it."""
    return float(roc_auc_score(labels, probe.predict_proba(features), multi_class="ovr", average="macro"))


def untrained(task: Task) -> ViT:
    """The encoder that all methods train."""
    size = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return vit_tiny(task.channels, (task.size, task.size), task.patch, **size)


def pretrained(method: str, name: str, store: Path, rate: float, seed: int, seconds: float) -> tuple[Trained, Embed]:
    """A method trained on a task, and its embedder."""
    task = TASKS[name]
    overlay, sizes = METHODS[method]
    data: dict[str, Any] = {
        "datalist": in_memory(store), "train#preprocessing": nn.Identity(), "in_channels": task.channels,
        "crop_size": [task.size] * 2, "batch_size": BATCH, "precision": fast_precision("cpu"),
    }  # fmt: skip
    if overlay == "masked_tokens":
        # Tokens are of 2, 4, 8, ... pixels: images become larger by as much.
        patch = 2 ** math.ceil(math.log2(task.patch))
        task, seconds = task._replace(size=task.size // task.patch * patch, patch=patch), seconds / 2
        data["img_size"] = [task.size] * 2
        strides = {"encoder#strides": [4, patch // 4]}
        tokenizer = train(BUNDLE, "spad_tokenizer", data | strides, seconds, seed).method.trained
        data["method#tokenizer"] = tokenizer
    overrides = data | {
        "img_size": [task.size] * 2, "patch_size": task.patch, "learning_rate": rate,
        "encoder#embed_dim": WIDTH, "encoder#depth": DEPTH, "encoder#num_heads": HEADS, **sizes,
    }  # fmt: skip
    if overlay in ("dinov2", "lejepa"):
        overrides["views#local_view#img_size"] = [task.local] * 2
    if method == "MONAI's MAE":
        overrides |= {"method": {"_target_": PeersMAE, "task": task}, "precision": "fp32"}
    run = train(BUNDLE, overlay, overrides, seconds, seed)
    trained = run.method.eval()
    if isinstance(trained, PeersMAE):
        return run, trained.embed
    embedder = Embedder(trained.trained).eval()
    return run, lambda images: embedder(F.interpolate(images, (task.size, task.size), mode="bilinear"))


def row_of(method: str, task: str, store: Path, rate: float, seed: int, seconds: float) -> dict[str, Any]:
    """Train, embed and score: one row of the result."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    about = dict.fromkeys(FIELDS) | {"task": task, "method": method, "seed": seed, "rate": rate, "seconds": seconds}
    if method == "raw pixels":
        return about | scores(nn.Flatten(), store)
    if method == "random init":
        torch.manual_seed(seed)
        return about | scores(Embedder(untrained(TASKS[task])).eval(), store)
    run, embedder = pretrained(method, task, store, rate, seed, seconds)
    about |= {"steps": run.steps, "images": run.images, "cpu_seconds": round(run.cpu_seconds, 1), "loss": run.loss}
    if seed == SELECTION_SEED:
        (train_images, train_labels), (images, labels) = (images_of(store, of) for of in ("training", "validation"))
        with threadpool_limits(1):
            return about | {
                "knn": knn_accuracy(embedded(embedder, train_images), train_labels, embedded(embedder, images), labels)
            }
    return about | scores(embedder, store)


def write_table(rows: pd.DataFrame, path: Path) -> None:
    """Mean and standard deviation over seeds of each score, a line per method, a table per task."""
    lines = []
    for name, of in rows.groupby("task", sort=False):
        lines += ["", f"| {name} | " + " | ".join(SCORES.values()) + " | images seen |", "|---|" + "---:|" * 4]
        for method in [*METHODS, *CONTROLS[1:]]:
            part = of[of.method == method]
            if part.empty:
                continue
            shown = []
            for score in SCORES:
                unit = (1, ".1f") if score == "rank" else (100, ".2f")
                mean, std = part[score].mean() * unit[0], part[score].std() * unit[0]
                shown.append(f"{mean:{unit[1]}}" + (f" ± {std:{unit[1]}}" if len(part) > 1 else ""))
            images = part["images"].mean()
            lines.append(f"| {method} | {' | '.join(shown)} | {'' if np.isnan(images) else f'{images:,.0f}'} |")
    path.write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    print("\n".join(lines))


def draw(rows: pd.DataFrame, path: Path) -> None:
    """A point per seed, a panel per task and score; controls hollow."""
    tasks = rows.task.unique()
    names = [name for name in (*METHODS, *CONTROLS[1:]) if name in set(rows.method)]
    figure = Figure(figsize=(4 * len(tasks), 7))
    axes = figure.subplots(2, len(tasks), sharey=True, squeeze=False)
    for column, name in enumerate(tasks):
        for line, score in enumerate(("auc", "knn")):
            axis = axes[line, column]
            for place, method in enumerate(names):
                values = 100 * rows[(rows.task == name) & (rows.method == method)][score]
                control = method in CONTROLS
                axis.scatter(
                    values, [place] * len(values), s=28, color="tab:blue", facecolors="none" if control else None
                )
            axis.set_title(f"{name}, {SCORES[score]} (%)", fontsize=10)
            axis.set_yticks(range(len(names)), names)
            axis.grid(alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Choose rates, train and score everything, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    stores = {name: packed(arguments.data, arguments.out, name) for name in {*arguments.tasks, "bloodmnist"}}
    first = {"task": "bloodmnist", "store": stores["bloodmnist"], "seed": SELECTION_SEED}
    first["seconds"] = arguments.seconds / 3
    trials = [{**first, "method": method, "rate": rate} for method in arguments.methods for rate in RATES]
    tried = run_all(row_of, trials, KEY, arguments.out / "rates.csv", arguments.workers)
    rates = {method: of.loc[of.knn.idxmax(), "rate"] for method, of in tried.groupby("method")}
    runs = [
        {"method": method, "task": name, "store": stores[name], "seed": seed, "seconds": arguments.seconds}
        | {"rate": rates.get(method, 0.0)}
        for name in arguments.tasks
        for seed in range(arguments.seeds)
        for method in [*arguments.methods, *CONTROLS[1:]]
        if not (method == "raw pixels" and seed)
    ]
    rows = run_all(row_of, runs, KEY, arguments.out / "rows.csv", arguments.workers)
    print("rates:", {method: rates[method] for method in arguments.methods})
    write_table(rows, arguments.out / "table.md")
    draw(rows, arguments.out / "quality_2d.png")


if __name__ == "__main__":
    main()
