"""What an encoder file is worth on a benchmark: probes on features made once, beside untrained and raw pixels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from torch import nn

from biovfm_monai import __version__
from biovfm_monai.checkpoints import build_encoder, encoder_info, load_encoder
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.attentive import attentive_probe
from biovfm_monai.evaluation.benchmarks.base import PARTS, Benchmark, subjects_of
from biovfm_monai.evaluation.embed import RawPixels, embed, transform_of
from biovfm_monai.evaluation.features import (
    PooledFeatures,
    Tokens,
    cached_features,
    cached_scores,
    check_features,
    describe_items,
    require_room,
)
from biovfm_monai.evaluation.knn import knn_votes
from biovfm_monai.evaluation.linear import Chosen, linear_probe, logistic_probe
from biovfm_monai.evaluation.metrics import TASKS, ranked_auc
from biovfm_monai.evaluation.retrieval import Retrieved, require_classes, retrieval_probe
from biovfm_monai.files import checksum_of, write_json

__all__ = ["HEADLINES", "Probe", "probe_features", "probe_listing", "require_probes"]

logger = logging.getLogger(__name__)

PROBES = ("knn", "linear", "logistic")
_FURTHER = ("retrieval", "attentive")
#: scores that are printed and go into tables of runs -> how they are called; controls are told by the first one there.
HEADLINES = {
    "auc": "AUC", "accuracy": "accuracy", "mean_average_precision": "mAP", "precision_at_1": "precision at 1",
    "precision_at_5": "at 5", "precision_at_10": "at 10", "dice": "Dice",
}  # fmt: skip
_NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
_PIXELS = 1024


def probe_features(
    features: Mapping[str, Sequence[np.ndarray]],
    labels: Sequence[np.ndarray],
    num_classes: int,
    task: str,
    probes: Sequence[str] = PROBES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Chosen | Retrieved]:
    """The best of each kind of probe, chosen on the validation part: by AUC, or for retrieval by its mean precision.

    Args:
        features: pooling -> training, validation and test part, images x features.
        labels: of these parts, as from `check_labels`.
        num_classes, task: as in `check_labels`.
        probes: of knn, linear, logistic and retrieval.
        seed, device: of the linear probe.

    Raises:
        InputError: as `require_probes`, or on attentive, which takes tokens.
    """
    require_probes(probes, task)
    found: dict[str, Chosen | Retrieved] = {}
    for probe in probes:
        if probe == "linear":
            found[probe] = linear_probe(features, labels, num_classes, task, seed=seed, device=device)
        elif probe == "logistic":
            found[probe] = logistic_probe(features, labels, task)
        elif probe == "retrieval":
            found[probe] = retrieval_probe(features, labels, task)
        elif probe == "knn":
            found[probe] = _neighbours(features, labels, num_classes, task)
        else:
            raise InputError("the attentive probe takes tokens, not vectors of images. Give them to attentive_probe.")
    return found


def require_probes(probes: Sequence[str], task: str) -> None:
    """Refuse what is no probe, or none of a task, before features are made for it.

    Raises:
        InputError: naming it, or when there is none.
    """
    known = (*PROBES, *_FURTHER)
    if not probes:
        raise InputError(f"no probe is named. Name some of {', '.join(known)}.")
    unknown = [probe for probe in probes if probe not in known]
    if unknown:
        raise InputError(f"there is no probe {unknown[0]!r}, but {', '.join(known)}. Correct it.")
    if "retrieval" in probes:
        require_classes(task)


def _neighbours(
    features: Mapping[str, Sequence[np.ndarray]], labels: Sequence[np.ndarray], num_classes: int, task: str
) -> Chosen:
    classes = labels[0].astype(float) if task == TASKS[3] else np.eye(num_classes)[labels[0]]
    ks = [k for k in _NEIGHBOURS if k <= len(classes)]
    found = []
    for pooling, (train, validation, test) in features.items():
        votes = knn_votes(train, classes, np.concatenate([validation, test]), ks)
        for k, likely in votes.items():
            score = ranked_auc(labels[1], likely[: len(validation)], task)
            found.append(Chosen({"pooling": pooling, "k": k}, score, likely[len(validation) :]))
    return max(found, key=lambda chosen: chosen.validation_auc)


class Probe:
    """Score an encoder file on a benchmark by several probes, beside the same network untrained, and raw pixels.

    Args:
        encoder_path: what is scored.
        benchmark: such as `benchmarks.medmnist` gives.
        probes: of knn, linear, logistic, retrieval and attentive.
        img_size: to which images are fitted; None for the encoder's own.
        cache_dir: folder where scores and features are kept, but no tokens; None to make them anew. Scores of the
            controls serve all encoders of one architecture and preprocessing.
        keep_features: keep them, which may take as much room as the images; else scores only.
        device: where the encoder, the linear and the attentive probe run.
        batch_size: images that are embedded at a time; more than one only where all come in one size.
        draws: of the bootstrap over patients.
        seed: of untrained weights, the linear and the attentive probe, and the bootstrap.
        output_path: JSON file for the scores; None for no file.

    Raises:
        InputError: when a label cannot be scored, or as `require_probes`; in `run`, when tokens do not fit into memory.
    """

    def __init__(
        self,
        encoder_path: str | Path,
        benchmark: Benchmark,
        probes: Sequence[str] = PROBES,
        img_size: Sequence[int] | None = None,
        cache_dir: str | Path | None = None,
        keep_features: bool = True,
        device: torch.device | str = "cpu",
        batch_size: int = 1,
        draws: int = 1000,
        seed: int = 0,
        output_path: str | Path | None = None,
    ) -> None:
        self.encoder_path, self.benchmark, self.labels = Path(encoder_path), benchmark, benchmark.labels()
        self.probes, self.img_size, self.cache_dir = (
            list(probes),
            None if img_size is None else list(img_size),
            cache_dir,
        )
        self.feature_dir = cache_dir if keep_features else None
        self.device, self.batch_size = device, batch_size
        self.draws, self.seed, self.output_path = draws, seed, output_path
        require_probes(self.probes, benchmark.task)

    def run(self) -> dict[str, Any]:
        """What the benchmark is, and "scores" by contender and probe, as `Chosen.scored` or `Retrieved.scored`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            untrained = build_encoder(self.encoder_path)
        encoder, pixels = load_encoder(self.encoder_path), RawPixels(untrained.spatial_dims, _PIXELS)
        # What makes one vector of an image, and what many.
        contenders: dict[str, tuple[nn.Module, Tokens]] = {
            "encoder": (PooledFeatures(encoder), Tokens(encoder)),
            "random_init": (PooledFeatures(untrained), Tokens(untrained)),
            "raw_pixels": (pixels, Tokens(untrained, raw=True)),
        }
        info = encoder_info(self.encoder_path)
        key = {part: info[part] for part in ("network", "preprocessing")}
        key |= {"version": __version__, "torch": torch.__version__, "img_size": self.img_size}
        own: dict[str, dict[str, Any]] = {
            "encoder": {"weights": checksum_of(self.encoder_path)},
            "random_init": {"init": self.seed},
        }
        transform = transform_of(self.encoder_path, self.img_size)
        data = {part: Dataset(list(self.benchmark.parts[part]), transform) for part in PARTS}
        if "attentive" in self.probes:
            for _, tokens in contenders.values():
                require_room(tokens, [*data.values()], self.device)
        described = {part: describe_items(self.benchmark.parts[part]) for part in PARTS}
        probing = {
            "probes": self.probes, "task": self.benchmark.task, "classes": self.benchmark.num_classes,
            "draws": self.draws, "seed": self.seed, "parts": described,
        }  # fmt: skip
        scores = {}
        for name, networks in contenders.items():
            of = {**key, "contender": name, **own.get(name, {})}
            compute = partial(
                self._scored, name, *networks, data, {part: {**of, "data": described[part]} for part in PARTS}
            )
            scores[name] = cached_scores(compute, {**of, **probing}, self.cache_dir)
        result = {"benchmark": self.benchmark.about(), "encoder": str(self.encoder_path), "scores": scores}
        for warning in self.benchmark.warnings:
            logger.warning("%s", warning)
        if self.output_path is not None:
            write_json(self.output_path, result)
        return result

    def _scored(
        self,
        name: str,
        pooled: nn.Module,
        tokens: Tokens,
        data: Mapping[str, Dataset],
        keys: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        benchmark, found = self.benchmark, {}
        chosen: dict[str, Chosen | Retrieved] = {}
        if of_vectors := [probe for probe in self.probes if probe != "attentive"]:
            chosen |= probe_features(
                self._features(pooled, data, keys), self.labels, benchmark.num_classes, benchmark.task, of_vectors,
                self.seed, self.device,
            )  # fmt: skip
        if "attentive" in self.probes:
            parts = [check_features(embed(tokens, images, self.device, self.batch_size)) for images in data.values()]
            chosen["attentive"] = attentive_probe(
                parts, self.labels, benchmark.num_classes, benchmark.task,
                tokens.encoder.embed_dim // tokens.encoder.head_dim, seed=self.seed, device=self.device,
            )  # fmt: skip
        subjects = subjects_of(benchmark.parts["test"])
        for probe, best in chosen.items():
            of = best.scored(self.labels[2], benchmark.task, subjects, self.draws, self.seed)
            found[probe] = of
            headline = next(score for score in HEADLINES if score in of)
            logger.info("%s, %s: %s %.4f %s", name, probe, HEADLINES[headline], of[headline], best.settings)
        return found

    def _features(
        self, network: nn.Module, data: Mapping[str, Dataset], keys: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, list[np.ndarray]]:
        """Each pooling's features of the parts."""
        parts = [
            cached_features(network, images, keys[part], self.feature_dir, self.device, self.batch_size)
            for part, images in data.items()
        ]
        poolings = getattr(network, "poolings", {"pixels": slice(None)})
        return {pooling: [part[:, columns] for part in parts] for pooling, columns in poolings.items()}


def probe_listing(result: Mapping[str, Any]) -> str:
    """What `Probe.run` returns, in words."""
    about = result["benchmark"]
    lines = [f"{about['name']}: {about['task']}, {about['classes']} classes, licence: {about['licence']}"]
    lines += [f"    {warning}" for warning in about["warnings"]]
    for contender, probes in result["scores"].items():
        for probe, of in probes.items():
            settings = ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in of["settings"].items()
            )
            first, *others = (score for score in HEADLINES if score in of)
            low, high = of["intervals"][first]
            shown = [f"{HEADLINES[first]} {of[first]:.4f} [{low:.4f}, {high:.4f}]"]
            shown += [f"{HEADLINES[score]} {of[score]:.4f}" for score in others]
            lines.append(f"{contender:<12} {probe:<9} {', '.join(shown)} ({settings})")
    return "\n".join(lines)
