"""LPIPS from the files of its authors (https://github.com/richzhang/PerceptualSimilarity) and of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from biovfm_monai.checkpoints.read import read_weights
from biovfm_monai.errors import InputError
from biovfm_monai.networks import LPIPSFeatures

__all__ = ["load_lpips"]

_VGG = "torchvision's VGG16. Give its state dict, such as vgg16-397923af.pth."
_LINEAR = "LPIPS's linear weights for VGG16. Give those of version 0.1, such as lpips/weights/v0.1/vgg.pth."


def load_lpips(vgg_path: str | Path, linear_path: str | Path) -> LPIPSFeatures:
    """LPIPS with VGG16, frozen, from two files that you have; nothing is downloaded.

    Args:
        vgg_path: torchvision's state dict of VGG16 trained on ImageNet; only its convolutions are read.
        linear_path: LPIPS's learned weights for it, of version 0.1.

    Raises:
        InputError: when a file cannot be read, lacks a tensor, or has one of another shape or with negative weights.
    """
    network = LPIPSFeatures()
    convolutions = {name: p for name, p in network.named_parameters() if name.startswith("features.")}
    linear = {f"lin{number}.model.1.weight": p for number, p in enumerate(network.linear)}
    _fill(convolutions, vgg_path, _VGG)
    _fill(linear, linear_path, _LINEAR)
    for name, weight in linear.items():
        if not (weight >= 0).all():
            raise InputError(f"{linear_path}: {name} must be 0 or more, got {weight.min():g}: not {_LINEAR}")
    return network


def _fill(parameters: Mapping[str, Tensor], path: str | Path, wanted: str) -> None:
    """Copy a file's tensors of the same names."""
    tensors = read_weights(path)
    for name, parameter in parameters.items():
        if name not in tensors:
            raise InputError(f"{path}: has no {name}, so it is not {wanted}")
        if tensors[name].shape != parameter.shape:
            found, shape = tuple(tensors[name].shape), tuple(parameter.shape)
            raise InputError(f"{path}: {name} is {found} instead of {shape}, so it is not {wanted}")
        parameter.copy_(tensors[name])
