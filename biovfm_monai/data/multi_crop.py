"""Several views of each image of a batch, large and small, made on its device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.data.views import RandomResizedCrop
from biovfm_monai.draws import forked, random_keys
from biovfm_monai.errors import InputError, require_within

__all__ = ["MultiCrop"]


class MultiCrop:
    """Several views of each image: large ones that teach, and small ones (https://arxiv.org/abs/2006.09882).

    An instance serves as the trainer's `prepare_batch`; all views are cut from the batch's images, which are read once.

    Args:
        global_views: how each large view is made, of one size.
        local_view: how the small ones are made; None for none.
        num_local: how many small ones.

    Raises:
        InputError: when there is no large view, views differ in axes, large ones in size, or num_local is negative.
    """

    def __init__(
        self,
        global_views: Sequence[RandomResizedCrop],
        local_view: RandomResizedCrop | None = None,
        num_local: int = 8,
    ) -> None:
        if len({view.img_size for view in global_views}) != 1:
            sizes = [list(view.img_size) for view in global_views]
            raise InputError(f"global_views of sizes {sizes} must be one or more, of one size. Correct them.")
        require_within(0, whole=True, num_local=num_local)
        large = list(global_views[0].img_size)
        if local_view is not None and len(local_view.img_size) != len(large):
            raise InputError(
                f"local_view of size {list(local_view.img_size)} must have as many axes as global_views, which are "
                f"{large}. Correct --views::local_view::img_size."
            )
        self.global_views, self.local_view, self.num_local = list(global_views), local_view, num_local

    @property
    def mean(self) -> float:
        """Of the normalisation."""
        return self.global_views[0].mean

    @property
    def std(self) -> float:
        """Of the normalisation."""
        return self.global_views[0].std

    def still_view(self, image: Tensor, anisotropy: int = 0) -> Tensor:
        """A large view without randomness, as in `RandomResizedCrop`."""
        return self.global_views[0].still_view(image, anisotropy)

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Move a batch to the device; of "image" make "global_crops", "local_crops": views x B x C x (D) x H x W."""
        image, degree = batch["image"].to(device, non_blocking=non_blocking), degree_of_batch(batch) or 0
        keys = batch["key"].cpu() if "key" in batch else random_keys(image.shape[0])
        made = self.blank({**batch, "image": image, "key": keys})
        plan = [(view, made["global_crops"][n : n + 1]) for n, view in enumerate(self.global_views)]
        if self.local_view is not None and self.num_local:
            plan.append((self.local_view, made["local_crops"]))
        for first, (view, crops) in enumerate(plan):
            own = torch.stack([forked(keys, first + n) for n in range(len(crops))], dim=1).flatten()
            view.write(image, view.draw(image, degree, own, batch.get("modality")), crops)
        return made

    def blank(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Room for the views of a batch, as in `RandomResizedCrop`."""
        image, degree = batch["image"], degree_of_batch(batch) or 0
        made = {name: value for name, value in batch.items() if name != "image"}
        made["global_crops"] = self.global_views[0].empty(image, len(self.global_views), degree)
        if self.local_view is not None and self.num_local:
            made["local_crops"] = self.local_view.empty(image, self.num_local, degree)
        return made
