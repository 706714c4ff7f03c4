"""Encoder files: what is in them, what they make of images, and their way in and out."""

from __future__ import annotations

import json
from typing import Any

from biovfm_monai.cli.served import served
from biovfm_monai.errors import InputError

__all__ = ["convert", "embed", "export", "info"]


def embed(*files: str, encoder: str, out: str = "embeddings.npz", modality: str | None = None) -> str:
    """Write one vector per image, for image files and for all images below folders.

    Args:
        *files: images, folders of them, or folders of DICOM series.
        encoder: encoder file.
        out: .npz file to write, with "files" and "embeddings".
        modality: the only one wanted, which is also that of files that neither a header nor a folder gives one.
    """
    if not files:
        raise InputError("name at least one image file or folder.")
    from biovfm_monai.evaluation import embed_files  # noqa: PLC0415

    done, aside = embed_files([str(file) for file in files], str(encoder), str(out), modality)
    return served(str(out), done, aside)


def info(encoder: str) -> str:
    """Show how an encoder file's network is built, how its images were prepared, and how it was trained.

    Args:
        encoder: encoder file.
    """
    from biovfm_monai.checkpoints import encoder_info  # noqa: PLC0415

    return json.dumps(encoder_info(encoder), indent=1)


def convert(
    source: str,
    path: str,
    out: str,
    num_heads: int | None = None,
    in_channels: int | None = None,
    img_size: Any = None,
    volume_size: Any = None,
    inflation: str | None = None,
    mean: Any = None,
    std: Any = None,
    section: str | None = None,
) -> str:
    """Turn a checkpoint of another project into an encoder file.

    Args:
        source: its layout: biovfm, dino, dinov2, dinov3, eva02, huggingface, mae, mocov3, monai, pumit or timm.
        path: file, or folder of Hugging Face.
        out: encoder file to write.
        num_heads: of the network, where its width is none of the published ones.
        in_channels: 1 to make a colour encoder one of grey images.
        img_size: size the network was made for, where it was no square or cube, such as [224,448].
        volume_size: to make an encoder of 2D images one of volumes, such as [80,224,224].
        inflation: how, average or center.
        mean: of the normalisation of its input, one number or one per channel.
        std: likewise.
        section: which of the networks in a file, such as model or teacher.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    from biovfm_monai.checkpoints import convert as run  # noqa: PLC0415

    encoder, left_out = run(**options | {"path": str(path), "out": str(out)})
    size = " x ".join(str(n) for n in encoder.img_size)
    what = f"{size}, {encoder.in_channels} channel(s), {encoder.embed_dim} wide, {len(encoder.blocks)} blocks"
    done = f"{out}: ready. {what} of {encoder.arguments['num_heads']} heads, pooled by {encoder.global_pool!r}."
    without = "" if mean is not None else "\nWithout --mean and --std `biovfm embed` cannot use it."
    return f"{done}\nLeft out: {', '.join(left_out) or 'nothing'}{without}"


def export(target: str, path: str, out: str, img_size: Any = None, anisotropy: int | None = None) -> str:
    """Write an encoder file in another format, or all that a run has trained.

    Args:
        target: safetensors, timm, dinov2, huggingface, monai, pumit, torchscript, onnx, bundle (its
            models/model.pt); or method, with heads and teacher.
        path: encoder file; of method, a run's models/state, or one in it.
        out: file to write; of huggingface, a folder.
        img_size: of onnx, size of its input, such as [224,224].
        anisotropy: of onnx, 0 for isotropic volumes to 5 for 2D images.
    """
    from biovfm_monai.checkpoints import export as run  # noqa: PLC0415

    run(target, str(path), str(out), img_size, anisotropy)
    return f"{out}: ready."
