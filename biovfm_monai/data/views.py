"""Random views of a batch, made on its device: draw parameters per image, then apply them in one resampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai.data.preprocessing import crop_of_degree
from biovfm_monai.draws import random_keys, uniform
from biovfm_monai.errors import InputError

__all__ = ["RandomResizedCrop"]


class RandomResizedCrop:
    """Random resized crops, flips and turns, in 2D and 3D, normalised: MAE's views (https://arxiv.org/abs/2111.06377).

    An instance serves as the trainer's `prepare_batch`.

    Args:
        img_size: (height, width) or (depth, height, width) of the views; of thick slices there are as many fewer as
            their degree of anisotropy says.
        scale: share of the area (volume) that a view shows, drawn uniformly in between; 1 is the largest box of the
            view's proportions that the source holds.
        ratio: stretching of height over width, drawn log-uniformly in between; volumes keep their proportions.
        flip: probability of a left-right flip.
        rotation: largest in-plane turn in degrees, drawn uniformly up to it in both directions; 0 for images whose
            upright position means something. What a turned view shows beyond the source is its mirror image.
        mean, std: of the normalisation, after which [0, 1] becomes (0 - mean) / std and so on.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        rotation: float = 0.0,
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        self.img_size = tuple(img_size)
        self.scale, self.ratio, self.flip, self.rotation = scale, ratio, flip, rotation
        self.mean, self.std = mean, std

    def draw(self, image: Tensor, anisotropy: int = 0, keys: Tensor | None = None) -> Tensor:
        """Affine maps from view to source in [-1, 1] coordinates (x, y(, z)), one per image of a batch.

        Args:
            image: B x C x D x H x W, whose size, number and device count; voxels are as high as they are wide.
            anisotropy: degree of anisotropy of volumes.
            keys: of the images' random numbers, as `uniform` takes them; None for random ones.

        Returns:
            B x dims x (dims + 1).
        """
        dims = len(self.img_size)
        keys = random_keys(image.shape[0], image.device) if keys is None else keys.to(image.device)
        size, stretching, flipping, turning, *places = uniform(keys, 4 + dims).unbind(1)
        source, largest = self._source(image), self._largest(image, anisotropy)
        extent = _between(*self.scale, size)[:, None] ** (1 / dims) * largest
        if dims == 2:
            stretch = _between(math.log(self.ratio[0]), math.log(self.ratio[1]), stretching).mul(0.5).exp()
            extent = torch.minimum(extent * torch.stack([1 / stretch, stretch], dim=1), source)
        centre = _between(-1.0, 1.0, torch.stack(places, dim=1)) * (1 - extent / source)
        extent[:, 0] *= torch.where(flipping < self.flip, -1.0, 1.0)
        matrix = torch.diag_embed(extent)
        if self.rotation:
            angle = _between(-math.radians(self.rotation), math.radians(self.rotation), turning)
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
            matrix[:, :2] = turn @ matrix[:, :2]
        return torch.cat([matrix / source[:, None], centre[..., None]], dim=2)

    def still(self, image: Tensor, anisotropy: int = 0) -> Tensor:
        """Maps, as from `draw`, to the largest view from the middle of each image, upright and not mirrored."""
        dims = len(self.img_size)
        matrix = torch.diag(self._largest(image, anisotropy) / self._source(image))
        return torch.cat([matrix, matrix.new_zeros(dims, 1)], dim=1).expand(image.shape[0], -1, -1)

    def _source(self, image: Tensor) -> Tensor:
        """Voxels of a batch's images along x, y(, z)."""
        size = image.shape[-len(self.img_size) :]
        return torch.tensor(size[::-1], dtype=torch.float32, device=image.device)

    def _size(self, anisotropy: int) -> tuple[int, ...]:
        return self.img_size if len(self.img_size) == 2 else crop_of_degree(self.img_size, anisotropy)

    def _largest(self, image: Tensor, anisotropy: int) -> Tensor:
        """Extent along x, y(, z) of the largest box of the views' proportions inside an image, in its voxels."""
        wanted, size = self._size(anisotropy), image.shape[-len(self.img_size) :]
        ratio = min(n / v for n, v in zip(size, wanted, strict=True))
        return torch.tensor([ratio * v for v in wanted[::-1]], device=image.device)

    def apply(self, image: Tensor, maps: Tensor, anisotropy: int = 0) -> Tensor:
        """Resample B x C x D x H x W (D of 1 for 2D views) by the maps that `draw` gave, and normalise to float32.

        Raises:
            InputError: when a crop of several slices is to become a 2D view, or one of a single slice a volume.
        """
        image = image.float()
        if len(self.img_size) == 2:
            if image.shape[2] != 1:
                raise InputError(
                    f"crops of {image.shape[2]} slices do not make 2D views. Give --img_size three numbers too."
                )
            image = image[:, :, 0]
        elif image.shape[2] == 1 < self._size(anisotropy)[0]:
            raise InputError("crops of one slice do not make volumes. Give --crop_size three numbers too.")
        grid = F.affine_grid(maps, [image.shape[0], 1, *self._size(anisotropy)], align_corners=False)
        view = F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return (view - self.mean) / self.std

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Move a batch to the device and make its views; everything but "image" stays as it is.

        The images of a batch share a degree, batch["anisotropy"], where there is one.
        """
        image = batch["image"].to(device, non_blocking=non_blocking)
        degree = int(torch.as_tensor(batch.get("anisotropy", 0)).max())
        return {**batch, "image": self.apply(image, self.draw(image, degree, batch.get("key")), degree)}


def _between(low: float, high: float, drawn: Tensor) -> Tensor:
    return low + (high - low) * drawn
