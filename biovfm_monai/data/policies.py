"""How much images of each modality may be changed before they mean something else.

Ranges are those of PUMIT (https://github.com/function2-llx/PUMIT) for grey images, of 3DINO (https://doi.org/10.1038/s41746-025-02035-w)
for volumes, and of DINOv2 (https://arxiv.org/abs/2304.07193) where colour is real.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from biovfm_monai.errors import InputError, require_within

__all__ = ["NATURAL", "POLICIES", "Policy", "geometric", "with_chances"]

Chance = tuple[float, float]


@dataclass(frozen=True)
class Policy:
    """Random changes of one modality's images; by default left-right flips alone.

    Args:
        flip, vertical_flip, depth_flip: probabilities of mirroring along width, height and depth.
        rotation: largest in-plane turn in degrees, drawn evenly up to it in both directions.
        brightness, contrast, saturation: (probability, s): times 1 - s to 1 + s; contrast about the mean, saturation
            about grey.
        hue: (probability, largest turn of the colours in turns).
        grey: probability that colours are taken out.
        stain: (probability, s): each of haematoxylin, eosin and DAB times 1 - s to 1 + s.
        gamma: (probability, g): to a power of 1 / g to g, half of the time of the inverted image.
        blur: (probability, largest standard deviation in pixels) of a Gaussian in the plane, 0.1 at least.
        low_resolution: (probability, f): as if pixels were up to f times as wide.
        noise: (probability, largest standard deviation), where [0, 1] is black to white; the same
            in all channels.
        solarise: probability that what is brighter than half is inverted.

    Raises:
        InputError: when a probability is not from 0 to 1, or a size is less than that of no change.
    """

    flip: float = 0.5
    vertical_flip: float = 0.0
    depth_flip: float = 0.0
    rotation: float = 0.0
    brightness: Chance = (0.0, 0.0)
    contrast: Chance = (0.0, 0.0)
    saturation: Chance = (0.0, 0.0)
    hue: Chance = (0.0, 0.0)
    grey: float = 0.0
    stain: Chance = (0.0, 0.0)
    gamma: Chance = (0.0, 1.0)
    blur: Chance = (0.0, 0.1)
    low_resolution: Chance = (0.0, 1.0)
    noise: Chance = (0.0, 0.0)
    solarise: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            chance = getattr(self, field.name)
            if isinstance(field.default, tuple):
                if not isinstance(chance, tuple | list) or len(chance) != 2:
                    raise InputError(f"{field.name} {chance!r} must be a probability and a size. Give both.")
                # Configuration files have lists.
                object.__setattr__(self, field.name, tuple(chance))
                chance, size = chance
                require_within(field.default[1], **{f"the size of {field.name}": size})
            require_within(0, math.inf if field.name == "rotation" else 1, **{field.name: chance})


_GEOMETRY = ("flip", "vertical_flip", "depth_flip", "rotation")
_GREY = Policy(
    brightness=(0.3, 0.25), contrast=(0.3, 0.25), gamma=(0.3, 1.5), blur=(0.3, 1.5), low_resolution=(0.15, 2.0),
    noise=(0.15, 0.05),
)  # fmt: skip
_VOLUME = replace(_GREY, depth_flip=0.5, rotation=30.0)
_COLOUR = replace(_GREY, brightness=(0.5, 0.3), contrast=(0.5, 0.3), saturation=(0.5, 0.2), hue=(0.5, 0.03))

POLICIES: Mapping[str, Policy] = {
    # Hounsfield units mean something: they are moved less than the arbitrary ones of an MRI scan.
    "ct": replace(_VOLUME, brightness=(0.3, 0.1), contrast=(0.3, 0.1), gamma=(0.0, 1.0)),
    "mri": _VOLUME,
    "pet": _VOLUME,
    # A mirrored heart is a finding, and nobody stands on the head.
    "xray": replace(_GREY, flip=0.0, rotation=10.0),
    "mammography": replace(_GREY, rotation=10.0),
    # The beam comes from above.
    "ultrasound": replace(_GREY, rotation=10.0),
    "oct": replace(_GREY, rotation=10.0),
    "pathology": replace(
        _COLOUR, stain=(0.5, 0.2), saturation=(0.0, 0.0), hue=(0.0, 0.0), vertical_flip=0.5, rotation=180.0
    ),
    "microscopy": replace(_COLOUR, vertical_flip=0.5, rotation=180.0),
    "fundus": replace(_COLOUR, rotation=20.0),
    "dermoscopy": replace(_COLOUR, vertical_flip=0.5, rotation=180.0),
    "endoscopy": replace(_COLOUR, vertical_flip=0.5, rotation=180.0),
}
"""What each modality's images bear in methods that compare views."""

NATURAL = Policy(
    brightness=(0.8, 0.4), contrast=(0.8, 0.4), saturation=(0.8, 0.2), hue=(0.8, 0.1), grey=0.2, blur=(0.5, 2.0)
)
"""What DINOv2 does to photographs."""


def geometric(policies: Mapping[str, Policy] = POLICIES) -> dict[str, Policy]:
    """Policies without any change of intensities, for where the numbers themselves are to be learned."""
    return {name: Policy(**{field: getattr(of, field) for field in _GEOMETRY}) for name, of in policies.items()}


def with_chances(policies: Mapping[str, Policy], **chances: float) -> dict[str, Policy]:
    """Policies in which some changes have other probabilities, such as DINOv2's blur=1.0 for one view, 0.1 for another.

    Args:
        policies: by modality.
        **chances: name of a change -> its probability.

    Raises:
        TypeError: when there is no such change.
    """
    known = {field.name for field in fields(Policy)} - {"rotation"}
    if unknown := set(chances) - known:
        raise TypeError(f"there is no change {', '.join(sorted(unknown))}, but {', '.join(sorted(known))}")

    def changed(policy: Policy) -> Policy:
        new: dict[str, Any] = {}
        for name, chance in chances.items():
            old = getattr(policy, name)
            new[name] = (chance, old[1]) if isinstance(old, tuple) else chance
        return replace(policy, **new)

    return {name: changed(policy) for name, policy in policies.items()}
