"""Join the tables of a store's files into its index, without what is there twice or in a benchmark.

Of an image only its checksum and its hash are in memory for all of them at once, so that 20 million need a few GB.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from biovfm_monai.data.duplicates import count_alike
from biovfm_monai.data.store import INDEX, table_name
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically

__all__ = ["join_tables"]

_GROUP = 2**20


def join_tables(out: Path, count: int, benchmarks: Sequence[str | Path], unread: Sequence[dict[str, str]]) -> str:
    """Write the index of a store, and beside it what was left out, as `OUT-rejected.csv` and the like.

    Args:
        out: folder of the store.
        count: of its files, each with a table.
        benchmarks: stores whose images, whole or nearly, are left out.
        unread: files that were no images, with the reason.

    Returns:
        What was stored, and what was left out.

    Raises:
        InputError: when no image is left.
    """
    tables = [pq.read_table(out / table_name(number), columns=["checksum", "hash", "alike"]) for number in range(count)]
    rejected = [*unread] + [row for table in tables for row in json.loads(table.schema.metadata[b"rejected"])]
    ends = np.cumsum([len(table) for table in tables])
    table = pa.concat_tables(tables)
    original = _first_of_its_kind(table.column("checksum"))
    twice = original != np.arange(len(original))
    known = _in_benchmarks(table, benchmarks)
    kept = ~twice & ~known
    names = _names(out, ends, np.union1d(np.flatnonzero(known | twice), original[twice]))
    pairs = zip(np.flatnonzero(twice).tolist(), original[twice].tolist(), strict=True)
    duplicates = [{"file": names[row], "same as": names[first]} for row, first in pairs]
    excluded = [{"file": names[row], "reason": "in a benchmark"} for row in np.flatnonzero(known).tolist()]
    lists = {"rejected": rejected, "duplicates": duplicates, "excluded": excluded}
    for name, rows in lists.items():
        _write_list(out.with_name(f"{out.name}-{name}.csv"), rows)
    if not kept.any():
        raise InputError(f"{out}: no image is left to store. See {out}-*.csv for the reasons.")
    alike = table.column("alike").to_numpy().copy()
    alike[kept] = np.maximum(alike[kept], count_alike(table.column("hash").to_numpy()[kept]))
    _write_index(out, ends, kept, alike)
    size = sum(path.stat().st_size for path in out.glob("*.b2"))
    left = [f"{len(rows)} {name} ({out.name}-{name}.csv)" for name, rows in lists.items() if rows]
    without = f"\nLeft out: {', '.join(left)}." if left else ""
    return f"{out}: ready, {kept.sum()} images in {count} file(s), {size / 2**20:.1f} MiB.{without}"


def _first_of_its_kind(checksums: pa.ChunkedArray) -> NDArray[np.int64]:
    """For each image the first row that has its checksum."""
    codes = checksums.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return np.asarray(first[codes])


def _in_benchmarks(table: pa.Table, benchmarks: Sequence[str | Path]) -> NDArray[np.bool_]:
    known = np.zeros(len(table), dtype=bool)
    for path in benchmarks:
        there = pq.read_table(Path(path).expanduser().resolve() / INDEX, columns=["checksum", "hash"])
        known |= pc.is_in(table.column("checksum"), there.column("checksum").combine_chunks()).to_numpy()
        known |= count_alike(table.column("hash").to_numpy(), there.column("hash").to_numpy()) > 0
    return known


def _names(out: Path, ends: NDArray[np.int64], wanted: NDArray[np.int64]) -> dict[int, str]:
    """The files that some rows of the joined tables are of."""
    names: dict[int, str] = {}
    shards = np.searchsorted(ends, wanted, side="right")
    for number in np.unique(shards):
        files = pq.read_table(out / table_name(int(number)), columns=["file"]).column("file")
        of = wanted[shards == number]
        names.update(zip(of.tolist(), files.take(of - (ends[number] - len(files))).to_pylist(), strict=True))
    return names


def _write_index(out: Path, ends: NDArray[np.int64], kept: NDArray[np.bool_], alike: NDArray[np.int32]) -> None:
    starts = [0, *ends[:-1].tolist()]
    pieces = [slice(start, end) for start, end in zip(starts, ends.tolist(), strict=True)]
    images = json.dumps([int(kept[piece].sum()) for piece in pieces])

    def tables() -> Iterator[pa.Table]:
        for number, piece in enumerate(pieces):
            table = pq.read_table(out / table_name(number)).replace_schema_metadata(None)
            column = table.column_names.index("alike")
            table = table.set_column(column, "alike", pa.array(alike[piece], pa.int32()))
            yield table.drop_columns("file").filter(pa.array(kept[piece]))

    schema = pq.read_schema(out / table_name(0)).with_metadata({"images": images})
    schema = schema.remove(schema.get_field_index("file"))
    pending: list[pa.Table] = []
    with write_atomically(out / INDEX) as draft, pq.ParquetWriter(draft, schema) as writer:
        for table in tables():
            pending.append(table)
            if sum(len(one) for one in pending) >= _GROUP:
                writer.write_table(pa.concat_tables(pending))
                pending = []
        if pending:
            writer.write_table(pa.concat_tables(pending))


def _write_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table of files, or remove that of an earlier store, if there are none."""
    path.unlink(missing_ok=True)
    if rows:
        with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
