"""Compare a store with the checksums that its images were packed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from joblib import delayed
from tqdm import tqdm

from biovfm_monai.data.headers import readable
from biovfm_monai.data.jobs import share_out
from biovfm_monai.data.store import ALIGNMENT, INDEX, StoredImage, require_store, shard_name
from biovfm_monai.errors import InputError, UnreadableError
from biovfm_monai.files import version_of

__all__ = ["verify"]

_PIECE = 4096


def verify(store: str | Path, num_workers: int = -1) -> str:
    """Read every image of a store, and compare its numbers and spacing with what the index says of them.

    Args:
        store: folder that `pack` wrote.
        num_workers: processes; -1 for as many as there are cores.

    Returns:
        How many images were compared.

    Raises:
        InputError: when the folder holds no finished store, or images are not as they were packed, naming their files.
    """
    folder = Path(store).expanduser().resolve()
    require_store(folder)
    with readable(folder / INDEX, "no index that can be read"):
        total = pq.read_metadata(folder / INDEX).num_rows
    damaged: Counter[str] = Counter()
    jobs = (delayed(_damaged)(folder, rows) for rows in _pieces(folder))
    for found in tqdm(share_out(jobs, num_workers, ordered=False), "pieces", total=-(-total // _PIECE), delay=2):
        damaged.update(found)
    if damaged:
        files = ", ".join(f"{name} ({count})" for name, count in sorted(damaged.items()))
        raise InputError(
            f"{folder}: {damaged.total()} of {total} images are not as they were packed, in {files}. Copy these files "
            "again from where they are whole, or pack the store anew."
        )
    return f"{folder}: all {total} images are as they were packed."


def _pieces(folder: Path) -> Iterator[dict[str, list[Any]]]:
    with readable(folder / INDEX, "no index that can be read"):
        columns = ["shard", "start", "spacing", "checksum"]
        for batch in pq.ParquetFile(folder / INDEX).iter_batches(_PIECE, columns=columns):
            yield batch.to_pydict()


def _damaged(folder: Path, rows: dict[str, list[Any]]) -> Counter[str]:
    """How many images of each file are not as the index says."""
    version, damaged = version_of(folder / INDEX), Counter[str]()
    for shard, start, spacing, checksum in zip(*rows.values(), strict=True):
        name = shard_name(shard)
        try:
            image = StoredImage(folder / name, start * ALIGNMENT, version)
            same = image.checksum() == checksum and np.array(image.spacing, dtype=np.float32).tolist() == spacing
        except (UnreadableError, MemoryError):  # a size that is damaged, too
            same = False
        damaged[name] += not same
    return +damaged
