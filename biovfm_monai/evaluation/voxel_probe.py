"""What an encoder file is worth for segmentation without fine-tuning, beside the untrained network and raw voxels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.transforms import Compose, DivisiblePad, Lambdad, ResampleToMatchd
from torch import Tensor

from biovfm_monai.anisotropy import anisotropy_of
from biovfm_monai.checkpoints import build_encoder, load_encoder
from biovfm_monai.data import MatchChannelsd, PreparedImaged, ReadLabeld, load_segmentation, read_image
from biovfm_monai.engines import machine_memory
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.benchmarks.base import PARTS, require_apart, subjects_of
from biovfm_monai.evaluation.embed import preprocessing_of
from biovfm_monai.evaluation.metrics import bootstrap_means
from biovfm_monai.evaluation.voxels import OUTSIDE, RATES, VoxelLayer, token_maps, train_voxel_layers
from biovfm_monai.files import write_json
from biovfm_monai.networks import ViT

__all__ = ["VoxelProbe"]

logger = logging.getLogger(__name__)

_AT_ONCE = 8


@dataclass(frozen=True)
class _Cut:
    """An image in windows: token maps of each contender, N x C x grid, and classes, N x D x H x W."""

    maps: Mapping[str, Tensor]
    classes: Tensor

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.classes.nbytes + sum(maps.nbytes for maps in self.maps.values())


class VoxelProbe:
    """Score what an encoder's tokens say of voxels, beside the same network untrained, and the voxels of its patches.

    Images are prepared as the encoder's file says, and cut into windows of its size. One linear layer on the tokens is
    trained on the part "training" for each of four learning rates; the one with the best Dice on "validation" is scored
    on "test". Dice is that of MONAI's `DiceMetric` over all voxels of an image, structures that it lacks left out.

    Args:
        encoder_path: what is scored.
        dataset_dir: as in `load_segmentation`: MSD, BTCV, AMOS, CHAOS as folders of images and labels, or a datalist.
        modality: whose preset prepares the images.
        steps, seed: as in `train_voxel_layers`; the seed is of untrained weights and the intervals, too.
        device: where the encoder and the layers run.
        draws: of the bootstrap over patients.
        output_path: JSON file for the scores; None for no file.

    Raises:
        InputError: as `load_segmentation`, or when parts share a subject or an image; in `run`, as `PreparedImaged` and
            `ReadLabeld`, when all label maps of a part are empty, a token is not finite, or they do not fit into
            memory.
    """

    def __init__(
        self,
        encoder_path: str | Path,
        dataset_dir: str | Path,
        modality: str,
        steps: int = 600,
        seed: int = 0,
        device: torch.device | str = "cpu",
        draws: int = 1000,
        output_path: str | Path | None = None,
    ) -> None:
        self.encoder_path, self.dataset_dir, self.modality = Path(encoder_path), Path(dataset_dir), modality
        self.steps, self.seed, self.device = steps, seed, torch.device(device)
        self.draws, self.output_path = draws, output_path
        self.items = {part: load_segmentation(dataset_dir, part) for part in PARTS}
        require_apart(dataset_dir, self.items)

    def run(self) -> dict[str, Any]:
        """What the benchmark is, and "scores" by contender: "dice" with its interval, and that of each structure."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            untrained = build_encoder(self.encoder_path)
        encoders = {"encoder": load_encoder(self.encoder_path), "random_init": untrained, "raw_pixels": untrained}
        encoders = {name: encoder.to(self.device).eval() for name, encoder in encoders.items()}
        values = self._values()
        cuts = self._cut_all(encoders, values)
        for part, of in cuts.items():
            if not any(((cut.classes > 0) & (cut.classes != OUTSIDE)).any() for cut in of):
                raise InputError(f"{self.dataset_dir}: all label maps of the {part} part are empty. Correct them.")
        scores = {name: {"voxels": self._scored(name, cuts, values)} for name in encoders}
        about = {
            "name": self.dataset_dir.name, "task": "segmentation", "classes": len(values),
            "images": {part: len(items) for part, items in self.items.items()}, "licence": "its own",
            "citation": "its own", "warnings": [],
        }  # fmt: skip
        result = {"benchmark": about, "encoder": str(self.encoder_path), "scores": scores}
        if self.output_path is not None:
            write_json(self.output_path, result)
        return result

    def _values(self) -> list[int]:
        """The numbers that stand for classes in the training part's label maps, background first."""
        found = {0}
        for item in self.items["training"]:
            for path in [item["label"]] if isinstance(item["label"], str) else item["label"]:
                found |= set(read_image(path).unique().int().tolist())
        if len(found) == 1:
            raise InputError(f"{self.dataset_dir}: all label maps of the training part are empty. Correct them.")
        return sorted(found)

    def _cut_all(self, encoders: Mapping[str, ViT], values: Sequence[int]) -> dict[str, list[_Cut]]:
        info, first = preprocessing_of(self.encoder_path), read_image(self.items["training"][0]["image"])
        flat = first.ndim == 3
        transform = Compose(
            [
                PreparedImaged(
                    "image", self.modality, len(first), info.get("spacing"), info.get("presets"), 0.0, 1.0,
                    2 if flat else 3,
                ),
                MatchChannelsd("image", encoders["encoder"].in_channels),
                ReadLabeld("label", len(values), needed=False, values=values),
                ResampleToMatchd("label", key_dst="image", mode="nearest", padding_mode="zeros"),
                Lambdad("image", lambda image: (image - _of_channels(info["mean"])) / _of_channels(info["std"])),
            ]
        )  # fmt: skip
        found: dict[str, list[_Cut]] = {part: [] for part in PARTS}
        taken, there = 0, 2**30 * machine_memory()
        for part, items in self.items.items():
            for item in items:
                found[part].append(_cut(transform(item), encoders, flat, self.device))
                for name, maps in found[part][-1].maps.items():
                    if not maps.isfinite().all():
                        raise InputError(
                            f"{item['image']}: tokens of {name} are NaN or infinite. Look for such values in the "
                            "encoder's weights, or in that image."
                        )
                taken += found[part][-1].nbytes
                if taken > there:
                    raise InputError(
                        f"{item['image']}: up to it, tokens take {taken / 2**30:.3g} GiB, and the machine has no more. "
                        "Give fewer images."
                    )
        return found

    def _scored(self, name: str, cuts: Mapping[str, Sequence[_Cut]], values: Sequence[int]) -> dict[str, Any]:
        by_size: dict[Any, list[_Cut]] = {}
        for cut in cuts["training"]:
            by_size.setdefault((cut.maps[name].shape[1:], cut.classes.shape[1:]), []).append(cut)
        windows = [
            (torch.cat([cut.maps[name] for cut in of]), torch.cat([cut.classes for cut in of]))
            for of in by_size.values()
        ]
        layers = train_voxel_layers(windows, len(values), steps=self.steps, seed=self.seed)
        means = [float(np.nanmean(_dice(layer, name, cuts["validation"]))) for layer in layers]
        best = int(np.argmax(means))
        dice = _dice(layers[best], name, cuts["test"])
        known = np.isfinite(dice).any(1)
        by_image = {"dice": np.nanmean(dice[known], 1)}
        kept = [subject for subject, has in zip(subjects_of(self.items["test"]), known, strict=True) if has]
        found = {
            "dice": float(by_image["dice"].mean()),
            "structures": {
                str(value): float(np.nanmean(of)) for value, of in zip(values[1:], dice.T, strict=True)
                if np.isfinite(of).any()
            },
            "intervals": bootstrap_means(by_image, kept, self.draws, self.seed),
            "settings": {"rate": RATES[best]}, "validation_dice": means[best],
        }  # fmt: skip
        logger.info("%s: Dice %.4f, rate %g", name, found["dice"], RATES[best])
        return found


def _of_channels(values: Any) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def _cut(sample: Mapping[str, Any], encoders: Mapping[str, ViT], flat: bool, device: torch.device) -> _Cut:
    """Windows of the encoder's size; at the end of an axis with the image's edge repeated, of no class."""
    image, encoder = sample["image"], encoders["encoder"]
    spacing, depth = image.pixdim.tolist(), 1
    if not flat and encoder.spatial_dims == 3:
        step = encoder.patch_embed.stride(anisotropy_of(spacing))[0]
        depth = min(encoder.img_size[0], -(-image.shape[1] // step) * step)
    size = (depth, *encoder.img_size[-2:])
    image = _windows(DivisiblePad(size, mode="edge", method="end")(image), size).float()
    classes = _windows(DivisiblePad(size, value=OUTSIDE, method="end")(sample["label"]), size)
    image = image[:, :, 0] if flat else image
    maps = {
        name: torch.cat(
            [token_maps(of, part.to(device), spacing, name == "raw_pixels").half() for part in image.split(_AT_ONCE)]
        )
        for name, of in encoders.items()
    }
    return _Cut(maps, classes[:, 0].byte().to(device))


def _windows(image: MetaTensor, size: Sequence[int]) -> Tensor:
    """C x D x H x W, of multiples of a size, to N x C x size."""
    parts = image.as_tensor()
    for axis, length in enumerate(size, 1):
        parts = parts.unfold(axis, length, length)
    return parts.permute(1, 2, 3, 0, 4, 5, 6).flatten(0, 2)


@torch.inference_mode()
def _dice(layer: VoxelLayer, name: str, cuts: Sequence[_Cut]) -> np.ndarray:
    """Images x structures; NaN where an image has none of a structure."""
    metric, classes = DiceMetric(include_background=False, reduction="none"), layer.linear.out_channels
    for cut in cuts:
        inside = cut.classes != OUTSIDE
        found = [
            layer(maps, cut.classes.shape[1:]).argmax(1)[own]
            for maps, own in zip(cut.maps[name].split(_AT_ONCE), inside.split(_AT_ONCE), strict=True)
        ]
        said, truth = torch.cat(found), cut.classes[inside].long()
        metric(one_hot(said[None, None], classes), one_hot(truth[None, None], classes))
    return metric.aggregate().cpu().numpy()
