"""One vector per image, from an encoder file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose

from biovfm_monai.checkpoints import encoder_info
from biovfm_monai.data import encoder_transform
from biovfm_monai.errors import InputError
from biovfm_monai.networks import Embedder, ViT

__all__ = ["embed", "transform_of"]


def transform_of(encoder_path: str | Path) -> Compose:
    """The transform that brings a datalist item to the input of the encoder in a file, as in its pretraining.

    Raises:
        InputError: when the file does not say how its images were prepared.
    """
    info = encoder_info(encoder_path)
    preprocessing, network = info["preprocessing"], info["network"]
    missing = {"mean", "std"} - set(preprocessing)
    if missing:
        raise InputError(f"{encoder_path}: its header does not say {' and '.join(sorted(missing))}. Save it with preprocessing=.")
    return encoder_transform(network["in_channels"], network["img_size"], preprocessing["mean"], preprocessing["std"])


def embed(
    encoder: ViT | None,
    items: Sequence[Mapping[str, Any]],
    transform: Callable[[Any], Any],
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> np.ndarray:
    """Embed images.

    Args:
        encoder: None gives the prepared pixels themselves, the control that every score should be compared with.
        items: datalist items.
        transform: as from `transform_of`; all images of a batch get one size.
        device: where the encoder runs.
        batch_size: images at a time.

    Returns:
        float32, images x embed_dim: the mean of the patch tokens (`Embedder`).
    """
    network = torch.nn.Flatten() if encoder is None else Embedder(encoder)
    network = network.to(device).eval()
    loader = DataLoader(Dataset(list(items), transform), batch_size=batch_size, collate_fn=_collate)
    with torch.inference_mode():
        vectors = [network(images.to(device)).cpu() for images in loader]
    return torch.cat(vectors).numpy()


def _collate(samples: list[dict[str, Any]]) -> torch.Tensor:
    images = [s["image"] for s in samples]
    plain = [image.as_tensor() if isinstance(image, MetaTensor) else image for image in images]
    if len({image.shape for image in plain}) == 1:
        return torch.stack(plain)
    raise InputError("images of one batch differ in their number of slices. Give a batch_size of 1.")
