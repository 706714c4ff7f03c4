"""What all conversions of public weights share: reading a file safely, and taking every tensor by name.

A source (one file each beside this one) maps the names of its layout to those of `ViT`; what it neither takes nor drops
by name is an error, so that nothing is loaded silently wrong.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["Weights", "build", "read_weights", "take_vit"]

_SECTIONS = ("teacher", "model", "state_dict", "student")
_WRAPPERS = ("module.", "_orig_mod.", "backbone.")
_FAMILIES = {
    "MAE with its decoder": r"decoder_blocks\.0\.",
    "MONAI": r"(vit\.)?blocks\.0\.mlp\.linear1\.weight",
    "Hugging Face": r"(.*\.)?(encoder\.)?layer\.0\.attention\.",
    "DINOv2": r"blocks\.(0\.)?0\.ls1\.gamma",
    "timm": r"blocks\.0\.attn\.qkv\.weight",
}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without running code from it: safetensors, or a pickle of tensors.

    A folder is read as Hugging Face writes it (model.safetensors). Of several networks in a file ("teacher", "model",
    "state_dict", "student") the first there is taken. Prefixes of wrappers ("module.", "backbone.") are taken off.

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
    return {_unwrapped(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        needs = re.search(r"GLOBAL (\S+)", reason)
        raise InputError(
            f"{path}: cannot be opened without running code from it"
            f"{f' ({needs.group(1)})' if needs else ''}. If you trust it, save its tensors alone with torch.save."
        ) from error


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


class Weights:
    """Tensors of a checkpoint, each to be taken or dropped by name.

    Args:
        tensors: name -> tensor.
        source: name of the layout that is expected, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.left = dict(tensors)
        self.source = source
        self.dropped: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """One tensor, as float32.

        Raises:
            InputError: when it is not there.
        """
        if name not in self.left:
            family = next((f for f, sign in _FAMILIES.items() if any(re.match(sign, key) for key in self.left)), None)
            looks = f" It looks like {family}." if family else ""
            raise InputError(f"no {name} in the checkpoint, so it is not of the layout {self.source!r}.{looks}")
        return self.left.pop(name).float()

    def drop(self, *patterns: str) -> None:
        """Leave out what an encoder has no use for, by regular expression."""
        gone = [name for name in self.left if any(re.fullmatch(pattern, name) for pattern in patterns)]
        self.dropped += gone
        for name in gone:
            del self.left[name]

    def finish(self) -> None:
        """Check that everything was taken or dropped.

        Raises:
            InputError: naming what was not.
        """
        if self.left:
            raise InputError(f"not known in the layout {self.source!r}: {', '.join(sorted(self.left))}.")


def take_vit(weights: Weights, names: Mapping[str, str], img_size: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Take an encoder's tensors in a layout that differs from ours by names only.

    Args:
        weights: of a checkpoint.
        names: our name -> theirs, "{n}" standing for a block's number. Query, key and value, and gate and value of
            SwiGLU, may be separate there: their names with spaces between. Those that a checkpoint may lack end in "?".
        img_size: the positions were made for; None for a square or cube.

    Returns:
        Tensors by our names; the patch kernel as `PatchEmbed` has it, positions as a grid, 1 x C x D x H x W.
    """
    state: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        count = 0
        while True:
            found = theirs.rstrip("?").replace("{n}", str(count)).split()
            if theirs.endswith("?") and found[0] not in weights:
                break
            if "{n}" in theirs and count and found[0] not in weights:
                break
            state[ours.replace("{n}", str(count))] = torch.cat([weights.take(name) for name in found])
            count += 1
            if "{n}" not in theirs:
                break
    kernel = state["patch_embed.weight"]
    state["patch_embed.weight"] = kernel.flatten(2).transpose(1, 2).flatten(1)
    if "pos_embed" in state:
        _split_positions(state, kernel, img_size)
    return state | {"kernel": kernel}


def _split_positions(state: dict[str, Tensor], kernel: Tensor, img_size: Sequence[int] | None) -> None:
    """Positions of patches become a grid; that of the class token, if there is one, is added to it."""
    table = state["pos_embed"].reshape(1, -1, kernel.shape[0])
    patch = kernel.shape[2:]
    count = table.shape[1]
    for prefix in (0, 1):
        side = round((count - prefix) ** (1 / len(patch)))
        grid = [side] * len(patch) if img_size is None else [n // p for n, p in zip(img_size, patch, strict=True)]
        if math.prod(grid) == count - prefix:
            break
    else:
        raise InputError(
            f"{count} positions are no grid of {'a square or cube' if img_size is None else tuple(img_size)} in "
            f"patches of {tuple(patch)}, with or without a class token. Give the network's --img_size."
        )
    if prefix:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1) + table[:, :1]
    volume = grid if len(grid) == 3 else [1, *grid]
    state["pos_embed"] = table[:, prefix:].transpose(1, 2).unflatten(2, volume)


def build(state: dict[str, Tensor], num_heads: int | None = None, **options: Any) -> ViT:
    """The encoder that tensors from `take_vit` make.

    Learned positions beside registers mean DINOv2 with registers, whose positions are resampled with antialiasing.

    Args:
        state: as from `take_vit`.
        num_heads: None for heads of 64 numbers, which all published ViTs but the huge ones have.
        **options: of `ViT` that shapes do not tell.

    Raises:
        InputError: when the heads cannot be told.
    """
    kernel = state.pop("kernel")
    width, channels, *patch = kernel.shape
    grid = state["pos_embed"].shape[2:][-len(patch) :] if "pos_embed" in state else [224 // p for p in patch]
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    if num_heads is None and width % 64:
        raise InputError(f"cannot tell the number of heads of a width of {width}. Give --num_heads.")
    encoder = ViT(
        channels,
        [g * p for g, p in zip(grid, patch, strict=True)],
        patch,
        width,
        depth=sum(name.endswith("norm1.weight") for name in state),
        num_heads=num_heads or {1280: 16}.get(width, width // 64),
        mlp_ratio=math.nextafter(hidden / width, math.inf),
        qkv_bias="blocks.0.attn.qkv.bias" in state or "blocks.0.attn.qv_bias" in state,
        k_bias="blocks.0.attn.qv_bias" not in state,
        swiglu_mlp=state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden,
        scale_mlp="blocks.0.mlp.norm.weight" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        class_token="cls_token" in state,
        reg_tokens=state["reg_token"].shape[-2] if "reg_token" in state else 0,
        pos_embed="learn" if "pos_embed" in state else "none",
        pos_antialias="pos_embed" in state and "reg_token" in state,
        **options,
    )
    shapes = encoder.state_dict()
    encoder.load_state_dict({name: value.reshape(shapes[name].shape) for name, value in state.items()})
    return encoder.eval()
