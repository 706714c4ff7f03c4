"""A checkpoint of another project to an encoder file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biovfm_monai.checkpoints.conversion import read_weights
from biovfm_monai.checkpoints.encoder import save_encoder
from biovfm_monai.checkpoints.inflation import inflate, with_channels
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
    from biovfm_monai import checkpoints  # noqa: PLC0415 - its names are the list of sources

    sources = [name.removeprefix("from_") for name in checkpoints.__all__ if name.startswith("from_")]
    if source not in sources:
        raise InputError(f"source {source!r} is unknown. Give one of {', '.join(sources)}.")
    try:
        encoder, dropped = getattr(checkpoints, f"from_{source}")(read_weights(path), **_config(Path(path)), **options)
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except TypeError as error:
        raise InputError(f"source {source!r} does not take these options ({error}).") from error
    if in_channels is not None:
        encoder = with_channels(encoder, in_channels)
    if volume_size is not None:
        encoder = inflate(encoder, volume_size, mode=inflation)
    preprocessing = {"mean": mean, "std": std} if mean is not None and std is not None else {}
    save_encoder(encoder, out, preprocessing, {"converted_from": source, "file": Path(path).name, "left_out": dropped})
    return dropped


def _config(path: Path) -> dict[str, Any]:
    """What shapes do not tell, from the config.json beside Hugging Face's weights.

    Raises:
        InputError: when the network computes what `ViT` does not.
    """
    file = path / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    gated = config.get("use_gated_mlp", False)
    activation = config.get("hidden_act", "gelu")
    if activation != ("silu" if gated else "gelu"):
        raise InputError(f"{file}: hidden_act {activation!r} is not what our {'SwiGLU' if gated else 'MLP'} computes.")
    return {"num_heads": config.get("num_attention_heads"), "norm_eps": config.get("layer_norm_eps")}
