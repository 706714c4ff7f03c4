"""From what a file holds to what an encoder takes: preset by modality, channels, size."""

from __future__ import annotations

import inspect
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Resize, SpatialPad, Transform
from torch import Tensor

from biovfm_monai.anisotropy import anisotropy_of, spacing_of
from biovfm_monai.data import modalities
from biovfm_monai.data.encoding import eight_bits, shares
from biovfm_monai.data.headers import APART
from biovfm_monai.data.reading import ReadImaged
from biovfm_monai.data.store import StoredImage
from biovfm_monai.errors import InputError

__all__ = [
    "ByModalityd",
    "FitSized",
    "MatchChannelsd",
    "degree_of",
    "encoder_transform",
    "source_of",
    "training_transform",
]

_LUMINANCE = (0.299, 0.587, 0.114)


class ByModalityd(MapTransform):
    """Apply the preset of `biovfm_monai.data.modalities` that a sample's "modality" names.

    Args:
        keys: of the images.
        spacing: mm along depth, height and width, for volumes; None to keep their own, of all axes or of one.
        options: modality -> options of its preset, such as {"ct": {"window": "lung"}}.

    Raises:
        InputError: when there is no preset or option of that name, or an option means nothing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: Sequence[float | None] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(keys)
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise InputError(f"presets {options!r} must be options by modality. Give {{'ct': {{'window': 'lung'}}}}.")
        for name, given in options.items():
            _check_options(name, given)
        self.spacing, self.options = spacing, options
        self.presets = {
            name: getattr(modalities, name)(keys, spacing=spacing, **options.get(name, {}))
            for name in modalities.__all__
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Preprocess one sample."""
        if "prepared" in data:
            self._require_alike(data)
            return dict(data)
        if data.get("modality") not in self.presets:
            raise InputError(
                f"{source_of(data[self.first_key(dict(data))])}: modality {data.get('modality')!r} has no preset; "
                f"there are {', '.join(self.presets)}. Correct it in the datalist, or give --modality."
            )
        return dict(self.presets[data["modality"]](data))

    def _require_alike(self, data: Mapping[Hashable, Any]) -> None:
        """Refuse an image of a store that was prepared in another way."""
        wanted = {"spacing": self.spacing, "options": self.options.get(data["modality"], {})}
        # As a store's file has them, in which tuples are lists.
        if json.loads(json.dumps(wanted)) != data["prepared"]:
            raise InputError(
                f"the store holds {data['modality']} prepared with {data['prepared']}, not {wanted}. Leave --spacing "
                "and --presets as they were for `biovfm pack`, or pack again."
            )


def _check_options(name: str, given: Any) -> None:
    if name not in modalities.__all__:
        raise InputError(f"presets: there is none for {name!r}, but {', '.join(modalities.__all__)}.")
    known = [*inspect.signature(getattr(modalities, name)).parameters][2:]
    wrong = given if not isinstance(given, Mapping) else next((option for option in given if option not in known), None)
    if wrong is not None:
        raise InputError(f"presets: {name} has no option {wrong!r}. There are {', '.join(known) or 'none'}.")


class MatchChannelsd(MapTransform):
    """Give images as many channels as the encoder takes: grey is repeated without a copy, colour becomes its luminance.

    Raises:
        InputError: on any other mismatch.
    """

    def __init__(self, keys: KeysCollection, in_channels: int) -> None:
        super().__init__(keys)
        self.in_channels = in_channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Match one sample's images."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image = sample[key]
            given = image.shape[0]
            if given == self.in_channels:
                continue
            if given == 1:
                sample[key] = image.expand(self.in_channels, *image.shape[1:])
            elif given == 3 and self.in_channels == 1:
                image = shares(image)
                weights = torch.tensor(_LUMINANCE, dtype=image.dtype).view(-1, *[1] * (image.ndim - 1))
                sample[key] = (image * weights).sum(0, keepdim=True)
            else:
                raise InputError(
                    f"{source_of(image)}: has {given} channels, the encoder takes {self.in_channels}. "
                    f"Remove the file, or train with --in_channels {given} on images that all have {given}."
                )
        return sample


class FitSized(MapTransform):
    """Scale an image so that it fits into a size, keep its proportions, and pad the rest with zeros.

    A 2D size applies to every slice, and so does a 3D one to 2D images and films; slices are then thinned out evenly to
    at most `max_slices`. Of thick slices as many fewer fit as their degree of anisotropy says, which the affine keeps.
    """

    def __init__(self, keys: KeysCollection, img_size: Sequence[int], max_slices: int = 32) -> None:
        super().__init__(keys)
        self.img_size = tuple(img_size)
        self.max_slices = max_slices

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Fit one sample's images, C x depth x height x width."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = self._fitted(sample[key])
        return sample

    def _fitted(self, image: Tensor) -> Tensor:
        volumes, degree = len(self.img_size) == 3, degree_of(image)
        flat = not volumes or degree == 5
        spacing = spacing_of(image) or [1.0, 1.0, 1.0]
        if flat:
            count = min(image.shape[1], self.max_slices)
            image = image[:, torch.linspace(0, image.shape[1] - 1, count).round().long()]
            target = (count, *self.img_size[-2:])
        else:
            target = crop_of_degree(self.img_size, degree)
        ratio = min(t / n for t, n in zip(target[flat:], image.shape[1 + flat :], strict=True))
        scaled = [max(round(n * ratio), 1) for n in image.shape[1 + flat :]]
        image = Resize((*target[:flat], *scaled), mode="area" if ratio < 1 else "trilinear")(image)
        image = SpatialPad(target)(image)
        if volumes and isinstance(image, MetaTensor):
            apart = APART if flat else spacing[0] / ratio
            affine = torch.diag(torch.tensor([apart, *(n / ratio for n in spacing[1:]), 1], dtype=torch.float64))
            meta = {key: value for key, value in image.meta.items() if key != "affine"}
            image = MetaTensor(image.as_tensor(), affine=affine, meta=meta)
        return image


def crop_of_degree(crop_size: Sequence[int], degree: int) -> tuple[int, int, int]:
    """Voxels along depth, height and width of a crop that shows as much of thick slices as `crop_size` of thin ones.

    Args:
        crop_size: (height, width) for one slice, or (depth, height, width) of isotropic volumes.
        degree: of anisotropy: each one halves the depth, and at 5 a crop is one slice.

    Raises:
        InputError: when crop_size is no two or three positive numbers.
    """
    if isinstance(crop_size, int) or len(crop_size) not in (2, 3) or min(crop_size) < 1:
        raise InputError(f"crop_size {crop_size} must be two or three positive numbers. Give one such as [96,96].")
    *depth, height, width = crop_size
    return (max(depth[0] >> degree, 1) if depth and degree < 5 else 1), height, width


def degree_of(image: Tensor) -> int:
    """Degree of anisotropy of C x depth x height x width: 5 of one slice, and of slices that stand for themselves."""
    if image.shape[1] == 1:
        return 5
    depth, *plane = spacing_of(image) or (1.0, 1.0, 1.0)
    return 5 if depth >= APART else anisotropy_of([depth, min(plane), min(plane)])


def training_transform(
    in_channels: int,
    spacing: Sequence[float] | None = None,
    keys: KeysCollection = ("image",),
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Compose:
    """Datalist item to C x depth x height x width: uint8 where it came in eight bits, else float16 in [0, 1].

    spacing and presets are those of `ByModalityd`. Colours that become grey are float16.
    """
    # In this order grey images are kept once in memory, not once per channel.
    return Compose([_Compactd(keys, ByModalityd(keys, spacing, presets)), MatchChannelsd(keys, in_channels)])


class _Compactd(MapTransform):
    """Read and prepare images; what came in eight bits is in eight again, as `pack` stores it, all else float16."""

    def __init__(self, keys: KeysCollection, prepare: ByModalityd) -> None:
        super().__init__(keys)
        self.read, self.prepare = ReadImaged(keys), prepare

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        raw = self.read(data)
        sample = self.prepare(raw)
        for key in self.key_iterator(sample):
            image, given = sample[key], data[key]
            eight_bit = given.eight_bit if isinstance(given, StoredImage) else raw[key].dtype == torch.uint8
            if image.dtype != torch.uint8:
                within = eight_bit and image.min() >= 0 and image.max() <= 1
                # Files of colours have them last, and crops of that are copied ten times as slowly.
                sample[key] = (eight_bits(image) if within else image.half()).contiguous()
        return sample


def encoder_transform(
    in_channels: int,
    img_size: Sequence[int],
    mean: float | Sequence[float],
    std: float | Sequence[float],
    spacing: Sequence[float] | None = None,
    keys: KeysCollection = ("image",),
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    modality: str | None = None,
) -> Compose:
    """Datalist item to the encoder's input, normalised float32: C x H x W per slice, or C x D x H x W.

    mean and std are one number each, or one per channel; spacing and presets are those of `ByModalityd`; modality is
    that of items that tell none.
    """
    return Compose(
        [
            _OfModality(modality),
            ReadImaged(keys),
            ByModalityd(keys, spacing, presets),
            MatchChannelsd(keys, in_channels),
            FitSized(keys, img_size),
            _Normalised(keys, mean, std),
        ]
    )


class _OfModality(Transform):
    def __init__(self, modality: str | None) -> None:
        self.modality = modality

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, "modality": data.get("modality") or self.modality}


class _Normalised(MapTransform):
    def __init__(self, keys: KeysCollection, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__(keys)
        self.mean, self.std = (torch.tensor(value).reshape(-1, 1, 1, 1) for value in (mean, std))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample[key] = (sample[key].float() - self.mean) / self.std
        return sample


def source_of(image: Any) -> str:
    """The file an image was read from, for messages."""
    if isinstance(image, MetaTensor):
        return str(image.meta.get("filename_or_obj", "image"))
    return "an image in memory" if isinstance(image, Tensor) else str(image)
