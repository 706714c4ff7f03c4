"""A network for one task: the encoder it begins with, fresh or pretrained, and its own weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from biovfm_monai.checkpoints.encoder import encoder_info, load_encoder, load_exactly
from biovfm_monai.checkpoints.inflation import with_channels
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["encoder_to_finetune", "load_model"]


Network = TypeVar("Network", bound=nn.Module)


def encoder_to_finetune(
    fresh: ViT, path: str | Path | None = None, mean: float | None = None, std: float | None = None
) -> ViT:
    """An encoder for a task: the fresh one, or that of a file with as many channels and as high a drop-path rate.

    Args:
        fresh: what the task would train from nothing; says channels, axes and the drop-path rate.
        path: encoder file, of ours or as `convert` makes it of public weights; None for the fresh one.
        mean, std: by which the task normalises images, to compare with the file's header; None not to.

    Raises:
        InputError: as `load_encoder`; when channels cannot be changed so, one is of 2D images and the other of volumes,
            or its images were normalised differently.
    """
    if path is None:
        return fresh
    encoder, header = load_encoder(path), encoder_info(path)["preprocessing"]
    if encoder.spatial_dims < fresh.spatial_dims:
        raise InputError(
            f"{path}: an encoder of 2D images, and the task is one of volumes. Make it one of volumes first, by "
            f"biovfm convert --volume_size {list(fresh.img_size)} or biovfm_monai.checkpoints.inflate."
        )
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and name in header and header[name] != value:
            raise InputError(
                f"{path}: was trained on images of {name} {header[name]}, the task gives it {value}. "
                f"Give --{name} {header[name]}."
            )
    try:
        encoder = with_channels(encoder, fresh.in_channels)
    except InputError as error:
        raise InputError(f"{path}: {error} Give another encoder, or --in_channels {encoder.in_channels}.") from error
    rate = fresh.arguments["drop_path_rate"]
    if rate != encoder.arguments["drop_path_rate"]:
        dropping = ViT(**{**encoder.arguments, "drop_path_rate": rate})
        dropping.load_state_dict(encoder.state_dict())
        encoder = dropping
    return encoder


def load_model(network: Network, path: str | Path) -> Network:
    """Give a network the weights of a bundle's `models/model.pt`; nothing else is unpickled.

    Args:
        network: of the architecture that was trained.
        path: a file with the weights alone, as MONAI's `CheckpointSaver` writes them, or with {"model": weights}.

    Raises:
        InputError: when the file is missing or damaged, or its weights do not fit: every missing, unexpected or
            differently shaped one is listed.
    """
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        state = dict(state.get("model", state))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. Train first, or correct the path.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged, or no weights of a bundle. Train again, or correct the path.") from error
    load_exactly(network, state, str(path))
    return network
