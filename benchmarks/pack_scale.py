"""What packing does beside reading images, for 21,472,715 of them: time, and memory.

    python benchmarks/pack_scale.py [--images 21472715]

The datalist is a table of as many rows. Images are not read: each is given a checksum and a perceptual hash at random,
a hundredth of them those of another image, a tenth a hash one bit from another's. All else is what `biovfm pack` does.
Memory is the peak of the process over what it held before.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from biovfm_monai.data.datalist import FIELDS
from biovfm_monai.data.store import INDEX, Store, shard_name, table_name

packing = importlib.import_module("biovfm_monai.data.pack")

PIECE = 2**16


def write_datalist(path: Path, images: int) -> None:
    """A table of as many 2D images, with paths as long as those of real archives."""
    with pq.ParquetWriter(path, FIELDS) as writer:
        for first in range(0, images, PIECE):
            count = min(PIECE, images - first)
            values: dict[str, list[Any]] = {
                "image": [[f"archive-{n % 61}/{n // 7:08}/study/{n:012}.png"] for n in range(first, first + count)],
                "modality": ["xray"] * count, "shape": [[512, 512]] * count, "channels": [1] * count,
                "dtype": ["uint8"] * count, "spacing": [None] * count, "anisotropy": [5] * count,
                "source": [f"archive-{n % 61}" for n in range(first, first + count)],
                "subject": [f"{n // 7:016x}" for n in range(first, first + count)], "split": ["training"] * count,
                "alike": [None] * count, "label": [None] * count,
            }  # fmt: skip
            writer.write_table(pa.Table.from_pydict(values, FIELDS))


def write_shard(out: Path, number: int, items: list[dict[str, Any]], *_: Any) -> None:
    """The table of a file of images that nobody has read."""
    rng = np.random.default_rng(number)
    numbers = rng.integers(0, 2**63, (len(items), 2), dtype=np.uint64)
    copies, alike = len(items) // 100, len(items) // 10
    numbers[:copies] = numbers[copies : 2 * copies]
    numbers[-alike:, 1] = numbers[-2 * alike : -alike, 1] ^ np.uint64(16)
    rows = [
        {
            "shard": number, "start": n, "bytes": 9, "channels": 1, "depth": 1, "height": 512, "width": 512,
            "dtype": "uint8", "spacing": [1.0, 1.0, 1.0], "anisotropy": 5, "modality": "xray",
            "source": item["source"], "subject": item["subject"], "split": "training", "label": None, "alike": 1,
            "checksum": numbers[n].tobytes(), "hash": int(numbers[n, 1]), "file": item["image"],
        }
        for n, item in enumerate(items)
    ]  # fmt: skip
    schema = packing._FIELDS.with_metadata({"rejected": json.dumps([])})
    pq.write_table(pa.Table.from_pylist(rows, schema), out / table_name(number))
    (out / shard_name(number)).touch()


def report(folder: Path) -> None:
    """Pack, and print what it took."""
    packing._write_shard = write_shard
    join = packing.join_tables

    def timed(*arguments: Any) -> str:
        print(f"list read twice, tables of {arguments[1]} files written: {used()}")
        return str(join(*arguments))

    packing.join_tables = timed
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()

    def used() -> str:
        held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        return f"after {time.perf_counter() - begun:.0f} s, {held:.0f} MB more"

    print(packing.pack(folder / "datalist.parquet", folder / "store", num_workers=1))
    print(f"index joined: {used()}; it has {(folder / 'store' / INDEX).stat().st_size / 1e6:.0f} MB")
    store = Store(folder / "store")
    print(f"{(store.alike > 1).mean():.1%} of {len(store):,} images have near twins")


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=21_472_715)
    with tempfile.TemporaryDirectory() as folder:
        write_datalist(Path(folder) / "datalist.parquet", parser.parse_args().images)
        process = multiprocessing.get_context("spawn").Process(target=report, args=(Path(folder),))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
