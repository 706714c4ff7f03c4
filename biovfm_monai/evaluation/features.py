"""Several pooled vectors per image from one pass of a frozen encoder, kept on disk for every probe that follows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from monai.data import Dataset
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.utils.data import Subset

from biovfm_monai.engines import machine_memory
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.embed import embed
from biovfm_monai.files import version_of, write_atomically, write_json
from biovfm_monai.networks import ViT
from biovfm_monai.networks.heads import as_slices

__all__ = [
    "PooledFeatures", "Tokens", "cached_features", "cached_scores", "check_features", "describe_items",
    "require_finite", "require_room",
]  # fmt: skip

logger = logging.getLogger(__name__)

_LAST = 4
T = TypeVar("T")


class PooledFeatures(nn.Module):
    """Four poolings of an encoder's tokens from one pass, as DINOv2's linear probe (https://arxiv.org/abs/2304.07193).

    They are "mean" of the patches, "last" (means of the last four blocks, one after the other), and "token" and
    "token+mean", or without a class token "max" and "mean+max". Volumes of a 2D encoder are read as `Embedder` does.

    Args:
        encoder: maps an image to tokens, prefix tokens first.
    """

    def __init__(self, encoder: ViT) -> None:
        super().__init__()
        self.encoder = encoder
        depth, width = len(encoder.blocks), encoder.embed_dim
        self.taps = list(range(max(depth - _LAST, 0), depth))
        extra, both = ("max", "mean+max") if encoder.cls_token is None else ("token", "token+mean")
        ends = [0, width, 2 * width, (2 + len(self.taps)) * width]
        #: name of a pooling -> its columns.
        self.poolings = {
            extra: slice(*ends[:2]), "mean": slice(*ends[1:3]), both: slice(0, ends[2]), "last": slice(*ends[2:]),
        }  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """Map B x C x (D) x H x W to B x features; a pooling's are `features[:, poolings[name]]`."""
        encoder = self.encoder
        image, slices = as_slices(image, encoder.spatial_dims)
        x, angles = encoder.embed(encoder.patchify(image))
        tokens, tapped = encoder.encode(x, angles, taps=self.taps)
        patches = tokens[:, encoder.num_prefix_tokens :]
        first = patches.amax(1) if encoder.cls_token is None else tokens[:, 0]
        last = [encoder.norm(x)[:, encoder.num_prefix_tokens :].mean(1) for x in tapped]
        return torch.cat([first, patches.mean(1), *last], 1).unflatten(0, (-1, slices)).mean(1)


class Tokens(nn.Module):
    """All tokens of an image in half precision; of a volume that a 2D encoder reads those of one slice after another.

    Args:
        encoder: maps an image to tokens.
        raw: give the voxels of its patches instead, which its tokens should be compared with.
    """

    def __init__(self, encoder: ViT, raw: bool = False) -> None:
        super().__init__()
        self.encoder, self.raw = encoder, raw

    def forward(self, image: Tensor) -> Tensor:
        """Map B x C x (D) x H x W to B x tokens x embed_dim, or if `raw` B x patches x voxels, float16."""
        image, slices = as_slices(image, self.encoder.spatial_dims)
        found = self.encoder.patchify(image).voxels if self.raw else self.encoder(image)
        return found.half().unflatten(0, (-1, slices)).flatten(1, 2)


def require_room(network: nn.Module, parts: Sequence[Dataset], device: torch.device | str = "cpu") -> None:
    """Refuse tokens that would not fit into memory, by those of one image.

    Args:
        network: image to tokens.
        parts: images, the tokens of all of which are held at once; while they are put together, 2.5 times of it.
        device: where the network runs.

    Raises:
        InputError: with what they would need.
    """
    one, images = embed(network, Subset(parts[0], [0]), device), sum(map(len, parts))
    needed, there = 2.5 * images * one.nbytes / 2**30, machine_memory()
    if needed > there:
        raise InputError(
            f"{one.shape[1]:,} tokens of {images:,} images need {needed:.3g} GiB for the attentive probe, and the "
            f"machine has {there:.3g}. Give a smaller --img_size or fewer images, or leave the probe out."
        )


def describe_items(items: Sequence[Mapping[str, Any]]) -> str:
    """A hash of datalist items and of the sizes and times of their files, so that changed data are read anew."""
    digest, seen = hashlib.sha256(), set[str]()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
        for name in [item["image"]] if isinstance(item["image"], str) else item["image"]:
            path = Path(str(name).partition("::")[0])
            if str(path) not in seen and path.exists():
                seen.add(str(path))
                digest.update(repr(version_of(path)).encode())
    return digest.hexdigest()


def cached_features(
    network: nn.Module,
    images: Dataset,
    key: Mapping[str, Any],
    folder: str | Path | None,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
) -> np.ndarray:
    """Vectors of images, computed once for each key.

    Args:
        network: image to vector, such as `PooledFeatures`, `Embedder` or `RawPixels`.
        images: samples with "image" as the encoder takes it.
        key: what the vectors depend on: hashes of the encoder file and of the data, the part's name.
        folder: where they are kept, as a .safetensors file named by the key's hash; None to compute them anew.
        device, batch_size: as in `embed`.

    Returns:
        As `embed`.

    Raises:
        InputError: as `embed`, or when a feature is NaN or infinite, or all images have the same ones.
    """
    if folder is None:
        return check_features(embed(network, images, device, batch_size))
    written, path = _kept(key, folder, "safetensors")

    def read() -> np.ndarray | None:
        with safe_open(path, "np") as file:
            known = (file.metadata() or {}).get("key") == written
            return np.asarray(file.get_tensor("features")) if known else None

    def make() -> np.ndarray:
        features = check_features(embed(network, images, device, batch_size))
        with write_atomically(path) as draft:
            save_file({"features": features}, draft, {"key": written})
        return features

    return _kept_or_made(path, read, make)


def cached_scores(
    compute: Callable[[], dict[str, Any]], key: Mapping[str, Any], folder: str | Path | None
) -> dict[str, Any]:
    """Scores, computed once for each key.

    Args:
        compute: makes them.
        key: what they depend on: as of `cached_features`, and the probes.
        folder: where they are kept, as a .json file named by the key's hash; None to compute them anew.
    """
    if folder is None:
        return compute()
    written, path = _kept(key, folder, "json")

    def read() -> dict[str, Any] | None:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return dict(kept["scores"]) if kept["key"] == written else None

    def make() -> dict[str, Any]:
        scores = compute()
        write_json(path, {"key": written, "scores": scores})
        return scores

    return _kept_or_made(path, read, make)


def _kept_or_made(path: Path, read: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What a file holds, or else what is made; processes that need it at the same time make it once."""
    found = read() if path.exists() else None
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.stem}.lock")
        with FileLock(lock):
            try:
                found = read() if path.exists() else None
                if found is None:
                    return make()
            finally:
                # Windows keeps a file that is open.
                with suppress(OSError):
                    lock.unlink()
    logger.info("%s: what an earlier run has kept is used", path)
    return found


def _kept(key: Mapping[str, Any], folder: str | Path, ending: str) -> tuple[str, Path]:
    """A key in full, and the file for what belongs to it."""
    written = json.dumps(dict(key), sort_keys=True)
    return written, Path(folder) / f"{hashlib.sha256(written.encode()).hexdigest()[:32]}.{ending}"


def require_finite(features: np.ndarray) -> None:
    """Refuse features, images first, of which one is NaN or infinite.

    Raises:
        InputError: with the number of images, and that of the first.
    """
    broken = ~np.isfinite(features).all(tuple(range(1, features.ndim)))
    if broken.any():
        raise InputError(
            f"features of {broken.sum()} of {len(features)} images are NaN or infinite, first number "
            f"{broken.argmax()}. Look for such values in the encoder's weights, or in that image."
        )


def check_features(features: np.ndarray) -> np.ndarray:
    """Features as they are, once it is known that a probe can use them.

    Raises:
        InputError: when one is NaN or infinite, or all images have the same ones.
    """
    require_finite(features)
    if (features == features[:1]).all():
        raise InputError("all images have the same features: the encoder has collapsed, or the images are all alike.")
    return features
