"""Images with their classes: found in a folder, checked, and shared out by subject."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biovfm_monai.data.class_labels import indicators, listed, require_classes
from biovfm_monai.data.datalist import DATALIST, read_datalist
from biovfm_monai.data.find import find_images, require_modality
from biovfm_monai.data.headers import ARRAYS, readable, suffix
from biovfm_monai.data.store import Store, is_store
from biovfm_monai.data.subjects import few_subjects, share_out
from biovfm_monai.errors import InputError

__all__ = ["load_classification"]

logger = logging.getLogger(__name__)

_KEPT = ("image", "modality", "prepared", "label")


def load_classification(
    dataset_dir: str | Path,
    classes: Sequence[str],
    task: str = "multiclass",
    section: str = "training",
    fraction: float = 1.0,
    modality: str | None = None,
    label_column: str = "label",
    subject_column: str = "subject",
    labelled: bool = True,
) -> list[dict[str, Any]]:
    """Images and their classes of a dataset folder.

    That is an archive of MedMNIST, or a folder with one; a store; a folder with a datalist.json or .parquet; one with a
    table (.csv) whose first column is the image and that has a column of labels, or one of 0 and 1 per class; or one
    with a folder of images per class. Where there is no section "validation", images are shared out by subject: of
    every five of a class, in their order, three are "training", one "validation" and one "test".

    Args:
        dataset_dir: folder, or an archive's file.
        classes: names, in the order of the network's channels.
        task: "multiclass", one of the classes; "ordinal", the same, and they have an order; "multilabel", any of them.
        section: which images.
        fraction: share of the subjects to use, of each class alike, always the same ones.
        modality: of the images, where not all are wanted; those that tell none have it.
        label_column, subject_column: of a table.
        labelled: whether images need a label; else labels are left out, and a folder without any is all its images.

    Returns:
        Dicts with "image", "modality" and "label", a 0 or 1 per class.

    Raises:
        InputError: when there are no such images, a label is none of the classes, or a class has no image.
    """
    require_classes(classes, task)
    folder = Path(dataset_dir).expanduser().resolve()
    columns = {"label": label_column, "subject": subject_column}
    sections = _sections(folder, classes, section, modality, columns)
    if not labelled:
        found = sections.get(section) or ([] if _labelled(sections) else sections.get("training", []))
        return _chosen(folder, found, sections, section, ("image", "modality", "prepared"))
    sections = {name: _encoded(folder, items, classes, task) for name, items in sections.items()}
    if "validation" not in sections and not is_store(folder):
        sections = share_out(folder, sections.get("training", []), _class_of)
    items = few_subjects(sections.get(section, []), fraction, _class_of)
    _require_all_classes(folder, items, classes, task, section)
    return _chosen(folder, items, sections, section, _KEPT)


def _labelled(sections: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    return any("label" in item for items in sections.values() for item in items)


def _chosen(
    folder: Path, items: Sequence[Mapping[str, Any]], sections: Mapping[str, Any], section: str, keys: Sequence[str]
) -> list[dict[str, Any]]:
    if not items:
        raise InputError(f"{folder}: has no images for {section!r}, but {', '.join(sections) or 'none'}. Name another.")
    return [{key: item[key] for key in keys if key in item} for item in items]


def _sections(
    folder: Path, classes: Sequence[str], section: str, modality: str | None, columns: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The items by section, labels as they are said."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder. Give the one that holds your images as --dataset_dir.")
    if folder.is_dir() and is_store(folder):
        return {section: list(Store(folder, section, modality))}
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    archives = [file for file in files if suffix(file) in ARRAYS]
    if len(archives) > 1:
        raise InputError(f"{folder}: holds {len(archives)} archives. Give one, such as --dataset_dir {archives[0]}.")
    datalist = next((file for file in files if file.name in (DATALIST, "datalist.parquet")), None)
    if datalist is not None:
        found = read_datalist(datalist)
        return {name: require_modality(items, modality) for name, items in found.items()}
    tables = [file for file in files if suffix(file) == ".csv"]
    if len(tables) > 1:
        names = ", ".join(file.name for file in tables)
        raise InputError(f"{folder}: holds {len(tables)} tables, {names}. Leave one, that of the labels.")
    if tables:
        items = require_modality(_of_table(tables[0], classes, columns), modality)
    else:
        items = [_by_folder(item, classes) for item in find_images(folder, modality)]
    sections: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        sections.setdefault(item.get("split", "training"), []).append(item)
    return sections


def _of_table(path: Path, classes: Sequence[str], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    with readable(path, "no table that can be read"), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    per_class = set(map(str, classes)) <= set(names)
    if not names or not (per_class or columns["label"] in names):
        raise InputError(
            f"{path}: has the columns {', '.join(names) or 'none'}; there must be one per class "
            f"({', '.join(map(str, classes))}), or one {columns['label']!r}. Name it with --label_column."
        )
    if columns["subject"] not in names:
        logger.warning("%s: has no column %r; every image is taken for another subject's.", path, columns["subject"])
    items = []
    for row in rows:
        label = [row[str(name)] for name in classes] if per_class else row[columns["label"]]
        said = {"split": row.get("split"), "subject": row.get(columns["subject"]), "modality": row.get("modality")}
        known = {key: value for key, value in said.items() if value}
        items.append({"modality": None, **known, "image": str(path.parent / row[names[0]]), "label": label})
    return items


def _by_folder(item: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    if "label" in item or not isinstance(item["image"], str):
        return item
    name = next((parent.name for parent in Path(item["image"]).parents if parent.name in classes), None)
    return item if name is None else {**item, "label": name}


def _encoded(folder: Path, items: Sequence[dict[str, Any]], classes: Sequence[str], task: str) -> list[dict[str, Any]]:
    done, wrong = [], {}
    for item in items:
        if "label" not in item:
            raise InputError(f"{item['image']}: has no label. Write one into a {DATALIST} or a table, see the README.")
        label = indicators(item["label"], classes, task)
        if label is None:
            wrong[repr(item["label"])] = str(item["image"])
        done.append({**item, "label": label})
    if wrong:
        shown = ", ".join(list(wrong)[:10]) + (", ..." if len(wrong) > 10 else "")
        raise InputError(
            f"{folder}: of labels {shown} (such as of {next(iter(wrong.values()))}) none can be used; the classes are "
            f"{listed(classes)}. Correct them, or give --classes or --task."
        )
    return done


def _class_of(item: Mapping[str, Any]) -> str:
    return str(item["label"])


def _require_all_classes(
    folder: Path, items: Sequence[Mapping[str, Any]], classes: Sequence[str], task: str, section: str
) -> None:
    if not items:
        return
    counts = np.sum([item["label"] for item in items], axis=0)
    for rule, wrong in (("is", counts == 0), ("is not", counts == len(items))):
        names = [str(name) for name, bad in zip(classes, wrong, strict=True) if bad]
        if names and not (task != "multilabel" and rule == "is not" and (counts == 0).any()):
            raise InputError(
                f"{folder}: none of {len(items)} image(s) for {section!r} {rule} of class {', '.join(names)}. Add "
                "some, give a larger --fraction, or leave the class out of the data and of --classes."
            )
