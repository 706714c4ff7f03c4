"""`biovfm <verb>`: each verb is one call into the package (https://github.com/google/python-fire)."""

from __future__ import annotations

import json
import sys

import fire

from biovfm_monai.errors import InputError, report_input_errors

__all__ = ["main"]


def quickstart(folder: str = "biovfm_quickstart", **options: object) -> str:
    """Pretrain on real images that come with the dependencies, and show what was learnt (about four minutes).

    Args:
        folder: where a copy of the bundle goes when installed without a clone.
        **options: overrides for the bundle, such as --max_epochs 2.
    """
    from biovfm_monai.quickstart import quickstart as run  # noqa: PLC0415 - MONAI takes seconds to import

    return run(folder, options)


def embed(*files: str, encoder: str, out: str = "embeddings.npz", modality: str | None = None) -> str:
    """Write one vector per image, for image files and for all images below folders.

    Args:
        *files: images, or folders of them.
        encoder: encoder file.
        out: .npz file to write, with "files" and "embeddings".
        modality: of all files, where neither a header nor a folder's name tells it.
    """
    from biovfm_monai.evaluation import embed_files  # noqa: PLC0415

    if not files:
        raise InputError("name at least one image file or folder.")
    images, width = embed_files([str(file) for file in files], encoder, out, modality)
    return f"{out}: {images} image(s), {width} numbers each"


def info(encoder: str) -> str:
    """Show how an encoder file's network is built, how its images were prepared, and how it was trained.

    Args:
        encoder: encoder file.
    """
    from biovfm_monai.checkpoints import encoder_info  # noqa: PLC0415

    return json.dumps(encoder_info(encoder), indent=1)


def convert(source: str, path: str, out: str, **options: object) -> str:
    """Turn a checkpoint of another project into an encoder file.

    Args:
        source: its layout: timm (also MAE, DINO, DINOv2, MoCo v3, BioVFM), huggingface or monai.
        path: file, or folder of Hugging Face.
        out: encoder file to write.
        **options: such as --in_channels 1, --volume_size [80,160,160], --num_heads 6, --mean 0.5 --std 0.5.
    """
    from biovfm_monai.checkpoints import convert as run  # noqa: PLC0415

    known = {"in_channels", "volume_size", "inflation", "mean", "std", "num_heads", "norm_eps", "img_size"}
    if set(options) - known:
        raise InputError(f"--{sorted(set(options) - known)[0]} is unknown. There are {', '.join(sorted(known))}.")
    left_out = run(source, path, out, **options)  # type: ignore[arg-type]
    return f"{out}: ready. Left out: {', '.join(left_out) or 'nothing'}"


def bundle(name: str, folder: str) -> str:
    """Copy a shipped bundle to FOLDER/NAME, and the overlays to FOLDER/configs, ready to edit and run.

    Args:
        name: such as biovfm_mae_pretraining.
        folder: is made if need be.
    """
    import shlex  # noqa: PLC0415

    from biovfm_monai.shipped import copy_bundle  # noqa: PLC0415

    root = str(copy_bundle(name, str(folder)))
    train = shlex.quote(root + "/configs/train.json")
    command = f"python -m monai.bundle run --config_file {train} --bundle_root {shlex.quote(root)}"
    return f"{root}: ready. Run it with\n\n    {command}\n"


def main() -> None:
    """Entry point of the `biovfm` command."""
    report_input_errors()
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments) and "--" not in arguments:
        # A verb that takes any option would take this one, too, and begin its work.
        arguments = [text for text in arguments if text not in ("--help", "-h")] + ["--", "--help"]
    fire.Fire(
        {"quickstart": quickstart, "embed": embed, "info": info, "bundle": bundle, "convert": convert},
        command=arguments,
        name="biovfm",
    )


if __name__ == "__main__":
    main()
