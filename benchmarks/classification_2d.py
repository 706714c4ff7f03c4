"""Classification with all labels: our encoders fine-tuned, beside MONAI's ResNet-18 and ViT from scratch.

    python benchmarks/classification_2d.py --data FOLDER --out FOLDER [--seconds 60] [--pretraining 200] [--seeds 3]

DATA holds bloodmnist.npz, organamnist.npz, breastmnist.npz (https://medmnist.com, 28 x 28 pixels) and a folder per
class of chest radiographs in pneumonia/ (https://doi.org/10.17632/rscbjbr9sj; brought to 64 x 64 pixels, and split here
by file, since the names do not tell patients apart). All networks train in fp32 on one core for the same seconds of its
time, with the same views, loss, schedule and batches; a network's rate is the one of `RATES` with the best AUC on the
task's validation images after a third of the time, with a seed that is not used again. "ours, pretrained" begins with
an encoder that learned from the task's training images without labels (VICReg, the best of quality_2d.py) for the
seconds of --pretraining, which come on top. A run is a row of OUT/rows.csv; what stands there is not run again. At the
end: OUT/table.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import ViT, resnet18
from monai.utils import set_determinism
from PIL import Image
from quality_2d import (
    DEPTH,
    HEADS,
    SELECTION_SEED,
    TASKS,
    WIDTH,
    Task,
    embedded,
    images_of,
    packed,
    pretrained,
    untrained,
)
from runs import Shown, comparison_arguments, run_all, write_comparison
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from training import fine_tune

from biovfm_monai.checkpoints import encoder_to_finetune, save_encoder
from biovfm_monai.data import Policy, RandomResizedCrop
from biovfm_monai.networks import Classifier

TASKS["breastmnist"], TASKS["pneumonia"] = TASKS["organamnist"], Task(1, 64, 8, 32)
RATES, BATCH, METHOD, METHOD_RATE = (0.0003, 0.001, 0.003), 32, "VICReg", 0.002
SCORES = {"auc": Shown("AUC (%)", 100, 2), "accuracy": Shown("accuracy (%)", 100, 2)}
KEY = ("task", "network", "seed", "rate", "seconds")
# Cut to the beam, as ultrasound is, they would be of many sizes.
SETTINGS = {"breastmnist": {"": {"modality": "ct"}}}


class _Logits(nn.Module):
    """MONAI's ViT gives its hidden states, too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Map images to logits."""
        return self.network(image)[0]


def ours(task: Task, classes: int, encoder_path: str | None = None) -> nn.Module:
    """A linear layer on the mean token of the encoder that the methods train."""
    return Classifier(encoder_to_finetune(untrained(task), encoder_path), classes)


def monai_vit(task: Task, classes: int) -> nn.Module:
    """MONAI's, of the same size."""
    return _Logits(
        ViT(
            task.channels, (task.size,) * 2, (task.patch,) * 2, WIDTH, 4 * WIDTH, DEPTH, HEADS, classification=True,
            num_classes=classes, spatial_dims=2, post_activation=None,
        )
    )  # fmt: skip


def monai_resnet18(task: Task, classes: int) -> nn.Module:
    """MONAI's, with the first layer's stride that photographs get: without it a step takes five times as long."""
    return resnet18(spatial_dims=2, n_input_channels=task.channels, num_classes=classes, conv1_t_stride=2)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ours, pretrained": ours,
    "ours, random init": ours,
    "MONAI's ViT": monai_vit,
    "MONAI's ResNet-18": monai_resnet18,
}


def batches(images: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of images and their classes, without end."""
    views = RandomResizedCrop(images.shape[-2:], scale=(0.6, 1.0), policy=Policy(flip=0.0), mean=0.0, std=1.0)
    while True:
        rows = torch.randint(len(images), (BATCH,))
        chosen = images[rows][:, :, None]
        yield views.apply(chosen, views.draw(chosen)), classes[rows]


def row_of(
    task: str, network: str, seed: int, rate: float, seconds: float, store: Path, encoder: str
) -> dict[str, Any]:
    """Train and score: one row of the result."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    images, labels = images_of(store, "training")
    names = np.unique(labels)
    set_determinism(seed)
    starts_from = (encoder,) if network == "ours, pretrained" else ()
    model = NETWORKS[network](TASKS[task], len(names), *starts_from)
    about = {"task": task, "network": network, "seed": seed, "rate": rate, "seconds": seconds}
    about["parameters"] = sum(p.numel() for p in model.parameters())
    classes = torch.from_numpy(np.searchsorted(names, labels))
    decay = 0.75 if starts_from else 1.0
    about["steps"] = fine_tune(model, batches(images, classes), functional.cross_entropy, rate, decay, seconds)
    judged, truth = images_of(store, "validation" if seed == SELECTION_SEED else "test")
    chances = torch.from_numpy(embedded(model.eval(), judged)).softmax(1).numpy()
    two = len(names) == 2
    auc = roc_auc_score(truth == names[1], chances[:, 1]) if two else roc_auc_score(truth, chances, multi_class="ovr")
    return about | {"auc": float(auc), "accuracy": float(accuracy_score(truth, names[chances.argmax(1)]))}


def smaller(folder: Path, out: Path, size: int) -> None:
    """Copy images of a folder per class as grey squares of so many pixels, where it is not done yet."""
    for path in sorted(folder.glob("*/*.*")):
        copy = out / path.parent.name / f"{path.stem}.png"
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.convert("L").resize((size, size), Image.Resampling.LANCZOS).save(copy)


def encoder_file(task: str, store: Path, out: Path, seed: int, seconds: float) -> str:
    """An encoder that saw the training images without labels, trained where it is not there yet."""
    path = out / f"{task}_{seed}.safetensors"
    if not path.exists():
        run, _ = pretrained(METHOD, task, store, METHOD_RATE, seed, seconds)
        save_encoder(run.method.trained, path)
    return str(path)


def main() -> None:
    """Choose rates, train and score everything, and write the table."""
    parser = comparison_arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["bloodmnist", "organamnist", "breastmnist", "pneumonia"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs, trials = [], []
    for task in arguments.tasks:
        data = arguments.data
        if (data / task).is_dir():
            smaller(data / task, arguments.out / "smaller" / task, TASKS[task].size)
            data = arguments.out / "smaller"
        store = packed(data, arguments.out, task, SETTINGS.get(task))
        for seed in (SELECTION_SEED, *range(arguments.seeds)):
            encoder = encoder_file(task, store, arguments.out, seed, arguments.pretraining)
            for network in NETWORKS:
                run = {"task": task, "network": network, "seed": seed, "store": store, "encoder": encoder}
                if seed == SELECTION_SEED:
                    trials += [{**run, "rate": rate, "seconds": arguments.seconds / 3} for rate in RATES]
                else:
                    runs.append({**run, "seconds": arguments.seconds})
    tried = run_all(row_of, trials, KEY, arguments.out / "rates.csv", arguments.workers)
    best = {key: of.loc[of.auc.idxmax(), "rate"] for key, of in tried.groupby(["task", "network"])}
    runs = [{**run, "rate": best[run["task"], run["network"]]} for run in runs]
    print("rates:", best, flush=True)
    rows = run_all(row_of, runs, KEY, arguments.out / "rows.csv", arguments.workers)
    write_comparison(dict(iter(rows.groupby("task", sort=False))), list(NETWORKS), SCORES, arguments.out / "table.md")


if __name__ == "__main__":
    main()
