"""Survey any folders into one datalist: what is there, what of it can be used, and how it is split by patient."""

from __future__ import annotations

import csv
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from biovfm_monai.data import modalities
from biovfm_monai.data.datalist import read_datalist, write_datalist
from biovfm_monai.data.find import NO_IMAGE, Findings, Rejected, hashed, look_into, survey
from biovfm_monai.data.overview import Overview
from biovfm_monai.data.reading import part_of
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically

__all__ = ["index"]

_SUBJECT = re.compile(r"(?:^|[/_.-])(sub-[0-9A-Za-z]+)")
_Rules = list[tuple[re.Pattern[str], Mapping[str, Any] | None]]
_SETTABLE = ("alike", "label", "modality", "source", "split", "subject")


def index(
    paths: Sequence[str | Path],
    out: str | Path,
    modality: str | None = None,
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    salt: str | None = None,
    num_workers: int = 1,
) -> str:
    r"""Describe all images below folders in one datalist, with `rejected.csv` and `thumbnails.png` beside it.

    Only headers are read, but for the thumbnails. A folder's name is its images' source. The split is drawn by subject
    from the seed, so that images found later change nothing for those that are there; an image without a subject is one
    of its own. What already has a split keeps it.

    Args:
        paths: folders, image files, datalists (.json), or tables of paths (.csv with a column "image" and any of the
            fields of an item).
        out: .json or .parquet file to write.
        modality: of all images that neither a header nor a folder's name nor a setting gives one.
        settings: regular expression -> fields of the images whose path it matches, in which "\1" stands for its first
            group: {"(P[0-9]+)_t2": {"modality": "mri", "subject": "\1"}}. None leaves them out: {"_mask": None}.
        validation: share of the subjects in the section "validation".
        test: share of the subjects in the section "test".
        seed: of the split.
        salt: makes subjects of patients' identifiers; a random one, the default, gives no two datalists the same.
        num_workers: processes that read headers.

    Returns:
        A table of what was found, and what was left out.

    Raises:
        InputError: when a path or setting means nothing, or there is no image.
    """
    out = Path(out).expanduser().resolve()
    if out.suffix not in (".json", ".parquet"):
        raise InputError(f"{out}: a datalist is .json or .parquet. Give another --out.")
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError(f"validation {validation} and test {test} must be shares below 1 together. Correct them.")
    rules = _compiled(settings or {})
    salt = salt or secrets.token_hex(16)
    table = Overview()
    rejected: list[Rejected] = []

    listed, thumbnails = out.with_name("rejected.csv"), out.with_name("thumbnails.png")
    own = {str(path) for path in (out, listed, thumbnails)}

    def batches() -> Iterator[list[dict[str, Any]]]:
        for path in paths:
            for found in tqdm(_look(Path(path).expanduser(), num_workers), "folders", leave=False, delay=2):
                rejected.extend(one for one in found.rejected if one.file not in own)
                kept = []
                for item in found.items:
                    reason = _complete(item, rules, modality)
                    if reason and _path(item) not in own:
                        rejected.append(Rejected(_path(item), reason))
                    elif _path(item) not in own:
                        kept.append(_placed(item, validation, test, seed, salt))
                table.add(kept)
                yield kept
        _write_rejected(listed, rejected)
        if not table.groups:
            raise InputError(f"no image found in {', '.join(str(path) for path in paths)}. See {listed}.")

    write_datalist(out, batches())
    failures = table.draw(thumbnails)
    return "\n".join([*table.lines(), *_report(out, rejected, failures)])


def _write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "reason"), *rejected])


def _look(path: Path, num_workers: int) -> Iterator[Findings]:
    """Survey one path; in a table or datalist each entry keeps the fields that it states."""
    entries = None
    if path.suffix == ".csv" and path.is_file():
        entries = _rows(path)
    elif path.suffix == ".json" and path.is_file():
        sections = read_datalist(path)
        entries = [{"split": name, **item} for name, items in sections.items() for item in items]
    if entries is None:
        for found in survey(path, num_workers):
            yield _with_fields(found, {"source": path.resolve().stem if path.is_file() else path.resolve().name})
        return
    # The parts of one file follow each other, of which there may be many thousands.
    surveyed = lru_cache(maxsize=1)(_surveyed)
    for entry in entries:
        fields = {name: entry[name] for name in _SETTABLE if entry.get(name) not in (None, "")}
        yield _with_fields(_entry(entry["image"], surveyed), {"source": path.stem, **fields})


def _surveyed(file: Path) -> tuple[dict[str | None, list[dict[str, Any]]], list[Rejected]]:
    """The items of a file or folder by the part that they are, and what cannot be used."""
    parts: dict[str | None, list[dict[str, Any]]] = {None: []}
    rejected = []
    for found in survey(file):
        rejected += found.rejected
        for item in found.items:
            parts[None].append(item)
            part = part_of(item["image"])[1] if isinstance(item["image"], str) else None
            if part is not None:
                parts[part] = [item]
    return parts, rejected


def _entry(image: str | list[str], surveyed: Callable[[Path], Any]) -> Findings:
    """What one entry of a table names: a file, a part of one, a folder, or the slices of a volume."""
    if isinstance(image, list):
        files = [Path(path).resolve() for path in image]
        found = look_into(files[0].parent, files, files[0].parent)
        # A series that is all that was looked at goes by its folder, which may hold others.
        whole = str(files[0].parent)
        named = [str(file) for file in files]
        return Findings(
            [item | {"image": named} if item["image"] == whole else item for item in found.items], found.rejected
        )
    file, part = part_of(image)
    try:
        parts, rejected = surveyed(file)
    except InputError as error:
        return Findings([], [Rejected(image, str(error))])
    items = parts.get(part, [])
    if not items and not rejected:
        rejected = [Rejected(image, f"{image}: names no image. Correct the entry.")]
    return Findings(items, rejected)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: list[dict[str, Any]] = [dict(row) for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no table that can be read ({error}). Save it as UTF-8.") from error
    if not rows or not rows[0].get("image"):
        raise InputError(f'{path}: has no column "image". Name the column of the paths so.')
    for row in rows:
        row["image"] = str(path.parent / str(row["image"]))
        for name in ("alike", "label"):
            if row.get(name):
                row[name] = _parsed(row[name])
    return rows


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _with_fields(found: Findings, fields: Mapping[str, Any]) -> Findings:
    return Findings([{**item, **fields} for item in found.items], found.rejected)


def _compiled(settings: Mapping[str, Mapping[str, Any] | None]) -> _Rules:
    rules: _Rules = []
    for pattern, fields in settings.items():
        try:
            rules.append((re.compile(pattern), None if fields is None else dict(fields)))
        except (re.error, TypeError, ValueError) as error:
            raise InputError(f"setting {pattern!r}: {error}. Give {{'expression': {{'field': value}}}}.") from error
        wrong = next((name for name in fields or {} if name not in _SETTABLE), None)
        if wrong is not None:
            raise InputError(f"setting {pattern!r}: there is no field {wrong!r} to set, but {', '.join(_SETTABLE)}.")
    return rules


def _path(item: Mapping[str, Any]) -> str:
    return Path(item["image"] if isinstance(item["image"], str) else item["image"][0]).as_posix()


def _complete(item: dict[str, Any], rules: _Rules, modality: str | None) -> str | None:
    """Fill in what the path and the settings say; returns why the image is left out, if it is."""
    path = _path(item)
    if not {"subject", "patient"} & set(item) and (match := _SUBJECT.search(path)):
        item["subject"] = match[1]
    for pattern, fields in rules:
        match = pattern.search(path)
        if match and fields is None:
            return f"{path}: left out, as asked for {pattern.pattern!r}."
        for name, value in (fields or {}).items() if match else ():
            item[name] = match.expand(value) if match and isinstance(value, str) else value
    item["modality"] = item.get("modality") or modality
    if item["modality"] in modalities.__all__:
        return None
    what = "cannot tell the modality" if item["modality"] is None else f"there is no modality {item['modality']!r}"
    remedy = "Put the file into a folder named after it, or give --modality or --settings"
    return f"{path}: {what}. {remedy} ({', '.join(modalities.__all__)})."


def _placed(item: dict[str, Any], validation: float, test: float, seed: int, salt: str) -> dict[str, Any]:
    """An item in its section, a pure function of its patient, or else its subject or file, and of the seed."""
    item["source"] = str(item["source"])
    patient = item.pop("patient", None)
    if item.get("subject") is not None:
        item["subject"] = str(item["subject"])
        who = [item["source"], item["subject"]]
    elif patient is not None:
        # The same patient may be found in several folders.
        item["subject"], who = hashed(patient, salt), [patient]
    else:
        who = [item["source"], *part_of(_path(item))[0].parts[-2:]]
    place = int.from_bytes(blake2b(json.dumps([seed, *who]).encode(), digest_size=8).digest()) / 2**64
    drawn = "test" if place < test else "validation" if place < test + validation else "training"
    item["split"] = str(item.get("split") or drawn)
    return item


def _report(out: Path, rejected: Sequence[Rejected], failures: Sequence[str]) -> list[str]:
    foreign = sum(one.reason == NO_IMAGE for one in rejected)
    lines = [f"{out}: ready."]
    if rejected:
        lines.append(f"{out.parent}/rejected.csv: {len(rejected)} left out, {foreign} of them no images. Have a look.")
    lines += [f"no thumbnail: {failure}" for failure in failures]
    return lines
