"""What encoders are worth, and what runs found."""

from __future__ import annotations

from typing import Any

from biovfm_monai.errors import InputError

__all__ = ["probe", "probe_voxels", "report"]


def probe(
    benchmark: str,
    encoder: str,
    out: str = "probe.json",
    task: str | None = None,
    modality: Any = None,
    probes: Any = ("knn", "linear", "logistic"),
    img_size: Any = None,
    cache: str | None = None,
    device: str = "cpu",
    batch_size: int = 1,
    seed: int = 0,
) -> str:
    """Score an encoder file on a labelled benchmark, beside the same network untrained, and raw pixels.

    Args:
        benchmark: an archive of MedMNIST, or a folder with a datalist of training, validation and test.
        encoder: encoder file.
        out: .json file to write.
        task: of a folder, such as ordinal-regression, where labels do not tell.
        modality: of a folder's images, where neither a header nor a folder's name tells it; or the one, or several
            such as ct,mri, whose images are used.
        probes: of knn, linear, logistic, retrieval and attentive.
        img_size: to which images are fitted, such as [224,224]; without it the encoder's own.
        cache: folder where scores and features are kept; of attentive the tokens are not.
        device: such as cuda.
        batch_size: images that are embedded at a time; more than one only where all come in one size.
        seed: of the untrained weights, the linear and attentive probe, and the intervals.
    """
    from biovfm_monai.evaluation import Probe, probe_listing  # noqa: PLC0415
    from biovfm_monai.evaluation.benchmarks import open_benchmark  # noqa: PLC0415

    names, data = [probes] if isinstance(probes, str) else list(probes), open_benchmark(str(benchmark), task, modality)
    run = Probe(encoder, data, names, img_size, cache, device=device, batch_size=batch_size, seed=seed, output_path=out)
    return probe_listing(run.run())


def probe_voxels(
    dataset: str,
    encoder: str,
    modality: str,
    out: str = "probe_voxels.json",
    steps: int = 600,
    device: str = "cpu",
    seed: int = 0,
) -> str:
    """Score what an encoder file says of each voxel, by a linear layer, beside the untrained network, and raw pixels.

    Args:
        dataset: folder of images and label maps: MSD, BTCV, AMOS, CHAOS as images and labels, or with a datalist.
        encoder: encoder file.
        modality: of the images, such as ct.
        out: .json file to write.
        steps: of training the linear layer.
        device: such as cuda.
        seed: of the untrained weights, the linear layer, and the intervals.
    """
    from biovfm_monai.evaluation import VoxelProbe, probe_listing  # noqa: PLC0415

    return probe_listing(VoxelProbe(encoder, str(dataset), modality, steps, seed, device, output_path=out).run())


def report(*runs: str, out: str = "report.html", mlflow: str | None = None) -> str:
    """Write one page about finished runs that opens anywhere, and its numbers as .csv files beside it.

    Args:
        *runs: folders in which bundles have run, or folders of those; tables of runs (.csv, .parquet); fits of
            `biovfm scale fit` (.json).
        out: .html file to write.
        mlflow: .db file to write the same numbers to, as MLflow runs.
    """
    if not runs:
        raise InputError("name at least one folder of a run.")
    from biovfm_monai.evaluation.report import write_report  # noqa: PLC0415

    found = write_report([str(run) for run in runs], str(out), None if mlflow is None else str(mlflow))
    lines = [f"{run.name}: set aside: {problem}" for run in found for problem in run.problems()]
    return "\n".join([f"{out}: {len(found)} run(s)", *lines])
