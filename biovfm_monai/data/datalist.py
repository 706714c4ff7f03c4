"""Datalists: items in sections of a JSON file, the way MONAI has them, or in rows of a Parquet table.

Format of the JSON: https://github.com/Project-MONAI/tutorials/blob/main/auto3dseg/README.md (sections of items).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from biovfm_monai.data.describe import folder_modality
from biovfm_monai.data.find import endings, find_images, require_modality
from biovfm_monai.data.headers import readable
from biovfm_monai.data.store import Store, is_store
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically

__all__ = ["DATALIST", "FIELDS", "iterate_datalist", "load_datalist", "read_datalist", "write_datalist"]

DATALIST = "datalist.json"
"""Name of the file that, in a dataset folder, takes precedence over looking for images; it may be a .parquet, too."""

FIELDS = pa.schema(
    {
        "image": pa.list_(pa.string()), "modality": pa.string(), "shape": pa.list_(pa.int32()), "channels": pa.int16(),
        "dtype": pa.string(), "spacing": pa.list_(pa.float64()), "anisotropy": pa.int8(), "source": pa.string(),
        "subject": pa.string(), "split": pa.string(), "alike": pa.int32(), "label": pa.string(),
    }
)  # fmt: skip
"""The fields of an item, as a table has them: an image is one file or those of its slices, a label is JSON."""

_ROWS = 65536


def load_datalist(
    dataset_dir: str | Path | None, section: str = "training", modality: str | Sequence[str] | None = None
) -> Sequence[dict[str, Any]]:
    """Items of a dataset folder: a store's, those of its datalist.json or .parquet, or else all images found below it.

    Args:
        dataset_dir: store, or folder with images, or with a datalist whose paths are relative to it.
        section: which list of the datalist; images found without one are all "training", unless they say otherwise.
        modality: of the items, one or several, where not all are wanted; those that neither a header nor a folder
            gives one have it, if it is one.

    Returns:
        Dicts with "image" (absolute path, or those of a volume's slices), "modality", and "spacing", "subject",
        "source", "label" where known; of a store itself a `Store`.

    Raises:
        InputError: when the folder is missing or empty, an item has no file or no modality, or none is of a modality
            that is asked for.
    """
    if dataset_dir is None:
        raise InputError("no folder of images is given. Give it as --dataset_dir.")
    folder = Path(dataset_dir).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Give the folder that holds your images as --dataset_dir.")
    if is_store(folder):
        return Store(folder, section, modality)
    path = next((path for path in (folder / DATALIST, folder / "datalist.parquet") if path.is_file()), None)
    if path is not None:
        items = require_modality(read_datalist(path, section)[section], modality)
    else:
        items = [item for item in find_images(folder, modality) if item.get("split", "training") == section]
    if not items:
        without = "" if path or section == "training" else f"without {DATALIST} all its images are 'training'; "
        raise InputError(f"{folder}: no image found for {section!r}; {without}supported are {endings()}.")
    return items


def read_datalist(path: Path, section: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """The items of a datalist file by section, with absolute paths.

    Args:
        path: of the file.
        section: the only one to read; None for all.

    Raises:
        InputError: when it is no datalist, or has no such section.
    """
    sections = _read_table(path) if path.suffix == ".parquet" else _read_json(path)
    if section is not None and section not in sections:
        raise InputError(
            f"{path}: has no list {section!r}, but {', '.join(sections) or 'none'}. Add it, or name another."
        )
    chosen = sections if section is None else {section: sections[section]}
    return {name: [_item(path, name, n, entry) for n, entry in enumerate(of)] for name, of in chosen.items()}


def iterate_datalist(path: Path) -> Iterator[dict[str, Any]]:
    """The items of all sections one by one, with absolute paths and the section as "split"; a table is read in pieces.

    Raises:
        InputError: when the file is no datalist.
    """
    if path.suffix == ".parquet":
        for n, (name, entry) in enumerate(_rows_of_table(path)):
            yield {"split": name, **_item(path, name, n, entry)}
    else:
        for name, items in read_datalist(path).items():
            yield from ({"split": name, **item} for item in items)


def write_datalist(path: Path, batches: Iterable[list[dict[str, Any]]]) -> None:
    """Write items into a .json or .parquet file; paths below its folder are written relative to it.

    Args:
        path: of the file.
        batches: of items, one after the other, so that a table need not be in memory whole.

    Raises:
        InputError: when the file's name ends differently.
    """
    relative = ({**item, "image": _relative(item["image"], path.parent)} for items in batches for item in items)
    with write_atomically(path) as draft:
        if path.suffix == ".json":
            sections: dict[str, list[dict[str, Any]]] = {"training": []}
            for item in relative:
                sections.setdefault(item.pop("split", "training"), []).append(item)
            draft.write_text(json.dumps(sections, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        elif path.suffix == ".parquet":
            with pq.ParquetWriter(draft, FIELDS) as writer:
                for rows in _chunks(relative):
                    writer.write_table(pa.Table.from_pylist(rows, FIELDS))
        else:
            raise InputError(f"{path}: a datalist is .json or .parquet. Give another --out.")


def _chunks(items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for item in items:
        image = item["image"] if isinstance(item["image"], list) else [item["image"]]
        label = {"label": json.dumps(item["label"])} if "label" in item else {}
        rows.append({"split": "training", **item, "image": image, **label})
        if len(rows) == _ROWS:
            yield rows
            rows = []
    yield rows


def _relative(image: str | list[str], folder: Path) -> str | list[str]:
    if isinstance(image, list):
        return [str(_relative(one, folder)) for one in image]
    path = Path(image)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else image


def _read_table(path: Path) -> dict[str, list[Any]]:
    sections: dict[str, list[Any]] = {}
    for name, entry in _rows_of_table(path):
        sections.setdefault(name, []).append(entry)
    return sections


def _rows_of_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The section and the entry of each row."""
    with readable(path, "no table that can be read"), pq.ParquetFile(path) as table:
        for rows in table.iter_batches(_ROWS):
            for row in rows.to_pylist():
                entry = {name: value for name, value in row.items() if value is not None}
                if "label" in entry:
                    entry["label"] = json.loads(entry["label"])
                if len(entry.get("image", [])) == 1:
                    entry["image"] = entry["image"][0]
                yield entry.pop("split", "training"), entry


def _read_json(path: Path) -> dict[str, list[Any]]:
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no valid JSON ({error}). Correct the file.") from error
    if not isinstance(sections, dict):
        raise InputError(f'{path}: has no sections. Write {{"training": [{{"image": "path", ...}}, ...]}}.')
    return {name: entries for name, entries in sections.items() if isinstance(entries, list)}


def _item(path: Path, section: str, number: int, entry: Any) -> dict[str, Any]:
    """An entry of a datalist, or the bare path that some datasets have, as an item."""
    entry = {"image": entry} if isinstance(entry, str) else entry
    image = entry.get("image") if isinstance(entry, dict) else None
    paths: Any = [image] if isinstance(image, str) else image
    if not (isinstance(paths, list) and paths and all(isinstance(one, str) for one in paths)):
        raise InputError(f'{path}: item {number} of {section!r} has no "image". Write {{"image": "path", ...}}.')
    files = [path.parent / one for one in paths]
    given = str(files[0]) if isinstance(image, str) else [str(file) for file in files]
    return {"modality": folder_modality(files[0], path.parent), **entry, "image": given}
