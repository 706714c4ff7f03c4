"""k nearest neighbours on frozen features, as in DINOv2 (https://arxiv.org/abs/2304.07193), through scikit-learn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from biovfm_monai.checkpoints import build_encoder, load_encoder
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.embed import RawPixels, embed, preprocessing_of, transform_of
from biovfm_monai.evaluation.features import require_finite
from biovfm_monai.files import write_atomically, write_json
from biovfm_monai.networks import Embedder, ViT
from biovfm_monai.sheet import draw_sheet, middle_slice

__all__ = ["KNNAccuracy", "KNNProbe", "knn_accuracy", "knn_votes", "standardised"]

logger = logging.getLogger(__name__)

_TEMPERATURE = 0.07
_BATCH, _BLOCK = 64, 4096
_PICTURED, _NEIGHBOURS = 8, 5


def knn_accuracy(
    train: np.ndarray, train_labels: Sequence[Any], test: np.ndarray, test_labels: Sequence[Any], k: int = 20
) -> float:
    """Accuracy of a soft vote of the k most similar training images.

    Each feature is standardised by the training set, vectors are compared by cosine similarity s, and a neighbour's
    vote weighs exp(s / 0.07).

    Args:
        train, test: images x features.
        train_labels, test_labels: one class per image.
        k: neighbours; no more than there are training images.

    Raises:
        InputError: when there are fewer training images than k.
    """
    return float(np.mean(_classify(train, train_labels, test, k) == np.asarray(test_labels)))


def _classify(train: np.ndarray, train_labels: Sequence[Any], test: np.ndarray, k: int) -> np.ndarray:
    """The class with most votes, for each test image."""
    classes, truth = np.unique(train_labels, return_inverse=True)
    return np.asarray(classes[knn_votes(train, np.eye(len(classes))[truth], test, [k])[k].argmax(1)])


def knn_votes(train: np.ndarray, classes: np.ndarray, test: np.ndarray, ks: Sequence[int]) -> dict[int, np.ndarray]:
    """Shares of the soft votes of the k most similar training images, as in `knn_accuracy`, for several k at once.

    Neighbours are found a block of images at a time, so that memory does not grow with the product of both counts.

    Args:
        train, test: images x features.
        classes: of the training images, images x classes, 1 where an image is of a class or has a finding.
        ks: numbers of neighbours.

    Returns:
        k -> test images x classes.

    Raises:
        InputError: when there are fewer training images than the largest k.
    """
    most = max(ks)
    if len(train) < most:
        raise InputError(
            f"kNN with k {most} needs at least as many training images, got {len(train)}. "
            "Give a smaller one (--probe#k)."
        )
    prepare, search = _search(train, most)
    votes: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for block in np.array_split(test, max(1, -(-len(test) // _BLOCK))):
        distance, neighbours = search.kneighbors(prepare.transform(block))
        # Of vectors of unit length the squared distance is 2 - 2 x similarity.
        weight = np.exp((1 - distance**2 / 2) / _TEMPERATURE)
        for k, found in votes.items():
            found.append(np.einsum("nk,nkc->nc", weight[:, :k], classes[neighbours[:, :k]]))
            # Rounding may not make a share more than all.
            found[-1] = np.minimum(found[-1] / weight[:, :k].sum(1, keepdims=True), 1)
    return {k: np.concatenate(found) for k, found in votes.items()}


def standardised(train: np.ndarray) -> Pipeline:
    """What standardises each feature by the training images, and gives vectors unit length: products are cosines."""
    return make_pipeline(StandardScaler(), Normalizer()).fit(train)


def _search(train: np.ndarray, k: int) -> tuple[Pipeline, NearestNeighbors]:
    """What prepares features, and what finds the k training images whose prepared ones are nearest."""
    prepare = standardised(train)
    return prepare, NearestNeighbors(n_neighbors=k, algorithm="brute").fit(prepare.transform(train))


class KNNAccuracy:
    """kNN accuracy of an encoder in memory, such as one in training: a probe for `engines.CollapseHandler`.

    Args:
        train, test: datalist items with a "label"; prepared, they stay in memory.
        transform: item to what the encoder takes, such as `encoder_transform`.
        k: neighbours.

    Raises:
        InputError: when an item has no label, or, when called, there are fewer training images than k.
    """

    def __init__(
        self,
        train: Sequence[Mapping[str, Any]],
        test: Sequence[Mapping[str, Any]],
        transform: Callable[[Any], Any],
        k: int = 20,
    ) -> None:
        self.labels, self.k = [_labels(train), _labels(test)], k
        self.images = [CacheDataset(items, transform, num_workers=None, progress=False) for items in (train, test)]

    def __call__(self, encoder: ViT) -> float:
        """Accuracy with the encoder's embeddings, which are computed where it is."""
        device, batch_size = next(encoder.parameters()).device, _batch_size(self.images)
        train, test = (embed(Embedder(encoder), images, device, batch_size) for images in self.images)
        return knn_accuracy(train, self.labels[0], test, self.labels[1], self.k)


class KNNProbe:
    """Score an encoder file on a labelled task, beside two controls: the same network untrained, and raw pixels.

    Args:
        encoder_path: what is scored.
        train, test: datalist items with a "label".
        device: where the encoder runs.
        k: neighbours.
        seed: of the untrained network's weights.
        output_path: JSON file for the scores; None for no file.
        details_dir: folder for what `biovfm report` shows of the encoder: "embeddings", "labels" and "predicted"
            classes of the test images in `knn_images.npz`, and some of these images beside the training images nearest
            to them in `neighbours.png`, by number and class; None for no files.

    Raises:
        InputError: when an item has no label, or several; in `run`, when a feature is NaN or infinite.
    """

    def __init__(
        self,
        encoder_path: str | Path,
        train: Sequence[Mapping[str, Any]],
        test: Sequence[Mapping[str, Any]],
        device: torch.device | str = "cpu",
        k: int = 20,
        seed: int = 0,
        output_path: str | Path | None = None,
        details_dir: str | Path | None = None,
    ) -> None:
        self.labels = [_labels(train), _labels(test)]
        self.encoder_path = Path(encoder_path)
        self.train, self.test = train, test
        self.device, self.k, self.seed, self.output_path = device, k, seed, output_path
        self.details_dir = None if details_dir is None else Path(details_dir)

    def run(self) -> dict[str, Any]:
        """Accuracies of "encoder", "random_init" and "raw_pixels", "chance", and how many images and classes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            untrained = build_encoder(self.encoder_path)
        contenders = {
            "encoder": Embedder(load_encoder(self.encoder_path)),
            "random_init": Embedder(untrained),
            "raw_pixels": RawPixels(untrained.spatial_dims),
        }
        transform = transform_of(self.encoder_path)
        images = [CacheDataset(items, transform, num_workers=None, progress=False) for items in (self.train, self.test)]
        scores: dict[str, Any] = {}
        batch_size = _batch_size(images)
        for name, network in contenders.items():
            train, test = (embed(network, dataset, self.device, batch_size) for dataset in images)
            for features in (train, test):
                require_finite(features)
            predicted = _classify(train, self.labels[0], test, self.k)
            scores[name] = float(np.mean(predicted == np.asarray(self.labels[1])))
            if name == "encoder" and self.details_dir is not None:
                self._write_details(self.details_dir, train, test, predicted, images)
        counts = np.unique(self.labels[1], return_counts=True)[1]
        scores |= {
            "chance": float(counts.max() / counts.sum()),
            "classes": len(counts), "train_images": len(self.train), "test_images": len(self.test), "k": self.k,
        }  # fmt: skip
        for name in contenders:
            logger.info("kNN accuracy, %s: %.3f (chance %.3f)", name, scores[name], scores["chance"])
        if self.output_path is not None:
            write_json(self.output_path, scores)
        return scores

    def _write_details(
        self, folder: Path, train: np.ndarray, test: np.ndarray, predicted: np.ndarray, images: Sequence[CacheDataset]
    ) -> None:
        with write_atomically(folder / "knn_images.npz") as draft, draft.open("wb") as file:
            np.savez(file, embeddings=test, labels=np.array(self.labels[1], str), predicted=predicted.astype(str))
        asked = np.unique(np.linspace(0, len(test) - 1, min(_PICTURED, len(test))).round().astype(int))
        prepare, search = _search(train, min(_NEIGHBOURS, len(train)))
        rows = [
            [self._pictured(images, 1, number), *(self._pictured(images, 0, int(near)) for near in nearest)]
            for number, nearest in zip(
                asked.tolist(), search.kneighbors(prepare.transform(test[asked]), return_distance=False), strict=True
            )
        ]
        with write_atomically(folder / "neighbours.png") as draft:
            Image.fromarray(draw_sheet(rows, width=128)).save(draft, format="PNG")

    def _pictured(self, images: Sequence[CacheDataset], part: int, number: int) -> tuple[str, np.ndarray]:
        """An image in the values that people see, below its number and class."""
        image, known = torch.as_tensor(images[part][number]["image"]), preprocessing_of(self.encoder_path)
        image = image if image.ndim == 4 else image[:, None]
        mean, std = (torch.as_tensor(known[name], dtype=image.dtype).view(-1, 1, 1, 1) for name in ("mean", "std"))
        return f"{('train', 'test')[part]} {number}: {self.labels[part][number]}", middle_slice(image * std + mean)


def _labels(items: Sequence[Mapping[str, Any]]) -> list[Any]:
    for item in items:
        if item.get("label") is None:
            raise InputError(f'{item["image"]}: has no "label" in the datalist, and a probe needs one for each image.')
        if isinstance(item["label"], list):
            raise InputError(f"{item['image']}: has findings, and this probe needs one class. Take biovfm probe.")
    return [item["label"] for item in items]


def _batch_size(datasets: Sequence[CacheDataset]) -> int:
    """How many images are embedded at a time: one where they differ in size."""
    one_size = len({sample["image"].shape for dataset in datasets for sample in dataset}) == 1
    return _BATCH if one_size else 1
