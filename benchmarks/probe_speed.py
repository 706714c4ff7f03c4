"""What probing takes beside one pass of the encoder, and beside probing in other ways.

    python benchmarks/probe_speed.py [--preset vit_tiny] [--img_size 224] [--images 17092] [--neighbours 60000]

The pass is timed on a sample of images, and told for all of them. Features are random, with classes in them and with
variances that fall as those of embeddings do. The last row is kNN, k 20, of as many images as training images, with the
memory of the process at its highest before and after.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch

from biovfm_monai import networks
from biovfm_monai.evaluation.features import PooledFeatures
from biovfm_monai.evaluation.knn import knn_votes
from biovfm_monai.evaluation.linear import RATES, linear_probe, logistic_probe
from biovfm_monai.evaluation.metrics import TASKS

CLASSES, EPOCHS, SHARES = 8, 20, (0.7, 0.1, 0.2)


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def peak() -> float:
    """GiB that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_features(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, and classes that they tell of."""
    random = np.random.default_rng(count)
    labels = np.arange(count) % CLASSES
    features = random.standard_normal((count, width), np.float32)
    features[:, -CLASSES:] += np.eye(CLASSES, dtype=np.float32)[labels]
    features /= np.sqrt(np.arange(1, width + 1, dtype=np.float32))
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    return features @ turn.astype(np.float32), labels


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="vit_tiny")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--images", type=int, default=17092)
    parser.add_argument("--sample", type=int, default=192)
    parser.add_argument("--neighbours", type=int, default=60000)
    options = parser.parse_args()
    encoder = getattr(networks, options.preset)(3, (options.img_size, options.img_size)).eval()
    network, batch = PooledFeatures(encoder), torch.randn(32, 3, options.img_size, options.img_size)
    with torch.inference_mode():
        network(batch)
        passes = seconds(lambda: [network(batch) for _ in range(options.sample // 32)])
    one_pass = passes / (options.sample // 32 * 32) * options.images
    print(f"{torch.get_num_threads()} thread(s), {options.preset}, {options.img_size} pixels, {options.images} images")
    print(f"one pass of the encoder          {one_pass:10.1f} s (timed on {options.sample} images)")
    sizes = [round(share * options.images) for share in SHARES]
    width = sum(columns.stop - columns.start for name, columns in network.poolings.items() if "+" not in name)
    parts = [random_features(size, width) for size in sizes]
    features = {name: [part[:, of] for part, _ in parts] for name, of in network.poolings.items()}
    labels = [of for _, of in parts]
    linear = seconds(lambda: linear_probe(features, labels, CLASSES, TASKS[0], epochs=EPOCHS))
    share = (one_pass + linear) / one_pass
    print(f"13 rates x 4 poolings            {linear:10.1f} s; with the pass {share:.3f} passes")
    logistic = seconds(lambda: logistic_probe(features, labels, TASKS[0], np.geomspace(1e-4, 10, len(RATES))))
    print(f"scikit-learn, 13 strengths x 4   {logistic:10.1f} s")
    print(f"features anew in {EPOCHS} epochs       {one_pass * SHARES[0] * EPOCHS:10.1f} s")
    if options.neighbours:
        train, classes = random_features(options.neighbours, encoder.embed_dim)
        before = peak()
        took = seconds(lambda: knn_votes(train, np.eye(CLASSES)[classes], train, [20]))
        print(f"kNN of {options.neighbours} x {options.neighbours} {took:10.1f} s, {before:.2f} then {peak():.2f} GiB")


if __name__ == "__main__":
    main()
