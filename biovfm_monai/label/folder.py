"""The folder of a MONAI Label app: main.py and, below model/, the bundles it serves (docs/monai-label.md)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from biovfm_monai.errors import InputError
from biovfm_monai.shipped import copy_bundle

__all__ = ["TASKS", "bundles_of", "init_app"]

TASKS = ("segmentation", "classification", "embedding", "pretraining")
"""What an app can do with a bundle; its folder's name ends with one of them."""

_MAIN = '''"""A MONAI Label app that serves the bundles below model/: `monailabel start_server --app {app}`."""

from biovfm_monai.label.app import BundleApp

__all__ = ["BundleApp"]
'''


def init_app(app: str | Path, bundles: Sequence[str | Path]) -> Path:
    """Write a MONAI Label app.

    Args:
        app: folder to make.
        bundles: names of shipped ones, or folders of your own, which are copied with their models.

    Returns:
        The folder.

    Raises:
        InputError: when the folder is not empty, or a bundle is unknown, given twice or has no task of `TASKS`.
    """
    app = Path(app).expanduser()
    names = [Path(bundle).name for bundle in bundles]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--bundles {','.join(names)!r} must be one or more different bundles. Name them.")
    for name in names:
        _require_task(name)
    if app.exists() and (not app.is_dir() or any(app.iterdir())):
        raise InputError(f"{app}: is already there, and would be overwritten. Name another folder, or remove it.")
    folders = [Path(bundle).expanduser() for bundle in bundles]
    own = [folder for folder in folders if len(folder.parts) > 1 or folder.is_dir()]
    for folder in own:
        if not (folder / "configs/metadata.json").is_file():
            raise InputError(f"{folder}: is no bundle, as it has no configs/metadata.json. Correct the path.")
    for folder, name in zip(folders, names, strict=True):
        if folder in own:
            shutil.copytree(folder, app / "model" / name, ignore=shutil.ignore_patterns("eval", "samples", "data"))
        else:
            copy_bundle(name, app / "model")
    (app / "main.py").write_text(_MAIN.format(app=app.name), encoding="utf-8")
    return app


def bundles_of(app: str | Path, task: str) -> list[Path]:
    """The app's bundles for a task."""
    return sorted(path.parent.parent for path in Path(app).glob(f"model/*_{task}/configs/metadata.json"))


def _require_task(name: str) -> None:
    if not name.endswith(tuple(f"_{task}" for task in TASKS)):
        raise InputError(f"{name}: a bundle's folder must end with _{', _'.join(TASKS)}, its task. Rename it.")
