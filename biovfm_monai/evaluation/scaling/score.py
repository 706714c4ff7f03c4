"""What the encoders of a study are scored on, and how one is scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biovfm_monai.data import load_segmentation
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.benchmarks import open_benchmark
from biovfm_monai.evaluation.benchmarks.base import PARTS
from biovfm_monai.evaluation.probe import PROBES, Probe, require_probes
from biovfm_monai.evaluation.voxel_probe import VoxelProbe

__all__ = ["ENCODER", "RUN", "require_benchmark", "score_run", "scores_file"]

RUN, ENCODER = "study/run.json", "models/encoder.safetensors"
_OPTIONS = ("path", "task", "modality", "probes", "img_size", "batch_size")
_VOXELS = ["voxels"]


def require_benchmark(given: Any) -> dict[str, Any]:
    """The options of a benchmark, in full, once it is known that it can be used.

    Args:
        given: a path, or an object with "path" and maybe task, modality, probes, img_size and batch_size, as of
            `biovfm probe`; with "probes" "voxels" and the modality, it is one of `biovfm probe_voxels`.

    Raises:
        InputError: when it cannot.
    """
    options = {"path": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or "path" not in options or not set(options) <= set(_OPTIONS):
        raise InputError(
            f"{given!r} must be a path, or an object with path and maybe {', '.join(_OPTIONS[1:])}. Correct it."
        )
    path, probes = str(Path(options["path"]).expanduser().resolve()), options.get("probes", PROBES)
    probes = [probes] if isinstance(probes, str) else list(probes)
    if probes == _VOXELS:
        unknown = sorted({*options} - {"path", "probes", "modality"})
        if unknown or not isinstance(options.get("modality"), str):
            raise InputError(f"{given!r}: with probes voxels, give path and modality and no more. Correct it.")
        for part in PARTS:
            load_segmentation(path, part)
    else:
        benchmark = open_benchmark(path, options.get("task"), options.get("modality"))
        benchmark.labels()
        require_probes(probes, benchmark.task)
    return {**options, "path": path, "probes": probes}


def score_run(folder: str, device: str = "cpu") -> None:
    """Score a run's encoder on those of its benchmarks of which it has no scores.

    Args:
        folder: of the run, two below the study's. There, in scores/, lie scores that several runs share.
        device: where networks run.
    """
    where = Path(folder)
    benchmarks = json.loads((where / RUN).read_text(encoding="utf-8"))["benchmarks"]
    for name, options in benchmarks.items():
        out = where / scores_file(name)
        if not out.exists():
            _probe(options, where / ENCODER, where.parent.parent / "scores", device, out).run()


def scores_file(benchmark: str) -> str:
    """Where in a run's folder the scores on a benchmark are."""
    return f"probe_{benchmark}.json"


def _probe(options: Mapping[str, Any], encoder: Path, cache: Path, device: str, out: Path) -> Probe | VoxelProbe:
    path, modality, probes = options["path"], options.get("modality"), options["probes"]
    if probes == _VOXELS:
        return VoxelProbe(encoder, path, str(modality), device=device, output_path=out)
    benchmark = open_benchmark(path, options.get("task"), modality)
    return Probe(
        encoder, benchmark, probes, options.get("img_size"), cache, keep_features=False, device=device,
        batch_size=options.get("batch_size", 1), output_path=out,
    )  # fmt: skip
