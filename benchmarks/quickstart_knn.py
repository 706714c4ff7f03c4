"""The quickstart's probe over several seeds: pretrained encoder, untrained encoder, raw pixels.

    python benchmarks/quickstart_knn.py [--seeds 5] [--out FOLDER] [any override of the bundle, such as --max_epochs 2]

Each seed trains with the quickstart's own command (initial weights, crops, views and masks follow the seed) and is
scored on the same held-out crops; the untrained encoder of a seed has that seed's initial weights.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from biovfm_monai.data import load_datalist, write_samples
from biovfm_monai.evaluation import KNNProbe
from biovfm_monai.shipped import shipped_folder


def main() -> None:
    """Print a row per seed, then mean and standard deviation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default=None)
    arguments, overrides = parser.parse_known_args()
    out = Path(arguments.out or tempfile.mkdtemp(prefix="quickstart_knn_"))
    samples = write_samples(out / "samples")
    root = shipped_folder("bundles") / "biovfm_mae_pretraining"
    names = ("encoder", "random_init", "raw_pixels")
    rows = []
    print(f"{'seed':>4} {'minutes':>8} " + " ".join(f"{name:>12}" for name in names), flush=True)
    for seed in range(arguments.seeds):
        folder = out / f"seed{seed}"
        command = ["-m", "monai.bundle", "run", "--config_file", f"{root}/configs/train.json"]
        command += ["--bundle_root", str(root), "--dataset_dir", samples, "--seed", str(seed)]
        command += ["--output_dir", f"{folder}/eval", "--ckpt_dir", f"{folder}/models", *overrides]
        begun = time.monotonic()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        minutes = (time.monotonic() - begun) / 60
        train, test = (load_datalist(samples, section) for section in ("place_training", "place_test"))
        scores = KNNProbe(folder / "models/encoder.safetensors", train, test, seed=seed).run()
        rows.append([scores[name] for name in names])
        print(f"{seed:>4} {minutes:>8.1f} " + " ".join(f"{value:>12.1%}" for value in rows[-1]), flush=True)
    columns = list(zip(*rows, strict=True))
    for title, summary in (("mean", statistics.mean), ("std", statistics.stdev if len(rows) > 1 else lambda _: 0.0)):
        print(f"{title:>13} " + " ".join(f"{summary(column):>12.1%}" for column in columns))


if __name__ == "__main__":
    main()
