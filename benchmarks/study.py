"""Our own study of methods, sizes and shares of the data: makes its data and its file, for `biovfm scale`.

    python benchmarks/study.py --data FOLDER --out FOLDER
    biovfm scale plan OUT/study.json
    biovfm scale run OUT/study.json --out OUT/study --workers 2

DATA holds bloodmnist.npz and organamnist.npz (https://medmnist.com, 28 x 28 pixels) and a folder per class of chest
radiographs in pneumonia/ (https://doi.org/10.17632/rscbjbr9sj; brought to 28 x 28 pixels, and split here by file). All
training images are one store, from which every run learns. A run's encoder is probed on each of the three sets: of
BloodMNIST and OrganAMNIST on 2,000 training, 1,000 validation and 3,000 test images, the first of each after shuffling
with a fixed seed, so that a probe takes seconds. Networks have depth 4, patches of 7 pixels, and widths that two cores
can train. The budgets of a method are images, the same for all sizes, as in BioVFM; they are chosen so that all methods
spend about as many FLOPs on the network 96 wide.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from classification_2d import smaller

from biovfm_monai.data import index, pack
from biovfm_monai.data.datalist import read_datalist
from biovfm_monai.files import write_json

SIZE, PATCH, WIDTHS = 28, 7, (48, 96, 192)
PROBED = {"training": 2000, "validation": 1000, "test": 3000}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {
        "learning_rate": 0.002, "method#decoder_embed_dim": 128, "method#decoder_depth": 2,
        "method#decoder_num_heads": 4, "budget": "46080 samples",
    },
    "dinov2": {
        "learning_rate": 0.002, "method#hidden_dim": 512, "method#prototypes": 1024, "method#momentum": 0.9,
        "budget": "7680 samples",
    },
    "vicreg": {"learning_rate": 0.002, "budget": "25600 samples"},
    "barlow_twins": {"learning_rate": 0.002, "budget": "25600 samples"},
}  # fmt: skip


def main() -> None:
    """Write the store, the benchmarks and the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    smaller(data / "pneumonia", out / "smaller/pneumonia", SIZE)
    images = [data / "bloodmnist.npz", data / "organamnist.npz", out / "smaller/pneumonia"]
    settings = {"smaller/pneumonia/([^/]+)/": {"label": "\\1", "modality": "xray"}}
    datalist = out / "list/datalist.json"
    print(index(images, datalist, settings=settings, validation=0.1, test=0.2))
    print(pack(datalist, out / "store"))
    sections = read_datalist(datalist)
    benchmarks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for source in sorted({item["source"] for item in sections["training"]}):
        for section, items in sections.items():
            of = [item for item in items if item["source"] == source]
            order = np.random.default_rng(0).permutation(len(of))
            benchmarks.setdefault(source, {})[section] = [of[row] for row in order[: PROBED[section]]]
        write_json(out / source / "datalist.json", benchmarks[source])
    write_json(out / "study.json", study(out / "store", {source: out / source for source in benchmarks}))


def study(store: Path, benchmarks: dict[str, Path]) -> dict[str, Any]:
    """What the runs learn from, what they differ in, and what they are scored on."""
    return {
        "bundle": "biovfm_mae_pretraining",
        "settings": {
            "dataset_dir": str(store), "img_size": [SIZE] * 2, "crop_size": [SIZE] * 2, "patch_size": PATCH,
            "batch_size": 128, "steps_per_epoch": 20, "precision": "fp32",
        },
        "methods": METHODS,
        "presets": {
            f"{width} wide": {"encoder#embed_dim": width, "encoder#depth": 4, "encoder#num_heads": 3}
            for width in WIDTHS
        },
        "fractions": [1, 0.25, 0.0625],
        "seeds": [0, 1, 2],
        "benchmarks": {
            name: {"path": str(folder), "probes": ["knn", "linear"], "batch_size": 250}
            for name, folder in benchmarks.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
