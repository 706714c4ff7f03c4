"""Reading the tensors of anyone's checkpoint without running code from it.

https://pytorch.org/docs/stable/generated/torch.load.html (weights_only) and https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from biovfm_monai.errors import InputError

__all__ = ["read_weights", "renamed"]

_SECTIONS = ("teacher", "model", "state_dict", "module", "student")
_WRAPPERS = ("module.", "_orig_mod.", "backbone.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or a pickle of tensors.

    A folder is read as Hugging Face writes it (model.safetensors). Of several networks in a file ("teacher", "model",
    "state_dict", "module", "student") the first there is taken. Prefixes of wrappers ("module.", "backbone.") are taken
    off.

    Raises:
        InputError: when the file is missing, truncated, holds no tensors, or needs code from the file to be opened.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint. Correct the path.")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: truncated or no checkpoint ({reason}). Download it again.") from error
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        section = next((name for name in _SECTIONS if name in content), None)
        if section is None:
            raise InputError(f"{path}: holds no weights, but {', '.join(map(str, content)) or 'nothing'}.")
        content = content[section]
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds no weights, but a {type(content).__name__}.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    try:
        return renamed(tensors, _unwrapped)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors under new names.

    Raises:
        InputError: when two would have the same name, so that one of them would be lost.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new in result:
            raise InputError(f"{name} and another tensor are both {new!r}. Keep one of the two networks in the file.")
        result[new] = tensor
    return result


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL (\S+)", " ".join(str(error).split()))
        raise InputError(
            f"{path}: cannot be opened without running code from it"
            f"{f' ({needs.group(1)})' if needs else ''}. If you trust it, save its tensors alone with torch.save."
        ) from error


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name
