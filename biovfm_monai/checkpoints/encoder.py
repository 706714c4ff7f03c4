"""Encoder files that describe themselves: safetensors (https://github.com/huggingface/safetensors) with a JSON header.

The header's "biovfm_monai" entry holds "network" (`_target_` and the arguments that rebuild it), "preprocessing"
(what the images went through) and "training" (how the weights came about).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from biovfm_monai import networks
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically
from biovfm_monai.networks import Embedder, SoftTokenizer, ViT

__all__ = [
    "build_encoder", "encoder_info", "load_encoder", "load_exactly", "load_network", "save_embedder", "save_encoder",
    "save_network",
]  # fmt: skip

_HEADER = "biovfm_monai"
_PREFIX = "biovfm_monai.networks."

Network = TypeVar("Network", ViT, SoftTokenizer)


def save_encoder(
    encoder: ViT,
    path: str | Path,
    preprocessing: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write an encoder file; what was at `path` stays until the new file is whole.

    Args:
        encoder: its weights and arguments are kept.
        path: usually ends in .safetensors.
        preprocessing: JSON values, how images became the encoder's input.
        training: JSON values, how the weights came about.
    """
    save_network(encoder, path, preprocessing, training)


def save_network(
    network: ViT | SoftTokenizer,
    path: str | Path,
    preprocessing: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a network with its arguments, whatever its kind; arguments as of `save_encoder`."""
    header = {
        "network": {"_target_": _PREFIX + type(network).__name__, **network.arguments},
        "preprocessing": dict(preprocessing or {}),
        "training": dict(training or {}),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with write_atomically(path) as draft:
        save_file(tensors, draft, metadata={_HEADER: json.dumps(header)})


def save_embedder(encoder: ViT, path: str | Path) -> None:
    """Write a bundle's `models/model.pt`: {"model": weights of `Embedder`}; what was there stays until it is whole."""
    with write_atomically(path) as draft:
        torch.save({"model": Embedder(encoder).state_dict()}, draft)


def encoder_info(path: str | Path) -> dict[str, Any]:
    """The header of an encoder file: "network", "preprocessing" and "training".

    Raises:
        InputError: when the file is missing, damaged, or no encoder file of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such encoder file. Pretrain first, or correct the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or no safetensors file ({error}). Copy or export it again.") from error
    if _HEADER not in metadata:
        raise InputError(
            f"{path}: a safetensors file without our header. Only files that save_encoder wrote can be used."
        )
    try:
        info = dict(json.loads(metadata[_HEADER]))
        str(info["network"]["_target_"]), dict(info["preprocessing"]), dict(info["training"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: its header is damaged ({error!r}). Copy or export the file again.") from error
    return info


def build_encoder(path: str | Path) -> ViT:
    """The network that an encoder file's header describes, with freshly initialised weights.

    Raises:
        InputError: as `encoder_info`, or when the header names a network this version does not have, or arguments it
            does not take.
    """
    return _build(path, ViT)


def _build(path: str | Path, kind: type[Network]) -> Network:
    arguments = dict(encoder_info(path)["network"])
    target = str(arguments.pop("_target_"))
    name = target.removeprefix(_PREFIX)
    network = getattr(networks, name, None) if name in networks.__all__ else None
    if not (target.startswith(_PREFIX) and isinstance(network, type) and issubclass(network, ViT | SoftTokenizer)):
        raise InputError(f"{path}: asks for {target}, which this version does not have. Update biovfm-monai.")
    if not issubclass(network, kind):
        raise InputError(f"{path}: holds a {name}, and a {kind.__name__} is asked for. Give another file.")
    try:
        built = network(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: has arguments that {target} does not take ({error}). Update biovfm-monai."
        ) from error
    return built


def load_encoder(path: str | Path) -> ViT:
    """Rebuild an encoder with its weights, in eval mode on the CPU.

    Raises:
        InputError: as `build_encoder`, or when the weights do not fit the network that the header
            describes: every missing, unexpected or differently shaped key is listed.
    """
    return load_network(path, ViT)


def load_network(path: str | Path, kind: type[Network]) -> Network:
    """Rebuild a network of a kind with its weights, in eval mode on the CPU; raises as `load_encoder`."""
    network = _build(path, kind)
    with safe_open(Path(path), framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    load_exactly(network, state, str(path))
    return network.eval()


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load weights that fit a network tensor by tensor.

    Raises:
        InputError: listing every missing, unexpected or differently shaped one.
    """
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        raise InputError(f"{where}: the weights do not fit the network: {'; '.join(problems)}.")
    network.load_state_dict(state)
