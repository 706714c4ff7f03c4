"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "append_json",
    "checksum_of",
    "rename_over",
    "require_writable",
    "set_aside",
    "version_of",
    "write_atomically",
    "write_json",
]

logger = logging.getLogger(__name__)


def require_writable(folder: Path) -> None:
    """Make a folder if need be, and raise OSError now, not after an hour of work, if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def version_of(path: Path) -> tuple[int, ...]:
    """Numbers that are others when a file is written anew, for what is kept in memory of it."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


def checksum_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename_over(path: Path, target: Path) -> None:
    """Rename a file or folder, in place of what has the name."""
    if target.is_dir():
        shutil.rmtree(target)
    path.replace(target)


def set_aside(path: Path) -> None:
    """Rename a file or folder of an earlier run to `*.before`, if it is there, so that a new run leaves it alone."""
    if path.exists():
        rename_over(path, path.with_name(f"{path.name}.before"))
        logger.info("%s is of an earlier run, and is now %s.before", path, path.name)


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; when the block succeeds, its content takes the place of `path` in one step.

    A process killed in between leaves what was at `path` before, and a hidden file that the next write reuses.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with _naming(path):
        draft.unlink(missing_ok=True)
        draft.touch()
    # Some libraries make their files anew, readable by the owner alone.
    mode = draft.stat().st_mode
    try:
        with _naming(path):
            yield draft
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.chmod(mode)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def append_json(path: Path, content: Any) -> None:
    """Add a line of JSON to a file, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def cut_json_lines(path: Path, step: int) -> None:
    """Leave those lines of a log, made if need be, whose "step" is done; a killed run may have left later ones."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step and path.exists() else []
    # Of the last one it may have left half.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with write_atomically(path) as draft:
        draft.write_text("".join(kept), encoding="utf-8")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of a write that fails which file it was of: Python does not, and libraries in Rust raise other errors."""
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(error.filename).name == f".{path.name}.draft":
            error.filename = str(path)
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, as `write_atomically` does."""
    with write_atomically(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
