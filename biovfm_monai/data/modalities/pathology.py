"""Histology: colour, 8 bit."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.apps.pathology.transforms.stain.array import NormalizeHEStains
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform

from biovfm_monai.data.modalities.base import EightBitd, geometry

__all__ = ["EvenStainsd", "pathology"]


class EvenStainsd(MapTransform):
    """Bring haematoxylin and eosin to reference colours (http://wwwx.cs.unc.edu/~mn/sites/default/files/macenko2009.pdf).

    8-bit colour images with stain on them are changed, all others stay as they are.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        self.normalise = NormalizeHEStains()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change one sample's images, 3 x 1 x height x width."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image: MetaTensor = sample[key]
            if image.dtype != torch.uint8 or image.shape[:2] != (3, 1):
                continue
            try:
                even = self.normalise(np.ascontiguousarray(image.as_tensor()[:, 0].permute(1, 2, 0).numpy()))
            except ValueError:  # MONAI's word for an image without a stained pixel
                continue
            sample[key] = MetaTensor(torch.from_numpy(even).permute(2, 0, 1)[:, None].contiguous(), meta=image.meta)
        return sample


def pathology(keys: KeysCollection, spacing: Sequence[float] | None = None, even_stains: bool = False) -> Compose:
    """Colours to [0, 1], on request with haematoxylin and eosin brought to a reference; C x 1 x height x width."""
    stains = [EvenStainsd(keys)] if even_stains else []
    return geometry(keys, spacing, *stains, EightBitd(keys))
