"""Images and their label maps: read, checked against each other and a task, and predictions back on the image's grid.

Air has about -1000 Hounsfield units (https://radiopaedia.org/articles/hounsfield-unit).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, NormalizeIntensity, SpatialResample

from biovfm_monai.data.preprocessing import ByModalityd, source_of
from biovfm_monai.data.reading import ReadImaged, read_image
from biovfm_monai.errors import InputError

__all__ = ["PreparedImaged", "ReadLabeld", "RestoreGridd"]

logger = logging.getLogger(__name__)

_SHIFT = 0.1
_APART = 1.5
_AIR = -500.0


class PreparedImaged(MapTransform):
    """Read an image and prepare it as in pretraining: the modality's preset, then the normalisation.

    The grid it was read on is kept in its meta data, "grid_affine" (RAS millimetres) and "grid_shape" (with one slice
    of a 2D image), for `ReadLabeld` and `RestoreGridd`. A volume that seems to be of another modality, or whose voxels
    are 1.5 times as large or small as `spacing` along an axis, is prepared all the same, with a warning that tells the
    numbers.

    Args:
        keys: of the images.
        modality: whose preset prepares them.
        in_channels: that an image has to have.
        spacing: mm along depth, height and width to resample to; None to keep an image's own, of all axes or of one.
        presets: options of presets by modality, as in pretraining.
        mean, std: of the normalisation; as of pretraining's views unless the encoder's file says otherwise.
        spatial_dims: 3 for volumes, 2 for images of one slice.

    Raises:
        InputError: as `ByModalityd` and `read_image`, or when an image has other axes or channels.
    """

    def __init__(
        self,
        keys: KeysCollection,
        modality: str,
        in_channels: int = 1,
        spacing: Sequence[float | None] | None = None,
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        mean: float = 0.5,
        std: float = 0.5,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__(keys)
        self.modality, self.in_channels, self.spacing = modality, in_channels, spacing
        self.spatial_dims = spatial_dims
        self.read, self.prepare = ReadImaged(keys), ByModalityd(keys, spacing, presets)
        self.normalise = NormalizeIntensity(subtrahend=mean, divisor=std)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Prepare one sample's images."""
        sample = self.read(data)
        for key in self.key_iterator(sample):
            self._keep_grid(sample[key])
            self._warn_of_another_kind(sample[key], sample.get("modality"))
        given = sample.get("modality")
        sample = self.prepare({**sample, "modality": self.modality})
        for key in self.key_iterator(sample):
            sample[key] = self.normalise(sample[key])
        return sample if given is None else {**sample, "modality": given}

    def _keep_grid(self, image: MetaTensor) -> None:
        if image.ndim - 1 != self.spatial_dims:
            raise InputError(
                f"{source_of(image)}: is an image of {image.ndim - 1} axes, the network takes those of "
                f"{self.spatial_dims}. Remove the file."
            )
        if image.shape[0] != self.in_channels:
            raise InputError(
                f"{source_of(image)}: has {image.shape[0]} channel(s), the network takes {self.in_channels}. Remove "
                f"the file, or train with --in_channels {image.shape[0]} on images that all have as many."
            )
        image.meta["grid_affine"] = torch.as_tensor(image.affine, dtype=torch.float64).clone()
        image.meta["grid_shape"] = torch.tensor([*image.shape[1:], 1][:3])

    def _warn_of_another_kind(self, image: MetaTensor, stated: Any) -> None:
        low, high = float(image.min()), float(image.max())
        hounsfield = low < _AIR
        if stated not in (None, self.modality):
            logger.warning("%s: its modality is %r, the network is one of %r.", source_of(image), stated, self.modality)
        elif image.dtype != torch.uint8 and hounsfield != (self.modality == "ct"):
            kind = "Hounsfield units" if hounsfield else "no Hounsfield units, in which air has -1000"
            logger.warning(
                "%s: values from %g to %g seem to be %s; the network is one of %r.",
                source_of(image), low, high, kind, self.modality,
            )  # fmt: skip
        if self.spacing is None:
            return
        # Of thick slices, whose own distance is kept, the two smallest are those of the plane.
        found, wanted = sorted(image.pixdim.tolist()), sorted(value for value in self.spacing if value is not None)
        if max(abs(math.log(a / b)) for a, b in zip(found, wanted, strict=False)) >= math.log(_APART):
            sizes = (" x ".join(f"{value:.3g}" for value in sorted(spacing)) for spacing in (found, wanted))
            logger.warning("%s: voxels of %s mm; the network is one of %s mm.", source_of(image), *sizes)


class ReadLabeld(MapTransform):
    """Read a label map, one number of a class per voxel, and check that it belongs to its image.

    Args:
        keys: of the label maps; of several files, one for each object, the largest class counts.
        out_channels: classes, 0 (background) to out_channels - 1.
        reference: key of the image, as `PreparedImaged` leaves it.
        needed: whether a map of background alone is an error, as where every image shows what is looked for.
        values: number in the files that stands for each class, such as [0, 255]; None where they are the classes.

    Raises:
        InputError: when it is on another grid than the image, holds other numbers, or none but background.
    """

    def __init__(
        self,
        keys: KeysCollection,
        out_channels: int,
        reference: str = "image",
        needed: bool = True,
        values: Sequence[int] | None = None,
    ) -> None:
        super().__init__(keys)
        self.reference, self.needed = reference, needed
        self.values = [*range(out_channels)] if values is None else [*values]
        if len(set(self.values)) != out_channels:
            raise InputError(
                f"label_values {self.values} must be {out_channels} different numbers, one per class. Correct them."
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read one sample's label maps, to 1 x X x Y x Z of float32, with one slice of a 2D image."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            paths = [sample[key]] if isinstance(sample[key], str | Path) else sample[key]
            maps = [self._classes(path, sample[self.reference]) for path in paths]
            classes = torch.stack(maps).amax(0)
            if self.needed and not classes.any():
                raise InputError(f"{paths[0]}: is empty, all its voxels are background. Correct or remove it.")
            sample[key] = MetaTensor(classes, affine=sample[self.reference].meta["grid_affine"])
        return sample

    def _classes(self, path: Any, image: MetaTensor) -> torch.Tensor:
        label = read_image(path)
        if label.ndim == 3:
            label = MetaTensor(label.as_tensor()[..., None], affine=label.affine)
        self._require_same_grid(path, label, image)
        return self._numbered(path, label.as_tensor())

    def _require_same_grid(self, path: Any, label: MetaTensor, image: MetaTensor) -> None:
        shape, affine = image.meta["grid_shape"], torch.as_tensor(image.meta["grid_affine"])
        if label.shape[0] != 1 or list(label.shape[1:]) != shape.tolist():
            raise InputError(
                f"{path}: has size {list(label.shape[1:])} and {label.shape[0]} channel(s), its image "
                f"{source_of(image)} {shape.tolist()}. Give the label map of this image, on its grid."
            )
        corners = torch.cartesian_prod(*(torch.tensor([0.0, n - 1.0]) for n in label.shape[1:])).double()
        places = [corners @ of[:3, :3].T + of[:3, 3] for of in (affine.double(), label.affine.double())]
        apart = float((places[0] - places[1]).norm(dim=1).max())
        if apart > _SHIFT * float(affine[:3, :3].norm(dim=0).min()):
            raise InputError(
                f"{path}: its header puts it up to {apart:.3g} mm from its image {source_of(image)}. Correct the "
                "header, or resample the label map to the image."
            )

    def _numbered(self, path: Any, label: torch.Tensor) -> torch.Tensor:
        """Classes, float32, of a file's numbers."""
        wrong = [value for value in label.unique().tolist() if value not in self.values]
        if wrong:
            shown = ", ".join(f"{value:g}" for value in wrong[:10]) + (", ..." if len(wrong) > 10 else "")
            stated = f"0 to {len(self.values) - 1}" if self.values == [*range(len(self.values))] else str(self.values)
            raise InputError(
                f"{path}: holds {shown}; classes are {stated}. Correct the label map, or give --out_channels or "
                "--label_values."
            )
        classes = torch.zeros(label.shape)
        for number, value in enumerate(self.values):
            classes[label == value] = number
        return classes


class RestoreGridd(MapTransform):
    """Resample what a network says of a prepared image to the grid that its file has, through physical space.

    Where the prepared image does not reach, as beyond a field of view that was cropped, all classes get 0, so that the
    first one, background, is the largest.

    Args:
        keys: predictions, C x depth x height x width, on the grid of the prepared image.
        reference: key of the image, as `PreparedImaged` leaves it.
        mode: of the interpolation, "bilinear" for probabilities and "nearest" for classes.
    """

    def __init__(self, keys: KeysCollection, reference: str = "image", mode: str = "bilinear") -> None:
        super().__init__(keys)
        self.reference, self.resample = reference, SpatialResample(mode=mode, padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring one sample's predictions to C x X x Y x Z of the file, with one slice of a 2D image."""
        sample = dict(data)
        image: MetaTensor = sample[self.reference]
        shape, affine = torch.as_tensor(image.meta["grid_shape"]), torch.as_tensor(image.meta["grid_affine"])
        for key in self.key_iterator(sample):
            found = sample[key]
            plain = found.as_tensor() if isinstance(found, MetaTensor) else found
            placed = MetaTensor(plain.cpu(), affine=torch.as_tensor(image.affine).cpu())
            back = self.resample(placed, dst_affine=affine.cpu(), spatial_size=shape.flatten().tolist())
            meta = {"filename_or_obj": source_of(image), "original_affine": affine.cpu()}
            sample[key] = MetaTensor(back.as_tensor(), affine=affine.cpu(), meta=meta)
        return sample
