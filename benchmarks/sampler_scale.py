"""The order of 21,472,715 images from 61 sources: time, memory, shares, and the same order after a stop.

    python benchmarks/sampler_scale.py [--batch_size 1024] [--temperature 2]

The images of each source are counted as BioVFM-21M's list of sources counts them, and fall into six buckets at random.
A column of numbers stands for each image's source and bucket. Memory is the peak of the process over what it held once
the columns were there. Batches are timed one by one; medians and the slowest of 2,000 are printed.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np

from biovfm_monai.data import Labels, Mixture, subset

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


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=2.0)
    arguments = parser.parse_args()
    size = arguments.batch_size
    names = [f"source {number}" for number in range(len(COUNTS))]
    source = Labels(np.repeat(np.arange(len(COUNTS), dtype=np.uint8), COUNTS), names)
    buckets = np.random.default_rng(0).integers(0, 6, sum(COUNTS), dtype=np.uint8)
    bucket = Labels(buckets, [f"bucket {number}" for number in range(6)])
    before, begun = peak(), time.perf_counter()
    mixture = Mixture(source, bucket=bucket, batch_size=size, temperature=arguments.temperature)
    mixture.rows(np.arange(size))
    print(f"{sum(COUNTS):,} images of {len(COUNTS)} sources, batches of {size}")
    print(f"first batch drawn after    {time.perf_counter() - begun:.2f} s, {peak() - before:.0f} MB more")

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
    asked = np.array(COUNTS) ** (1 / arguments.temperature)
    asked /= asked.sum()
    seen = np.bincount(source.codes[order], minlength=len(COUNTS)) / len(order)
    print(f"shares of sources          off by {100 * np.abs(seen - asked).max():.3f} points at most")

    again = Mixture(source, bucket=bucket, batch_size=size, temperature=arguments.temperature)
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
