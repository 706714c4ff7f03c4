"""Find the images on disk and describe each by its header; what cannot be used is named with the reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
from joblib import delayed

from biovfm_monai.data import modalities
from biovfm_monai.data.describe import Item, describe_dicom, describe_file
from biovfm_monai.data.dicom import (
    DICOM,
    is_dicom,
    is_image,
    read_header,
    volumes,
)
from biovfm_monai.data.headers import ARRAYS, NIFTI, PHOTO, TIFF, VOLUME, suffix
from biovfm_monai.data.jobs import share_out
from biovfm_monai.data.slides import SLIDES
from biovfm_monai.errors import InputError

__all__ = [
    "NO_IMAGE", "Findings", "Rejected", "endings", "find_images", "hashed", "look_into",
    "modality_names", "require_modality", "survey", "with_modality",
]  # fmt: skip

logger = logging.getLogger(__name__)

NO_IMAGE = "no image"
"""The reason why a file that is none is left out."""


class Rejected(NamedTuple):
    """A file, or the first one of a series, that is left out, and why."""

    file: str
    reason: str


class Findings(NamedTuple):
    """What a folder holds: items, and the files left out."""

    items: list[Item]
    rejected: list[Rejected]


def find_images(folder: str | Path, modality: str | Sequence[str] | None = None) -> list[Item]:
    """Describe every image below a folder, or one file; DICOM files in one folder that are a volume's slices are one.

    The "image" of such a volume is their folder, or, where several series share it, the list of the slices. Only
    headers are read. Modality and patient come from a DICOM header (patients are numbered, their identifiers not kept),
    the modality else from the nearest enclosing folder that is named after one.

    Args:
        folder: what is looked through.
        modality: of the images, one or several, where not all are wanted; those that neither a header nor a folder
            gives one have it, if it is one.

    Returns:
        Dicts with "image", "modality", "shape" (voxels along x, y, z), "channels", "dtype", "anisotropy", and where
        known "spacing" (mm along x, y, z), "subject", "label", "split", and "alike", the number of time
        points in a file or series.

    Raises:
        InputError: when a header cannot be read, or an image has no modality.
    """
    items: list[Item] = []
    rejected: list[Rejected] = []
    patients: dict[str, int] = {}
    for found in survey(folder):
        for item in found.items:
            if "patient" in item:
                item["subject"] = f"patient-{patients.setdefault(item.pop('patient'), len(patients) + 1)}"
        items += found.items
        rejected += found.rejected
    broken = [one for one in rejected if one.reason != NO_IMAGE]
    if broken:
        others = f" So are {len(broken) - 1} more: `biovfm index` lists them and goes on." if broken[1:] else ""
        raise InputError(broken[0].reason + others)
    if rejected:
        logger.info("%s: left out %d file(s) that are no images", folder, len(rejected))
    return require_modality(items, modality)


def with_modality(items: Iterable[Item], modality: str | None) -> Iterator[Item]:
    """The items, with a modality for those that tell none.

    Raises:
        InputError: when one tells none and none is given, naming it.
    """
    for item in items:
        own = item.get("modality") or modality
        if own is None:
            raise InputError(
                f"{item['image']}: cannot tell the modality. Put the file into a folder named after it "
                f"({', '.join(modalities.__all__)}), or give one --modality for all files."
            )
        yield {**item, "modality": own}


def modality_names(modality: str | Sequence[str] | None) -> list[str]:
    """The modalities that are asked for, of one name or several; none where all are wanted."""
    return [modality] if isinstance(modality, str) else list(modality or ())


def require_modality(items: list[Item], modality: str | Sequence[str] | None = None) -> list[Item]:
    """The items of one modality, of several, or of all; those that tell none have the one that is asked for.

    Raises:
        InputError: when there is no item of one that is asked for, or an item tells none and not one is asked for.
    """
    asked = modality_names(modality)
    items = list(with_modality(items, asked[0] if len(asked) == 1 else None))
    there = {item["modality"] for item in items}
    missing = [name for name in asked if name not in there]
    if items and missing:
        known = ", ".join(sorted(there)) + (", as all" if items[1:] else "")
        lacking = ", ".join(map(repr, missing))
        raise InputError(f"{items[0]['image']}: not of modality {lacking} but {known}. Give another --modality.")
    wanted = [item for item in items if not asked or item["modality"] in asked]
    if len(wanted) < len(items):
        logger.info(
            "%d of %d images are of another modality than %s, and left out",
            len(items) - len(wanted),
            len(items),
            " or ".join(asked),
        )
    return wanted


def survey(folder: str | Path, num_workers: int = 1) -> Iterator[Findings]:
    """Describe all that can be used below a folder, or one file, and name all the rest, one folder after the other.

    Args:
        folder: what is looked through.
        num_workers: processes that read headers.

    Returns:
        Items as from `find_images`, with "modality" None where it is not known and the patient's own identifier as
        "patient", which must not be written anywhere; and the files left out.

    Raises:
        InputError: when the folder is not there.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.exists():
        raise InputError(f"{folder}: no such file or folder. Correct the path.")
    denied: list[OSError] = []
    looks = (delayed(look_into)(parent, files, folder) for parent, files in _files_by_folder(folder, denied.append))
    yield from share_out(looks, num_workers)
    shut = [f"{error.filename}: {error.strerror}. Change its rights." for error in denied]
    if shut:
        yield Findings([], [Rejected(reason.partition(": ")[0], reason) for reason in shut])


def hashed(name: str, salt: str) -> str:
    """A name that stands for another one and cannot be turned back without the salt (BLAKE2b)."""
    return blake2b(name.encode(), key=blake2b(salt.encode()).digest(), digest_size=8).hexdigest()


def endings() -> str:
    """The endings of names of files that are looked at."""
    return " ".join((*NIFTI, *VOLUME, *DICOM, *PHOTO, *TIFF, *ARRAYS, *SLIDES))


def look_into(parent: Path, files: list[Path], root: Path) -> Findings:
    """Describe the images among files of one folder, and name the others."""
    found = Findings([], [])
    headers: dict[Path, pydicom.Dataset] = {}
    instances: dict[str, Path] = {}
    alone = True

    def attempt(file: Path, call: Callable[..., Iterable[Item]], *arguments: Any) -> None:
        try:
            found.items.extend(call(*arguments))
        except InputError as error:
            found.rejected.append(Rejected(str(file), str(error)))

    for path in files:
        if reason := _no_file(path):
            found.rejected.append(Rejected(_printable(path), reason))
        elif suffix(path) in (*NIFTI, *VOLUME, *PHOTO, *TIFF, *ARRAYS, *SLIDES):
            attempt(path, describe_file, path, root)
        elif reason := _gather(path, headers, instances):
            found.rejected.append(Rejected(str(path), reason))
            alone = alone and reason == NO_IMAGE
    groups = volumes(headers)
    for times in groups:
        for slices in times:
            whole = parent if alone and len(groups) == len(times) == 1 and len(slices) > 1 else None
            chosen = {path: headers[path] for path in slices}
            attempt(whole or slices[0], describe_dicom, whole, chosen, root, len(times))
    return found


def _printable(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")


def _no_file(path: Path) -> str | None:
    """Why a name in a folder is not looked at further; opening a pipe would wait for ever."""
    name = _printable(path)
    if name != str(path):
        return f"{name}: its name is not UTF-8, and cannot be written into a datalist. Rename the file."
    if not path.is_file():
        return f"{path}: a pipe, socket or device, or a link that leads nowhere. Remove it."
    return None


def _gather(path: Path, headers: dict[Path, pydicom.Dataset], instances: dict[str, Path]) -> str | None:
    """Take up the header of a DICOM image, or say why the file is left out."""
    try:
        header = read_header(path) if is_dicom(path) else None
    except OSError as error:
        return f"{path}: cannot be opened ({error.strerror}). Change its rights, or remove it."
    except InputError as error:
        return str(error)
    if header is None or not is_image(header):
        return NO_IMAGE
    # Some archives give all slices of a series one number.
    instance = [str(header.get(tag)) for tag in ("SOPInstanceUID", "InstanceNumber", "ImagePositionPatient")]
    first = instances.setdefault(" ".join(instance) if header.get("SOPInstanceUID") else str(path), path)
    if first != path:
        return f"{path}: the same instance as {first.name}. Remove one of them."
    headers[path] = header
    return None


def _files_by_folder(root: Path, denied: Callable[[OSError], None]) -> Iterator[tuple[Path, list[Path]]]:
    """Files of each folder below a root, links followed, nothing visited twice and nothing hidden."""
    if root.is_file():
        yield root.parent, [root]
        return
    seen: set[Path] = set()
    for parent, folders, files in os.walk(root, onerror=denied, followlinks=True):
        real = Path(parent).resolve()
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield Path(parent), sorted(Path(parent) / name for name in files if not name.startswith("."))
        seen.add(real)
