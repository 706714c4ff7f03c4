"""Which folders are runs, and which files are tables of runs or laws fitted to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from biovfm_monai.errors import InputError

__all__ = ["FOLDERS", "find_runs"]

FOLDERS = ("eval", "models", "configs")
_TABLES = ("runs.csv", "runs.parquet")
# What tells a folder from one that has nothing to do with runs.
_MARKS = (
    "log.jsonl", "knn.json", "tokenizer.json", "metrics.csv", "probabilities.csv", "embeddings.csv",
    "reconstruction.png", "tokenizer.png", "overlay.png", "encoder.safetensors", "tokenizer.safetensors",
)  # fmt: skip


def find_runs(paths: Sequence[str | Path]) -> tuple[list[tuple[str, Path]], dict[Path, bool]]:
    """The runs and the tables of runs in folders.

    A folder is a run's if files that bundles leave lie in it, or in its `eval` or `models`.

    Args:
        paths: folders of runs, or of folders of them; tables (.csv, .parquet) and fits of `biovfm scale fit` (.json).

    Returns:
        Name and folder of each run, in order; tables and fits, with whether they are among `paths`.

    Raises:
        InputError: when a path is not there, or there is nothing to report.
    """
    roots: dict[Path, str] = {}
    tables: dict[Path, bool] = {}
    for given in map(Path, paths):
        if given.is_file() and given.suffix in (".csv", ".parquet", ".json"):
            tables[given.resolve()] = True
            continue
        if not given.is_dir():
            raise InputError(f"{given}: neither a folder of runs nor a table (.csv, .parquet) or fit (.json) of some.")
        top = given.resolve()
        for place, _, names in sorted(os.walk(top)):
            folder = Path(place)
            for name in sorted(names):
                if name in _TABLES or _is_fit(folder / name):
                    tables.setdefault(folder / name, False)
            if set(names) & set(_MARKS):
                root = folder.parent if folder.name in FOLDERS and folder != top else folder
                roots.setdefault(root, str(root.relative_to(top.parent)))
    if not roots and not tables:
        raise InputError(f"no run found in {', '.join(map(str, paths))}. Name folders in which bundles have run.")
    named: list[tuple[str, Path]] = []
    for root, name in roots.items():
        count = sum(other == name or other.startswith(f"{name} (") for other, _ in named)
        named.append((f"{name} ({count + 1})" if count else name, root))
    return named, tables


def _is_fit(path: Path) -> bool:
    """Whether a file is what `biovfm scale fit` wrote, by the first keys of it."""
    if path.suffix != ".json" or path.parent.name == "configs":
        return False
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    return all(key in start for key in (b'"table"', b'"x"', b'"y"', b'"by"'))
