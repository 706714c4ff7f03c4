"""A checkpoint of another project to an encoder file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from biovfm_monai.checkpoints.encoder import save_encoder
from biovfm_monai.checkpoints.huggingface import read_config
from biovfm_monai.checkpoints.inflation import inflate, with_channels
from biovfm_monai.checkpoints.read import read_weights, require_other
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["convert"]


def convert(
    source: str,
    path: str | Path,
    out: str | Path,
    section: str | None = None,
    in_channels: int | None = None,
    volume_size: Sequence[int] | None = None,
    inflation: str = "average",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **options: Any,
) -> tuple[ViT, list[str]]:
    """Convert a checkpoint and write an encoder file.

    Args:
        source: layout of the checkpoint: what stands behind "from_" in this package, such as "timm".
        path: file, or folder of Hugging Face.
        out: encoder file to write.
        section: which of the networks in a file, as in `read_weights`.
        in_channels: channels of the new encoder, 1 or those of the checkpoint.
        volume_size: (depth, height, width) to make an encoder of 2D images one of volumes.
        inflation: "average" or "center", as in `inflate`.
        mean, std: of the images' normalisation, one number or one per channel, kept in the file; without them
            `biovfm embed` cannot use it.
        **options: of the source: num_heads, and img_size.

    Returns:
        The encoder, and the names of the tensors that were left out.

    Raises:
        InputError: when the checkpoint cannot be read, is of another layout, or holds what no encoder can take.
    """
    read, path = _source(source, options), Path(path)
    require_other(path, Path(out))
    tensors = read_weights(path, section)
    if source == "huggingface":
        options = read_config(path) | options
    try:
        encoder, dropped = read(tensors, **options)
        if in_channels is not None:
            encoder = with_channels(encoder, in_channels)
        if volume_size is not None:
            encoder = inflate(encoder, volume_size, mode=inflation)
        preprocessing = _normalisation(mean, std, encoder.in_channels)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    save_encoder(encoder, out, preprocessing, {"converted_from": source, "file": path.name, "left_out": dropped})
    return encoder, dropped


def _normalisation(mean: Any, std: Any, channels: int) -> dict[str, Any]:
    """What an encoder file says of the normalisation, once it is known to mean something."""
    if mean is None and std is None:
        return {}
    for name, value in (("mean", mean), ("std", std)):
        numbers = value if isinstance(value, Sequence) else [value]
        known = all(isinstance(n, int | float) and math.isfinite(n) and (n > 0 or name == "mean") for n in numbers)
        if not known or len(numbers) not in (1, channels):
            raise InputError(f"--{name} {value!r} must be one number or {channels}, of --std above 0. Give both.")
    return {name: list(v) if isinstance(v, Sequence) else v for name, v in (("mean", mean), ("std", std))}


def _source(name: str, options: dict[str, Any]) -> Callable[..., tuple[ViT, list[str]]]:
    """The function that reads a layout, once it is known to take the options."""
    from biovfm_monai import checkpoints  # noqa: PLC0415 - its names are the list of sources

    sources = [known.removeprefix("from_") for known in checkpoints.__all__ if known.startswith("from_")]
    if name not in sources:
        raise InputError(f"source {name!r} is unknown. Give one of {', '.join(sources)}.")
    read: Callable[..., Any] = getattr(checkpoints, f"from_{name}")
    given = [*inspect.signature(convert).parameters][3:-1] + [*inspect.signature(read).parameters][1:]
    for option in options:
        if option not in given:
            raise InputError(f"--{option} is unknown for {name}. There are {', '.join(given)}.")
    return read
