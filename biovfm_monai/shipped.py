"""Where the bundles and overlays are that come with the package, and how to get a copy of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from biovfm_monai.errors import InputError

__all__ = ["copy_bundle", "is_checkout", "shipped_folder"]

_PACKAGE = Path(__file__).parent


def is_checkout() -> bool:
    """Whether the package runs from a clone of the repository; a wheel carries bundles inside the package."""
    return not (_PACKAGE / "bundles").is_dir()


def shipped_folder(kind: str) -> Path:
    """The folder "bundles" or "configs" that belongs to this installation."""
    return (_PACKAGE.parent if is_checkout() else _PACKAGE) / kind


def copy_bundle(name: str, folder: str | Path) -> Path:
    """Copy a shipped bundle to folder/name and the overlays to folder/configs, ready to edit and run.

    What a run has written into the shipped bundle is left out.

    Raises:
        InputError: when there is no such bundle, or one is already there.
    """
    source = shipped_folder("bundles") / name
    names = sorted(p.name for p in shipped_folder("bundles").iterdir() if (p / "configs").is_dir())
    if name not in names:
        raise InputError(f"there is no bundle {name!r}, but {', '.join(names)}.")
    target = Path(folder).expanduser() / name
    if target.exists():
        raise InputError(f"{target}: is already there, and would be overwritten. Name another folder, or remove it.")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("models", "eval", "samples", "data"))
    for overlay in shipped_folder("configs").glob("*.json"):
        copy = target.parent / "configs" / overlay.name
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists():
            shutil.copyfile(overlay, copy)
    return target
