"""Random changes of intensity and colour: drawn per image, then applied to a batch on its device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from biovfm_monai.data.policies import Policy
from biovfm_monai.draws import Use, uniform

__all__ = ["Changes", "apply_changes", "chances", "draw_changes"]

_NAMES = (
    "brightness", "contrast", "saturation", "hue", "grey", "gamma", "blur", "low_resolution", "noise", "solarise",
    "haematoxylin", "eosin", "dab",
)  # fmt: skip
_DRAWN = (*_NAMES, "inverted")
_STAIN_NAMES = _NAMES[-3:]
_FIELD = dict.fromkeys(_STAIN_NAMES, "stain")
_ONE_CHANCE = dict.fromkeys(_STAIN_NAMES, _STAIN_NAMES[0])
_SHARP = 0.1
_GREY = torch.tensor([0.299, 0.587, 0.114])
# Luminance, and two axes of colour that hue turns about (NTSC's YIQ).
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_FROM_YIQ = torch.linalg.inv(_YIQ)
# Hue and saturation leave luminance as it is, and scale and turn the other two axes.
_MIXES = torch.stack([
    _FROM_YIQ[:, :1] @ _YIQ[:1], _FROM_YIQ[:, 1:] @ _YIQ[1:],
    torch.outer(_FROM_YIQ[:, 2], _YIQ[1]) - torch.outer(_FROM_YIQ[:, 1], _YIQ[2]),
])  # fmt: skip
# Optical densities of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001, https://pubmed.ncbi.nlm.nih.gov/11531144/).
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_DARKEST = 1 / 256


class Changes(NamedTuple):
    """What happens to each of B images; where nothing does, factors are 1 and the rest is 0.

    Attributes:
        brightness, contrast, saturation, gamma, pixel: factors, B each; pixel is the width of a coarser pixel.
        hue: in turns; blur, noise: standard deviations; B each.
        inverted, solarise: whether gamma is of the inverted image, and bright pixels are inverted; B each.
        stain: B x 3 factors of optical densities.
        seed: of the noise, B.
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    stain: Tensor
    gamma: Tensor
    inverted: Tensor
    blur: Tensor
    pixel: Tensor
    noise: Tensor
    solarise: Tensor
    seed: Tensor


def chances(policies: Sequence[Policy]) -> dict[str, Tensor]:
    """Probability and strength of each change, by its name, for B images: B x 2 each."""
    of = {name: [getattr(policy, _FIELD.get(name, name)) for policy in policies] for name in _NAMES}
    return {
        name: torch.tensor([c if isinstance(c, tuple) else (c, 0.0) for c in values]) for name, values in of.items()
    }


def draw_changes(policies: Mapping[str, Tensor], keys: Tensor) -> Changes:
    """Draw what happens to each image.

    Args:
        policies: name of a change in `Policy` -> B x 2, its probability and strength for each image.
        keys: B, as `uniform` takes them; on the CPU, where the drawing is for any device.
    """
    numbers = (uniform(keys, len(_DRAWN), use).unbind(1) for use in (Use.CHANGE, Use.STRENGTH))
    happens, size = (dict(zip(_DRAWN, of, strict=True)) for of in numbers)

    def drawn(name: str, strength: Callable[[Tensor, Tensor], Tensor], still: float) -> Tensor:
        probability, most = policies[name].unbind(1)
        return torch.where(happens[_ONE_CHANCE.get(name, name)] < probability, strength(most, size[name]), still)

    return Changes(
        brightness=drawn("brightness", _around_one, 1.0),
        contrast=drawn("contrast", _around_one, 1.0),
        saturation=drawn("saturation", _around_one, 1.0) * drawn("grey", lambda most, _: 0 * most, 1.0),
        hue=drawn("hue", lambda most, u: most * (2 * u - 1), 0.0),
        stain=torch.stack([drawn(name, _around_one, 1.0) for name in _STAIN_NAMES], dim=1),
        gamma=drawn("gamma", lambda most, u: most ** (2 * u - 1), 1.0),
        inverted=happens["inverted"] < 0.5,
        blur=drawn("blur", lambda most, u: _SHARP + (most - _SHARP) * u, 0.0),
        pixel=drawn("low_resolution", lambda most, u: 1 + (most - 1) * u, 1.0),
        noise=drawn("noise", lambda most, u: most * u, 0.0),
        solarise=happens["solarise"] < policies["solarise"][:, 0],
        seed=keys,
    )


def _around_one(most: Tensor, u: Tensor) -> Tensor:
    return 1 + most * (2 * u - 1)


def apply_changes(image: Tensor, changes: Changes) -> Tensor:
    """Change B x C x D x H x W of values in [0, 1]; the result is in [0, 1], too.

    Colours change where there are three channels. The image may be written over.
    """
    c, coloured = changes, image.shape[1] == 3
    mixed = ((c.saturation != 1) | (c.hue != 0)) & coloured
    steps: tuple[tuple[Tensor, Callable[..., Tensor], tuple[Tensor, ...]], ...] = (
        ((c.stain != 1).any(1) & coloured, _stained, (c.stain,)),
        ((c.brightness * c.contrast != 1) & ~mixed, _scaled, (c.brightness, c.contrast)),
        (mixed, _mixed, (c.brightness, c.contrast, c.saturation, c.hue)),
        (c.gamma != 1, _raised, (c.gamma, c.inverted)),
        (c.blur > 0, _blurred, (c.blur,)),
        (c.pixel > 1, _coarser, (c.pixel,)),
        (c.noise > 0, _noisy, (c.noise, c.seed)),
        (c.solarise, lambda x: torch.minimum(x, 1 - x), ()),
    )
    # Known on the CPU, so that no device is waited for, and asked for once.
    for chosen, (_, change, parameters) in zip(torch.stack([step[0] for step in steps]).tolist(), steps, strict=True):
        rows = [row for row, happens in enumerate(chosen) if happens]
        if len(rows) == len(image):
            image = change(image, *parameters)
        elif rows:
            some = torch.tensor(rows)
            there = some.to(image.device, non_blocking=True)
            made = change(image.index_select(0, there), *(values[some] for values in parameters))
            image = image.index_copy_(0, there, made.to(image.dtype))
    return image


def _like(values: Tensor, image: Tensor) -> Tensor:
    """One number per image, on its device."""
    return values.to(image.device, image.dtype, non_blocking=True).view(-1, *[1] * (image.ndim - 1))


def _grey(image: Tensor) -> Tensor:
    """Mean luminance of each image."""
    means = image.flatten(2).mean(2)
    return means @ _GREY.to(means.device, means.dtype, non_blocking=True) if image.shape[1] == 3 else means.mean(1)


def _scaled(image: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    offset = _grey(image) * (brightness * (1 - contrast)).to(image.device, non_blocking=True)
    return torch.addcmul(_like(offset, image), image, _like(brightness * contrast, image)).clamp_(0, 1)


def _mixed(image: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    angle, factor = 2 * math.pi * hue, brightness * contrast
    turned = factor * saturation
    matrix = (torch.stack([factor, turned * angle.cos(), turned * angle.sin()], 1) @ _MIXES.flatten(1)).view(-1, 3, 3)
    offset = (_grey(image) * (brightness * (1 - contrast)).to(image.device, non_blocking=True))[:, None, None]
    matrix = matrix.to(image.device, image.dtype, non_blocking=True)
    return torch.baddbmm(offset, matrix, image.flatten(2)).clamp_(0, 1).view_as(image)


def _stained(image: Tensor, factors: Tensor) -> Tensor:
    stains = F.normalize(_STAINS, dim=1)
    matrix = stains.T @ torch.diag_embed(factors) @ torch.linalg.inv(stains.T)
    matrix = matrix.to(image.device, image.dtype, non_blocking=True)
    density = -image.clamp(min=_DARKEST).log()
    return (matrix @ density.flatten(2)).neg_().exp_().clamp_(0, 1).view_as(image)


def _raised(image: Tensor, gamma: Tensor, inverted: Tensor) -> Tensor:
    # x -> s x + o turns an image around where s is -1. Logarithms make powers in two thirds of the time.
    sign, offset = _like(1 - 2.0 * inverted, image), _like(inverted.float(), image)
    power = torch.addcmul(offset, image, sign).clamp_(0, 1).log2_().mul_(_like(gamma, image)).exp2_()
    return torch.addcmul(offset, power, sign)


def _blurred(image: Tensor, deviation: Tensor) -> Tensor:
    """Gaussian blur in the plane, each image by its own."""
    # Each image's own, so that it does not matter with which others it is blurred.
    reaches = (3 * deviation).ceil().clamp(min=1)
    reach = int(reaches.max())
    offsets = torch.arange(-reach, reach + 1.0)
    kernel = (-0.5 * (offsets / deviation[:, None]).square()).exp() * (offsets.abs() <= reaches[:, None])
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(image.device, image.dtype, non_blocking=True)
    weights = kernel.T[..., None, None, None, None].unbind()
    for axis in (3, 4):
        # A sum of moved images: torch's convolution with a kernel per image takes several times as long.
        ends = (0, 0, reach, reach) if axis == 3 else (reach, reach, 0, 0)
        wide = F.pad(image.flatten(1, 2), ends, mode="replicate").unflatten(1, image.shape[1:3])
        moved = wide.unfold(axis, image.shape[axis], 1).movedim(5, axis + 1).unbind(axis)
        image = moved[0] * weights[0]
        for one, weight in zip(moved[1:], weights[1:], strict=True):
            image.addcmul_(one, weight)
    return image


def _coarser(image: Tensor, pixel: Tensor) -> Tensor:
    """Average over wider pixels in the plane, and interpolate between them."""
    size = image.shape[-2:]
    rows = []
    for row, width in zip(image, pixel.tolist(), strict=True):
        coarse = F.interpolate(row, [max(round(n / width), 1) for n in size], mode="bilinear", antialias=True)
        rows.append(F.interpolate(coarse, size, mode="bilinear"))
    return torch.stack(rows)


def _noisy(image: Tensor, deviation: Tensor, seed: Tensor) -> Tensor:
    for row, size, number in zip(image, deviation.tolist(), seed.tolist(), strict=True):
        # One for all channels: grey that is repeated for a network of colours stays grey.
        random = torch.Generator(image.device).manual_seed(number)
        noise = torch.randn(row[:1].shape, generator=random, device=image.device)
        row.add_(noise, alpha=size)
    return image.clamp_(0, 1)
