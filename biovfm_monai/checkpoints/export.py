"""An encoder file to the formats of other projects, and a training state to all its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from biovfm_monai import checkpoints
from biovfm_monai.checkpoints.encoder import load_encoder, save_embedder
from biovfm_monai.checkpoints.huggingface import to_huggingface
from biovfm_monai.checkpoints.onnx import write_onnx
from biovfm_monai.checkpoints.read import require_other
from biovfm_monai.checkpoints.state import damage, newest_state, read_state
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically
from biovfm_monai.networks import ViT

__all__ = ["export"]

_OF_OURS = ("safetensors", "torchscript", "onnx", "bundle", "method")


def export(
    target: str,
    path: str | Path,
    out: str | Path,
    img_size: Sequence[int] | None = None,
    anisotropy: int | None = None,
) -> None:
    """Write an encoder file's weights in another format.

    Args:
        target: "safetensors", its tensors alone; "timm", also read by the code of MAE and DINO; "dinov2";
            "huggingface", a folder; "monai", for MONAI's `ViT`; "pumit"; "torchscript"; "onnx"; "bundle", the
            models/model.pt of a MONAI bundle; or "method", everything that was trained, heads and teacher too, from a
            state to resume from.
        path: encoder file; of "method", the run's models/state, or one in it.
        out: file to write, safetensors if it ends so; of "huggingface", a folder.
        img_size: of "onnx", size of its input; None for what the encoder was made for.
        anisotropy: of "onnx", degree of anisotropy of its input, as in `ViT.patchify`.

    Raises:
        InputError: when the format is unknown or has no place for something, or a file cannot be used.
    """
    if target not in formats():
        raise InputError(f"format {target!r} is unknown. Give one of {', '.join(formats())}.")
    if target != "onnx" and (img_size, anisotropy) != (None, None):
        raise InputError(f"--img_size and --anisotropy are of onnx; {target} takes images of any size.")
    if anisotropy is not None and not isinstance(anisotropy, int):
        raise InputError(f"anisotropy must be 0 (isotropic) to 5 (a 2D image), got {anisotropy!r}. Correct it.")
    if img_size is not None and not isinstance(img_size, Sequence):
        raise InputError(f"img_size {img_size!r} must be two or three numbers, such as [224,224].")
    path, out = Path(path), Path(out)
    require_other(path, out)
    if target == "method":
        _write(_trained(path), out)
        return
    encoder = load_encoder(path)
    try:
        _export(target, encoder, out, img_size, anisotropy)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def formats() -> list[str]:
    """What an encoder file can be exported to."""
    return [*_OF_OURS, *(name.removeprefix("to_") for name in checkpoints.__all__ if name.startswith("to_"))]


def _export(target: str, encoder: ViT, out: Path, img_size: Sequence[int] | None, anisotropy: int | None) -> None:
    match target:
        case "safetensors":
            _write(encoder.state_dict(), out)
        case "huggingface":
            _write_folder(encoder, out)
        case "torchscript":
            with write_atomically(out) as draft:
                torch.jit.script(encoder).save(draft)
        case "onnx":
            write_onnx(encoder, out, img_size, anisotropy)
        case "bundle":
            save_embedder(encoder, out)
        case _:
            _write(getattr(checkpoints, f"to_{target}")(encoder), out)


def _write(tensors: Mapping[str, Tensor], out: Path) -> None:
    with write_atomically(out) as draft:
        if out.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata={"format": "pt"})
        else:
            torch.save(dict(tensors), draft)


def _write_folder(encoder: ViT, out: Path) -> None:
    """Write a folder as Hugging Face's `save_pretrained` does."""
    if (out / "model.safetensors").exists():
        raise InputError(f"{out} holds a model already. Give another folder.")
    state, config = to_huggingface(encoder)
    _write(state, out / "model.safetensors")
    with write_atomically(out / "config.json") as draft:
        draft.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _trained(path: Path) -> dict[str, Tensor]:
    """The weights in a state to resume from."""
    path = newest_state(path)
    if reason := damage(path):
        raise InputError(f"{path}: is damaged ({reason}). Give another of the run's models/state.")
    return {name.removeprefix("method."): x for name, x in read_state(path, "method.").items()}
