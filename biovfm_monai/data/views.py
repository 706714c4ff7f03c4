"""Random views of a batch, made on its device: draw parameters per image, then resample once and change intensities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.data.intensity import Changes, apply_changes, chances, draw_changes
from biovfm_monai.data.policies import Policy
from biovfm_monai.data.preprocessing import crop_of_degree
from biovfm_monai.data.resampling import sampled
from biovfm_monai.draws import Use, random_keys, uniform
from biovfm_monai.errors import InputError, require_pair, require_within

__all__ = ["Drawn", "RandomResizedCrop"]

_FLIPS = Policy()
# Numbers that a core's cache holds; each pass over more waits for memory, and for the system to hand it out.
_AT_ONCE = 2**20


class Drawn(NamedTuple):
    """What a view shows of each image, and how it changes it.

    Attributes:
        maps: B x dims x (dims + 1), affine maps from view to source in [-1, 1] coordinates (x, y(, z)); of several
            views of each image, one image's after the other's.
        changes: of intensity, for as many; None for none.
    """

    maps: Tensor
    changes: Changes | None


class RandomResizedCrop:
    """Random resized crops, flips and turns, in 2D and 3D, normalised: MAE's views (https://arxiv.org/abs/2111.06377).

    An instance serves as the trainer's `prepare_batch`.

    Args:
        img_size: (height, width) or (depth, height, width) of the views; of thick slices there are as many fewer as
            their degree of anisotropy says.
        scale: share of the area (volume) that a view shows, drawn uniformly in between; 1 is the largest box of the
            view's proportions that the source holds.
        ratio: stretching of height over width, drawn log-uniformly in between; volumes keep their proportions.
        depth_scale: share of the depth of volumes that a view shows, drawn uniformly in between, apart from the share
            of the plane, which `scale` then is; None for boxes of the view's proportions.
        policy: flips, turns and changes of intensity; one for all images, or by modality, such as `POLICIES`. What a
            turned view shows beyond the source is its mirror image.
        mean, std: of the normalisation, after which [0, 1] becomes (0 - mean) / std and so on.

    A view larger than what it shows, such as of images smaller than img_size, is interpolated.

    Raises:
        InputError: when a size, or a range of shares or proportions, means nothing.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        depth_scale: tuple[float, float] | None = None,
        policy: Policy | Mapping[str, Policy] = _FLIPS,
        mean: float = 0.5,
        std: float = 0.5,
    ) -> None:
        require_within(1, whole=True, img_size=img_size)
        if isinstance(img_size, int) or len(img_size) not in (2, 3):
            raise InputError(f"img_size {img_size!r} must be two or three numbers. Give one such as [64,64].")
        require_pair(0, 1, above=True, scale=scale)
        require_pair(0, above=True, ratio=ratio)
        require_within(0, above=True, std=std)
        if depth_scale is not None:
            require_pair(0, 1, above=True, depth_scale=depth_scale)
        self.img_size, self.policy = tuple(int(n) for n in img_size), policy
        self.scale, self.ratio = _pair(scale), _pair(ratio)
        self.depth_scale = None if depth_scale is None else _pair(depth_scale)
        self.mean, self.std = mean, std

    def draw(
        self,
        image: Tensor,
        anisotropy: int = 0,
        keys: Tensor | None = None,
        modality: Sequence[str] | None = None,
    ) -> Drawn:
        """What is shown of each image of a batch, and how it is changed.

        Args:
            image: B x C x D x H x W, whose size and number count; voxels are as high as they are wide.
            anisotropy: degree of anisotropy of volumes.
            keys: of the views' random numbers, as `uniform` takes them, one or more per image, an image's after the
                other's; None for random ones, one per image.
            modality: of each image, where there are policies by modality.
        """
        dims = len(self.img_size)
        keys = random_keys(image.shape[0]) if keys is None else keys.cpu()
        kinds, kind = self._policies(len(keys), modality)
        size, thickness, stretching, turning, *places = uniform(keys, 4 + dims, Use.VIEW).unbind(1)
        source, largest = self._source(image), self._largest(image, anisotropy)
        share = _between(*self.scale, size)[:, None]
        extent = share ** (1 / dims) * largest
        if dims == 2:
            stretch = _between(math.log(self.ratio[0]), math.log(self.ratio[1]), stretching).mul(0.5).exp()
            extent = torch.minimum(extent * torch.stack([1 / stretch, stretch], dim=1), source)
        elif self.depth_scale is not None:
            shares = torch.stack([*[share.sqrt()[:, 0]] * 2, _between(*self.depth_scale, thickness)], 1)
            extent = shares * largest
        centre = _between(-1.0, 1.0, torch.stack(places, dim=1)) * (1 - extent / source)
        flips = torch.tensor([(of.flip, of.vertical_flip, of.depth_flip) for of in kinds])[kind]
        extent = extent * torch.where(uniform(keys, 3, Use.FLIP) < flips, -1.0, 1.0)[:, :dims]
        angle = torch.tensor([math.radians(of.rotation) for of in kinds])[kind] * (2 * turning - 1)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
        matrix = torch.diag_embed(extent)
        matrix[:, :2] = turn @ matrix[:, :2]
        maps = torch.cat([matrix / source[:, None], centre[..., None]], dim=2)
        return Drawn(maps, draw_changes({name: of[kind] for name, of in chances(kinds).items()}, keys))

    def _policies(self, count: int, modality: Sequence[str] | None) -> tuple[list[Policy], Tensor]:
        """The policies there are, and the number of each view's."""
        if isinstance(self.policy, Policy):
            return [self.policy], torch.zeros(count, dtype=torch.int64)
        if modality is None:
            raise InputError('policies by modality need a batch with "modality". Give it, or one policy for all.')
        unknown = set(modality) - set(self.policy)
        if unknown:
            raise InputError(f"there is no policy for {', '.join(sorted(unknown))}. Add one, or give one for all.")
        names = list(self.policy)
        kind = torch.tensor([names.index(name) for name in modality], dtype=torch.int64)
        return list(self.policy.values()), kind.repeat_interleave(count // max(len(modality), 1))

    def still(self, image: Tensor, anisotropy: int = 0) -> Drawn:
        """As `draw`, but the largest view from the middle of each image, upright and unchanged."""
        dims = len(self.img_size)
        matrix = torch.diag(self._largest(image, anisotropy) / self._source(image))
        return Drawn(torch.cat([matrix, matrix.new_zeros(dims, 1)], dim=1).expand(image.shape[0], -1, -1), None)

    def still_view(self, image: Tensor, anisotropy: int = 0) -> Tensor:
        """A view without randomness: what `still` shows of a batch of images, as `apply` makes it."""
        return self.apply(image, self.still(image, anisotropy), anisotropy)

    def _source(self, image: Tensor) -> Tensor:
        """Voxels of a batch's images along x, y(, z)."""
        size = image.shape[-len(self.img_size) :]
        return torch.tensor(size[::-1], dtype=torch.float32)

    def _size(self, anisotropy: int) -> tuple[int, ...]:
        return self.img_size if len(self.img_size) == 2 else crop_of_degree(self.img_size, anisotropy)

    def _largest(self, image: Tensor, anisotropy: int) -> Tensor:
        """Extent along x, y(, z) of the largest box of the views' proportions inside an image, in its voxels.

        Where depth has a share of its own, all slices, and the largest plane of the views' proportions.
        """
        wanted, size = torch.tensor(self._size(anisotropy)[::-1], dtype=torch.float32), self._source(image)
        ratios = size / wanted
        if self.depth_scale is None:
            return ratios.min() * wanted
        return torch.cat([ratios[:2].min() * wanted[:2], size[2:]])

    def apply(self, image: Tensor, drawn: Drawn, anisotropy: int = 0) -> Tensor:
        """Resample B x C x D x H x W (D of 1 for 2D views) as `draw` said, change it, and normalise to float32.

        Values are in [0, 1], or whole numbers of eight bits.

        Raises:
            InputError: when a crop of several slices is to become a 2D view, or one of a single slice a volume, or an
                image is of other whole numbers.
        """
        views = self.empty(image, len(drawn.maps) // max(len(image), 1), anisotropy)
        self.write(image, drawn, views)
        return views.transpose(0, 1).flatten(0, 1)

    def empty(self, image: Tensor, several: int, anisotropy: int = 0) -> Tensor:
        """Room for several views of B images, several x B x C x (D) x H x W; errors as in `apply`."""
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise InputError(f"views do not know what {image.dtype} counts. Give numbers in [0, 1], or uint8.")
        if len(self.img_size) == 2:
            if image.shape[2] != 1:
                raise InputError(
                    f"crops of {image.shape[2]} slices do not make 2D views. Give --img_size three numbers too."
                )
        elif image.shape[2] == 1 < self._size(anisotropy)[0]:
            raise InputError("crops of one slice do not make volumes. Give --crop_size three numbers too.")
        return image.new_empty(several, *image.shape[:2], *self._size(anisotropy), dtype=torch.float32)

    def write(self, image: Tensor, drawn: Drawn, views: Tensor) -> None:
        """As `apply`, into views as from `empty`."""
        several, step = len(views), max(len(image), 1)
        if image.device.type == "cpu":
            step = max(_AT_ONCE // (several * math.prod(views.shape[2:])), 1)
        zero = torch.full((), -self.mean / self.std, device=views.device)
        axes = [(2 * torch.arange(n, device=views.device) + 1) / n - 1 for n in views.shape[3:]]
        for first in range(0, len(image), step):
            images = slice(first, first + step)
            rows = slice(first * several, (first + step) * several)
            part, some = _part(drawn, rows), image[images]
            # On the CPU one image and its grid stay in the cache.
            each = 1 if image.device.type == "cpu" else max(len(some), 1)
            pairs = zip(some.split(each), part.maps.split(each * several), strict=True)
            parts = [sampled(one, maps, axes) for one, maps in pairs]
            made = parts[0] if len(parts) == 1 else torch.cat(parts)
            if part.changes is not None:
                made = apply_changes(made, part.changes)
            made = made.view(-1, several, *views.shape[2:]).transpose(0, 1)
            torch.add(zero, made, alpha=1 / self.std, out=views[:, images])

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Move a batch to the device and make its views; everything but "image" stays as it is.

        The images of a batch share a degree, batch["anisotropy"], where there is one.
        """
        image = batch["image"].to(device, non_blocking=non_blocking)
        degree = degree_of_batch(batch) or 0
        drawn = self.draw(image, degree, batch.get("key"), batch.get("modality"))
        return {**batch, "image": self.apply(image, drawn, degree)}

    def blank(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Room for the views of a batch, on the device of its "image", which may be the meta device."""
        return {**batch, "image": self.empty(batch["image"], 1, degree_of_batch(batch) or 0)[0]}


def _part(drawn: Drawn, rows: slice) -> Drawn:
    changes = drawn.changes
    return Drawn(drawn.maps[rows], None if changes is None else Changes(*(values[rows] for values in changes)))


def _pair(numbers: Sequence[float]) -> tuple[float, float]:
    """Of numpy's numbers torch would make float64."""
    low, high = numbers
    return float(low), float(high)


def _between(low: float, high: float, drawn: Tensor) -> Tensor:
    return low + (high - low) * drawn
