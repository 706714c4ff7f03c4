"""The order of 21,472,715 images from 61 sources: time, memory, shares, and the same order after a stop.

    python benchmarks/sampler_scale.py [--batch_size 1024] [--temperature 2]

The images of each source are counted as BioVFM-21M's list of sources counts them, and fall into six degrees of
anisotropy at random. The index is a store's own, a Parquet table of as many rows, which all point at one of eight small
images of that degree. Memory is the peak of the process over what it held before the store was opened. Drawing is timed
batch by batch; the median and the slowest of 2,000 are printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import default_collate

from biovfm_monai.data import RandomCropDataset, Store, pack, subset, training_transform
from biovfm_monai.data.store import INDEX

COUNTS = [
    5274618, 4240609, 3769486, 2453909, 1424290, 1078477, 643526, 401059, 392559, 377110, 262144, 223414, 160828,
    101400, 100000, 93015, 86524, 79473, 58551, 38496, 34210, 25608, 25000, 16577, 16000, 15000, 14813, 13671, 11258,
    8389, 8000, 7728, 7470, 1744, 1705, 818, 670, 662, 598, 463, 400, 393, 377, 350, 196, 163, 138, 130, 120, 110, 101,
    100, 58, 42, 30, 30, 25, 20, 20, 20, 20,
]  # fmt: skip
BATCHES = 2000


def peak() -> float:
    """Most memory the process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def write_store(folder: Path) -> None:
    """A store of a few small images, and an index in which they stand 21 million times."""
    rng = np.random.default_rng(0)
    (folder / "images/mri").mkdir(parents=True)
    for number in range(48):
        degree = number % 6
        shape = (24, 24, 1 if degree == 5 else max(24 >> degree, 2))
        affine = np.diag([1, 1, 2.0**degree, 1])
        image = nib.Nifti1Image(rng.integers(0, 900, shape).astype(np.int16), affine)
        nib.save(image, folder / f"images/mri/{number}.nii.gz")
    pack(folder / "images", folder / "store")
    path = folder / "store" / INDEX
    table = pq.read_table(path)
    metadata = {"images": json.dumps([sum(COUNTS)])}
    rows_of = [np.flatnonzero(table.column("anisotropy").to_numpy() == degree) for degree in range(6)]
    with pq.ParquetWriter(path, table.schema.with_metadata(metadata)) as writer:
        for number, count in enumerate(COUNTS):
            for first in range(0, count, 2**20):
                degrees = rng.integers(0, 6, min(2**20, count - first))
                rows = table.take(np.array([of[0] for of in rows_of])[degrees])
                source = pa.array(np.full(len(rows), f"source {number}"))
                writer.write_table(rows.set_column(rows.column_names.index("source"), "source", source))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder))
        measure(Path(folder) / "store", arguments.batch_size, arguments.temperature)


def measure(path: Path, size: int, temperature: float) -> None:
    """Open a store and draw from it, in a process that has held nothing large before."""
    process = multiprocessing.get_context("spawn").Process(target=report, args=(path, size, temperature))
    process.start()
    process.join()


def report(path: Path, size: int, temperature: float) -> None:
    """Print what opening and drawing take."""
    before, begun = peak(), time.perf_counter()
    store = Store(path)
    crops = RandomCropDataset(store, training_transform(1), (16, 16, 16), batch_size=size, temperature=temperature)
    mixture = crops._mixture
    mixture.rows(np.arange(size))
    drawn_after, held = time.perf_counter() - begun, peak() - before
    default_collate([crops[number] for number in range(size)])
    print(f"{len(store):,} images of {len(COUNTS)} sources, index of {(path / INDEX).stat().st_size / 1e6:.0f} MB")
    print(f"opened, first batch drawn  {drawn_after:.2f} s, {held:.0f} MB more")
    print(f"first batch of {size} read  {time.perf_counter() - begun:.2f} s, {peak() - before:.0f} MB more")
    source, buckets = store.labels("source"), store.degree

    times, drawn, mixed = [], [], 0
    for batch in range(BATCHES):
        begun = time.perf_counter()
        rows = mixture.rows(np.arange(batch * size, (batch + 1) * size))
        times.append(1000 * (time.perf_counter() - begun))
        drawn.append(rows)
        mixed += len(np.unique(buckets[rows])) > 1
    print(f"each next batch            {statistics.median(times):.2f} ms, slowest {max(times):.2f} ms")
    print(f"batches of several buckets {mixed}")
    order = np.concatenate(drawn)
    asked = np.array(COUNTS) ** (1 / temperature)
    asked /= asked.sum()
    seen = np.bincount(source.codes[order], minlength=len(COUNTS)) / len(order)
    print(f"shares of sources          off by {100 * np.abs(seen - asked).max():.3f} points at most")

    again = RandomCropDataset(
        store, training_transform(1), (16, 16, 16), batch_size=size, temperature=temperature
    )._mixture
    for processes in (1, 2, 3, 8):
        stop = int(np.random.default_rng(processes).integers(len(order) - size))
        numbers = np.arange(stop, stop + size)
        parts = [again.rows(part) for part in np.array_split(numbers, processes)]
        same = np.array_equal(np.concatenate(parts), order[numbers])
        print(f"stopped at {stop:>9,}, {processes} process(es): {'the same order' if same else 'ANOTHER ORDER'}")
    begun = time.perf_counter()
    kept = subset(source, 0.1)
    print(f"a tenth of each source     {kept.sum():,} images chosen in {time.perf_counter() - begun:.2f} s")


if __name__ == "__main__":
    main()
