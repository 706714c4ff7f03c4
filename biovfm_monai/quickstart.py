"""The quickstart: one visible bundle command on real images, then what it learnt, in a few lines."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from biovfm_monai.data import load_datalist
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import KNNProbe
from biovfm_monai.shipped import copy_bundle, is_checkout, shipped_folder

__all__ = ["quickstart"]

_BUNDLE = "biovfm_mae_pretraining"


def quickstart(folder: str | Path = "biovfm_quickstart", options: dict[str, Any] | None = None) -> str:
    """Pretrain on the sample images and score the encoder.

    Args:
        folder: where a copy of the bundle goes when the package was installed without a clone.
        options: overrides of the bundle's keys, as on its command line.

    Returns:
        The summary.

    Raises:
        InputError: when the training command fails, or an option would put results elsewhere.
    """
    fixed = {"output_dir", "ckpt_dir", "dataset_dir", "bundle_root"} & set(options or {})
    if fixed:
        raise InputError(
            f"--{fixed.pop()} cannot be changed in the quickstart. Run the bundle's command, which it prints."
        )
    root = shipped_folder("bundles") / _BUNDLE if is_checkout() else Path(folder).resolve() / _BUNDLE
    if not root.exists():
        copy_bundle(_BUNDLE, folder)
    root = _short(root)
    command = ["-m", "monai.bundle", "run", "--config_file", f"{root}/configs/train.json", "--bundle_root", str(root)]
    command += [text for name, value in (options or {}).items() for text in (f"--{name}", str(value))]
    visible = f"{_program('python')} {shlex.join(command)}"
    sys.stdout.write(f"\nThis is all that runs now; copy it and change it:\n\n    {visible}\n\n")
    sys.stdout.flush()
    begun = time.monotonic()
    if subprocess.run([sys.executable, *command], check=False).returncode:  # noqa: S603 - our own interpreter and bundle
        raise InputError("the training command failed; its message stands above.")
    minutes = (time.monotonic() - begun) / 60
    samples = root / "samples"
    scores = KNNProbe(
        root / "models/encoder.safetensors",
        load_datalist(samples, "place_training"),
        load_datalist(samples, "place_test"),
        output_path=root / "eval/knn.json",
        details_dir=root / "eval",
    ).run()
    return _summary(root, scores, minutes, command)


def _short(path: Path) -> Path:
    """Relative to the working directory where that is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _program(name: str) -> str:
    """How to call a program of this environment: by its name if that finds it, else by its path."""
    path = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(path) else shlex.quote(str(_short(path)))


def _summary(root: Path, scores: dict[str, Any], minutes: float, command: list[str]) -> str:
    lines = [json.loads(line) for line in (root / "eval/log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    rest = lines[1:] or lines
    seconds = sum(line["seconds"] for line in rest)
    images = last["samples"] - (first["samples"] if len(lines) > 1 else 0)
    name = shlex.quote(str(root))
    run = f"{_program('python')} {shlex.join(command[:7])}"
    biovfm = _program("biovfm")
    return f"""
Pretrained a vision transformer on {last["samples"]} crops of real images in {minutes:.1f} minutes.
{images / seconds:.0f} images/s; the loss fell from {first["loss"]:.3f} to {last["loss"]:.3f}.

Which ninth of the brain does a crop come from? kNN on {scores["test_images"]} crops of slices that were held out,
each turned, mirrored, zoomed and changed in contrast at random (chance {scores["chance"]:.1%}):

    pretrained encoder    {scores["encoder"]:.1%}
    untrained encoder     {scores["random_init"]:.1%}
    raw pixels            {scores["raw_pixels"]:.1%}

What is where:
    encoder               {root}/models/encoder.safetensors
    checkpoint            {root}/models/state
    reconstructions       {root}/eval/reconstruction.png
    TensorBoard log       {root}/eval/tensorboard

What to try next:
    {_program("tensorboard")} --logdir {name}/eval/tensorboard
    {biovfm} info {name}/models/encoder.safetensors
    {biovfm} embed {name}/samples/fundus --encoder {name}/models/encoder.safetensors --out embeddings.npz
    {run} --dataset_dir FOLDER_OF_YOUR_IMAGES --modality mri
"""
