"""Find images on disk and describe each one as a datalist item, the way MONAI's datalist files do.

Format of the file: https://github.com/Project-MONAI/tutorials/blob/main/auto3dseg/README.md (sections of items).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from biovfm_monai.data.find import endings, find_images, folder_modality, require_modality
from biovfm_monai.errors import InputError

__all__ = ["DATALIST", "load_datalist"]

DATALIST = "datalist.json"
"""Name of the file that, in a dataset folder, takes precedence over looking for images."""


def load_datalist(
    dataset_dir: str | Path, section: str = "training", modality: str | None = None
) -> list[dict[str, Any]]:
    """Items of a dataset folder: those of its datalist.json, or else all images found below it.

    Args:
        dataset_dir: folder with images, or with a datalist.json whose paths are relative to it.
        section: which list of datalist.json; a folder without that file is all "training".
        modality: modality of every item, whatever headers and folders say.

    Returns:
        Dicts with "image" (absolute path, or those of a volume's slices), "modality", and "spacing", "subject",
        "source", "label" where known.

    Raises:
        InputError: when the folder is missing or empty, or an item has no file or no modality.
    """
    folder = Path(dataset_dir).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give the folder that holds your images as --dataset_dir.")
    if (folder / DATALIST).is_file():
        items = require_modality(_read_section(folder, section), modality)
    elif section == "training":
        items = find_images(folder, modality)
    else:
        raise InputError(f"{folder}: without {DATALIST} all its images are 'training'. Write one to have {section!r}.")
    if not items:
        raise InputError(f"{folder}: no image found for {section!r}. Supported: {endings()}.")
    return items


def _read_section(folder: Path, section: str) -> list[dict[str, Any]]:
    path = folder / DATALIST
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no valid JSON ({error}). Correct the file.") from error
    if not isinstance(sections, dict) or not isinstance(sections.get(section), list):
        names = ", ".join(sections) if isinstance(sections, dict) else "no sections at all"
        raise InputError(f"{path}: has no list {section!r}, but {names}. Add it, or name another.")
    entries = sections[section]
    items: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        image = entry.get("image") if isinstance(entry, dict) else None
        paths: Any = [image] if isinstance(image, str) else image
        if not (isinstance(paths, list) and paths and all(isinstance(one, str) for one in paths)):
            raise InputError(f'{path}: item {number} of {section!r} has no "image". Write {{"image": "path", ...}}.')
        files = [folder / one for one in paths]
        given = str(files[0]) if isinstance(image, str) else [str(file) for file in files]
        items.append({"modality": folder_modality(files[0], folder), **entry, "image": given})
    return items
