"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["write_atomically"]


def _ordinary_mode() -> int:
    """What a newly made file may be read by; some libraries write theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; when the block succeeds, its content takes the place of `path` in one step.

    A process killed in between leaves what was at `path` before, and a hidden file that the next write reuses.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.chmod(_ordinary_mode())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
