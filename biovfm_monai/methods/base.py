"""The contract of a self-supervised method: a network that returns its own loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biovfm_monai.draws import random_keys
from biovfm_monai.errors import InputError
from biovfm_monai.networks import PatchEmbed, SoftTokenizer, ViT

__all__ = ["SSLMethod", "images_of_batch", "keep_finite", "keys_of_batch", "small_views"]

_VIEWS = {"image": "RandomResizedCrop", "global_crops": "MultiCrop", "local_crops": "MultiCrop"}


class SSLMethod(nn.Module, ABC):
    """A network that learns an encoder without labels; it knows no optimizer, device, configuration or rank."""

    encoder: ViT | SoftTokenizer

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the scalar "loss" of a batch, and whatever else is worth logging or looking at.

        Args:
            batch: "image", B x C x (D) x H x W; or, for methods that compare views of an image, "global_crops" and
                "local_crops", each views x B x C x (D) x H x W. Where known also "anisotropy", the degree that all
                images share, as one number or B equal ones, and "key", of each image's random numbers (`uniform`).
        """

    @property
    def trained(self) -> ViT | SoftTokenizer:
        """The encoder to keep: this one, or a teacher's where that is better."""
        return self.encoder

    def after_step(self, progress: float) -> None:
        """Update what follows the optimizer (a teacher, a temperature); progress runs from 0 to 1. Nothing here."""


@torch.no_grad()
def keep_finite(state: Tensor, new: Tensor) -> None:
    """Put new numbers into a state, unless one is NaN or infinite: of a batch that is left out nothing may stay."""
    state.copy_(torch.where(new.isfinite().all(), new, state))


def images_of_batch(batch: Mapping[str, Any], name: str, views: int | None = None) -> Tensor:
    """The images or crops that a batch has under a name, and, where that is asked, just so many views of an image.

    Raises:
        InputError: when it has none or another number, naming the view that makes them.
    """
    if name not in batch:
        raise InputError(f'the batch has no "{name}". Let biovfm_monai.data.{_VIEWS[name]} make its views.')
    if views is not None and len(batch[name]) != views:
        raise InputError(
            f'the method compares {views} views of an image, the batch has {len(batch[name])} "{name}". '
            f"Let biovfm_monai.data.{_VIEWS[name]} make {views}."
        )
    return batch[name]


def small_views(batch: Mapping[str, Any], patch_embed: PatchEmbed, degree: int | None) -> Tensor | None:
    """The local crops of a batch, views x B x C x (D) x H x W; None where it has none.

    Raises:
        InputError: when they do not divide into patches, which are the shallower the thicker the slices are.
    """
    local: Tensor | None = batch.get("local_crops")
    if local is None:
        return None
    size = list(local.shape[3:])
    patch = list(patch_embed.stride(degree or 0)[-len(size) :])
    if any(n % side for n, side in zip(size, patch, strict=True)):
        raise InputError(
            f"small views of size {size} do not divide into patches of {patch}. Give --views::local_view::img_size in "
            f"multiples of {list(patch_embed.patch_size[-len(size) :])}."
        )
    return local


def keys_of_batch(batch: Mapping[str, Any], count: int, device: torch.device) -> Tensor:
    """The keys of a batch's random numbers, or random ones where it has none."""
    return batch["key"].to(device) if "key" in batch else random_keys(count, device)
