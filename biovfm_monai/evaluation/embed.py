"""One vector per image, from an encoder file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate
from monai.transforms import Compose
from torch.nn import functional as F

from biovfm_monai.checkpoints import encoder_info
from biovfm_monai.data import encoder_transform
from biovfm_monai.errors import InputError

__all__ = ["RawPixels", "embed", "preprocessing_of", "transform_of"]


def transform_of(encoder_path: str | Path, img_size: Sequence[int] | None = None) -> Compose:
    """The transform that brings a datalist item to the input of the encoder in a file, whole and padded.

    Args:
        encoder_path: encoder file, or a tokenizer's.
        img_size: to which images are fitted; None for the encoder's own. A tokenizer has none.

    Raises:
        InputError: when the file does not say how its images were prepared, or no size is known.
    """
    network, preprocessing = encoder_info(encoder_path)["network"], preprocessing_of(encoder_path)
    img_size = img_size or network.get("img_size")
    if img_size is None:
        raise InputError(f"{encoder_path}: holds a tokenizer, which takes any size. Give --img_size.")
    return encoder_transform(
        network["in_channels"], img_size, preprocessing["mean"], preprocessing["std"],
        preprocessing.get("spacing"), presets=preprocessing.get("presets"),
    )  # fmt: skip


def preprocessing_of(path: str | Path) -> dict[str, Any]:
    """How images became the input of the encoder or tokenizer in a file: "mean", "std", and more where it is known.

    Raises:
        InputError: when the file does not say it.
    """
    preprocessing: dict[str, Any] = encoder_info(path)["preprocessing"]
    missing = {"mean", "std"} - set(preprocessing)
    if missing:
        raise InputError(
            f"{path}: its header does not say {' and '.join(sorted(missing))}. "
            "Convert it again with --mean and --std, or save it with preprocessing=."
        )
    return preprocessing


class RawPixels(torch.nn.Module):
    """The prepared pixels themselves, the control that every score should be compared with.

    Args:
        spatial_dims: of the encoder it stands beside; for 2D a volume's slices are averaged, as `Embedder` does.
        most: pixels of a channel; larger images are averaged over squares or cubes. None for all of them.
    """

    def __init__(self, spatial_dims: int, most: int | None = None) -> None:
        super().__init__()
        self.spatial_dims, self.most = spatial_dims, most

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map B x C x (D) x H x W to B x pixels."""
        image = image.mean(2) if self.spatial_dims == 2 and image.ndim == 5 else image
        if self.most is not None:
            side = round(self.most ** (1 / (image.ndim - 2)))
            image = F.interpolate(image, [min(side, n) for n in image.shape[2:]], mode="area")
        return image.flatten(1)


def embed(
    network: torch.nn.Module, images: Dataset, device: torch.device | str = "cpu", batch_size: int = 1
) -> np.ndarray:
    """Embed images.

    Args:
        network: image to vector, such as `Embedder` or `RawPixels`.
        images: samples with "image" as the encoder takes it, such as a MONAI dataset with `transform_of`.
        device: where the encoder runs.
        batch_size: images at a time; more than one only when all have the same number of slices.

    Returns:
        images x features, or whatever else the network makes of an image, in its precision.

    Raises:
        InputError: when it makes features of different numbers of them.
    """
    network = network.to(device).eval()
    loader = DataLoader(images, batch_size=batch_size, collate_fn=_stack)
    with torch.inference_mode():
        vectors = [network(batch.to(device)).cpu() for batch in loader]
    shapes = {tuple(vector.shape[1:]) for vector in vectors}
    if len(shapes) > 1:
        raise InputError(
            f"images have features of different shapes, {sorted(shapes)[0]} and {sorted(shapes)[1]}, as volumes of "
            "different depth or spacing. Give --img_size, or bring them to one size."
        )
    return torch.cat(vectors).numpy()


def _stack(samples: list[dict[str, Any]]) -> torch.Tensor:
    """A batch with the affines of its images, which tell an encoder of volumes how thick slices are."""
    images = [sample["image"] for sample in samples]
    return list_data_collate(images) if isinstance(images[0], MetaTensor) else torch.stack(images)
