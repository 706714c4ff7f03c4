"""Reading the tensors of anyone's checkpoint without running code from it.

https://pytorch.org/docs/stable/generated/torch.load.html (weights_only) and https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from biovfm_monai.errors import InputError

__all__ = ["read_weights", "renamed", "require_other"]

logger = logging.getLogger(__name__)

_SECTIONS = ("teacher", "model", "state_dict", "module", "student", "model_ema", "state_dict_ema")
_WRAPPERS = ("module.", "_orig_mod.", "backbone.")
_DAMAGED = (
    SafetensorError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
    AssertionError, OverflowError, struct.error,
)  # fmt: skip


def read_weights(path: str | Path, section: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or a pickle of tensors.

    A folder is read as Hugging Face writes it (model.safetensors). Prefixes of wrappers ("module.", "backbone.") are
    taken off.

    Args:
        path: file or folder.
        section: which of the networks in a file; None for the first there is of "teacher", "model", "state_dict",
            "module", "student", "model_ema" and "state_dict_ema". Those that are passed over are logged.

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
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{path}: truncated, or no checkpoint ({type(error).__name__}). Download it again.") from error
    content = _section_of(content, path, section)
    tensors = {str(n): t for n, t in content.items() if isinstance(t, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        kind = ", ".join(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(f"{path}: holds no weights, but {kind or 'nothing'}.")
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


def _section_of(content: Any, path: Path, section: str | None) -> Any:
    """The one network among what a file holds."""
    while isinstance(content, Mapping):
        found = [name for name in (section, *_SECTIONS) if name and isinstance(content.get(name), Mapping)]
        if section is not None and section not in found:
            raise InputError(f"{path}: has no section {section!r}, but {', '.join(map(str, content))}.")
        if not found:
            break
        if len(set(found)) > 1:
            logger.warning("%s: took %r, not %s", path, found[0], ", ".join(map(repr, dict.fromkeys(found[1:]))))
        content, section = content[found[0]], None
    return content


def require_other(source: Path, out: Path) -> None:
    """Refuse to write over what is read.

    Raises:
        InputError: when the two paths are one.
    """
    if source.exists() and source.resolve() == out.resolve():
        raise InputError(f"{out}: is what is read, and would be lost. Give another place to write to.")


def _unpickle(path: Path) -> Any:
    try:
        # Many training files hold the command line beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL (\S+)", " ".join(str(error).split()))
        if needs is None:
            raise ValueError("no pickle that torch.save wrote") from error
        raise InputError(
            f"{path}: cannot be opened without running code from it ({needs.group(1)}). If you trust it, save its "
            "tensors alone with torch.save."
        ) from error


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name
