"""Images with label maps: found in a folder, and shared out by subject.

The folder layout with a dataset.json is the Medical Segmentation Decathlon's (http://medicaldecathlon.com).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biovfm_monai.data.datalist import DATALIST, load_datalist, read_datalist
from biovfm_monai.data.headers import suffix
from biovfm_monai.data.subjects import few_subjects, share_out
from biovfm_monai.errors import InputError

__all__ = ["load_segmentation"]

_MSD = "dataset.json"
_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))


def load_segmentation(
    dataset_dir: str | Path, section: str = "training", fraction: float = 1.0, labelled: bool = True
) -> list[dict[str, Any]]:
    """Images and their label maps of a dataset folder.

    That is one with a datalist.json; with MSD's dataset.json; with folders imagesTr and labelsTr (images and labels) of
    files of the same names but for their endings; or with a folder per image that holds folders images and masks, the
    latter with a file per object (https://doi.org/10.1038/s41592-019-0612-7). Where a datalist has no "validation", and
    in the others, the labelled images are shared out by subject: of every five in their order three are "training",
    one "validation" and one "test".

    Args:
        dataset_dir: folder.
        section: which images.
        fraction: share of the subjects to use, always the same ones; a smaller share is part of a larger one.
        labelled: whether images without a label map are an error; else a folder without any layout is all its images.

    Returns:
        Dicts with "image" and "label", absolute paths, and what else the datalist says.

    Raises:
        InputError: when the folder has no such images, or a label is missing.
    """
    folder = Path(dataset_dir).expanduser().resolve()
    found = _sections(folder)
    if found is None:
        if labelled:
            raise InputError(
                f"{folder}: has neither a {DATALIST}, nor a {_MSD}, nor folders images and labels, so no label maps. "
                "Lay it out so, or give another --dataset_dir."
            )
        return list(load_datalist(folder))
    items = found.get(section, [])
    if not items:
        raise InputError(f"{folder}: has no images for {section!r}, but {', '.join(found) or 'none'}. Name another.")
    for item in items:
        if labelled and not _are_files(item.get("label")):
            raise InputError(
                f"{item['image']}: its label map is {item.get('label')!r}, and that is no file. Correct the datalist."
            )
    return few_subjects(items, fraction)


def _sections(folder: Path) -> dict[str, list[dict[str, Any]]] | None:
    """The items of a folder by section, labels as absolute paths; None when it has no layout that is known."""
    path = next((folder / name for name in (DATALIST, _MSD) if (folder / name).is_file()), None)
    if path is not None:
        sections = {name: [_with_label(item, folder) for item in items] for name, items in read_datalist(path).items()}
        whole = "validation" in sections
    else:
        pair = next((pair for pair in _FOLDERS if all((folder / name).is_dir() for name in pair)), None)
        items = _one_folder_each(folder) if pair is None else _pairs(folder / pair[0], folder / pair[1])
        if not items:
            return None
        sections, whole = {"training": items}, False
    return sections if whole else share_out(folder, sections.get("training", []))


def _pairs(images: Path, labels: Path) -> list[dict[str, Any]]:
    found = {_stem(file): str(file) for file in _files(labels)}
    return [{"image": str(file), "label": found.get(_stem(file), str(labels / file.name))} for file in _files(images)]


def _stem(file: Path) -> str:
    return file.name[: len(file.name) - len(suffix(file))]


def _one_folder_each(folder: Path) -> list[dict[str, Any]]:
    items = []
    for one in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (one / "images").is_dir() and (one / "masks").is_dir():
            label = [str(file) for file in _files(one / "masks")]
            items += [{"image": str(file), "label": label, "subject": one.name} for file in _files(one / "images")]
    return items


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _are_files(label: Any) -> bool:
    paths = label if isinstance(label, list) else [label]
    return bool(paths) and all(isinstance(path, str) and Path(path).is_file() for path in paths)


def _with_label(item: dict[str, Any], folder: Path) -> dict[str, Any]:
    label = item.get("label")
    if isinstance(label, list):
        return {**item, "label": [str(folder / path) for path in label]}
    return {**item, "label": str(folder / label)} if isinstance(label, str) else item
