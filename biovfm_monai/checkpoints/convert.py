"""A checkpoint of another project to an encoder file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from biovfm_monai.checkpoints.encoder import save_encoder
from biovfm_monai.checkpoints.huggingface import read_config
from biovfm_monai.checkpoints.inflation import inflate, with_channels
from biovfm_monai.checkpoints.read import read_weights
from biovfm_monai.errors import InputError

__all__ = ["convert"]


def convert(
    source: str,
    path: str | Path,
    out: str | Path,
    in_channels: int | None = None,
    volume_size: Sequence[int] | None = None,
    inflation: str = "average",
    mean: float | None = None,
    std: float | None = None,
    **options: Any,
) -> list[str]:
    """Convert a checkpoint and write an encoder file.

    Args:
        source: layout of the checkpoint: what stands behind "from_" in this package, such as "timm".
        path: file, or folder of Hugging Face.
        out: encoder file to write.
        in_channels: channels of the new encoder, 1 or those of the checkpoint.
        volume_size: (depth, height, width) to make an encoder of 2D images one of volumes.
        inflation: "average" or "center", as in `inflate`.
        mean, std: of the images' normalisation, kept in the file; without them `biovfm embed` cannot use it.
        **options: of the source, such as num_heads.

    Returns:
        Names of the tensors that were left out.

    Raises:
        InputError: when the checkpoint cannot be read, is of another layout, or holds what no encoder can take.
    """
    read = _source(source, options)
    tensors = read_weights(path)
    if source == "huggingface":
        options = read_config(Path(path)) | options
    try:
        encoder, dropped = read(tensors, **options)
        if in_channels is not None:
            encoder = with_channels(encoder, in_channels)
        if volume_size is not None:
            encoder = inflate(encoder, volume_size, mode=inflation)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    preprocessing = {"mean": mean, "std": std} if mean is not None and std is not None else {}
    save_encoder(encoder, out, preprocessing, {"converted_from": source, "file": Path(path).name, "left_out": dropped})
    return dropped


def _source(name: str, options: dict[str, Any]) -> Callable[..., Any]:
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
