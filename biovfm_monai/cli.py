"""`biovfm <verb>`: each verb is one call into the package (https://github.com/google/python-fire)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import fire

from biovfm_monai import scale_cli
from biovfm_monai.errors import InputError, report_input_errors

__all__ = ["main"]


def quickstart(folder: str = "biovfm_quickstart", **options: Any) -> str:
    """Pretrain on real images that come with the dependencies, and show what was learnt (about four minutes).

    Args:
        folder: where a copy of the bundle goes when installed without a clone.
        **options: overrides for the bundle, such as --max_epochs 2.
    """
    from biovfm_monai.quickstart import quickstart as run  # noqa: PLC0415 - MONAI takes seconds to import

    return run(folder, options)


def index(
    *paths: str,
    out: str = "datalist.json",
    modality: str | None = None,
    settings: Any = None,
    validation: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    salt: str | None = None,
    num_workers: int = 1,
) -> str:
    r"""Describe all images below folders in one datalist, with rejected.csv and thumbnails.png beside it.

    Args:
        *paths: folders, image files, datalists (.json), or tables with a column "image" (.csv).
        out: .json or .parquet file to write.
        modality: of the images that neither a header nor a folder's name gives one.
        settings: fields by regular expression of the path, such as "{'(P[0-9]+)_t2':{'subject':'\1'}}";
            None leaves images out, as in "{'_mask':None}".
        validation: share of the subjects that are for validation.
        test: share of the subjects that are for testing.
        seed: of that split.
        salt: secret word, to give a patient the same subject in other datalists, too.
        num_workers: processes that read headers.
    """
    options = {name: value for name, value in locals().items() if name not in ("paths", "out")}
    if not paths:
        raise InputError("name at least one folder or file.")
    from biovfm_monai.data import index as run  # noqa: PLC0415

    return run([str(path) for path in paths], str(out), **options | {"salt": None if salt is None else str(salt)})


def pack(
    datalist: str,
    out: str,
    spacing: Any = None,
    presets: Any = None,
    modality: str | None = None,
    exclude_benchmark: Any = (),
    salt: str | None = None,
    num_workers: int = -1,
) -> str:
    """Read, prepare and store every image of a datalist; stopped at any moment, the same command goes on.

    Args:
        datalist: .json or .parquet file, or a folder of images.
        out: folder of the store, which can then be a --dataset_dir.
        spacing: mm along depth, height and width to resample volumes to, such as [2,1,1].
        presets: options of the modalities' presets, such as "{'ct':{'window':'lung'}}".
        modality: of the images of a folder that neither a header nor a folder's name gives one.
        exclude_benchmark: stores of evaluation sets, images of which are left out and listed.
        salt: secret word, to give a subject the same name in other stores, too.
        num_workers: processes; -1 for all cores.
    """
    from biovfm_monai.data import pack as run  # noqa: PLC0415

    benchmarks = [exclude_benchmark] if isinstance(exclude_benchmark, str) else exclude_benchmark
    salt = None if salt is None else str(salt)
    return run(str(datalist), str(out), spacing, presets, modality, [str(b) for b in benchmarks], salt, num_workers)


def verify(store: str, num_workers: int = -1) -> str:
    """Read all of a store, and compare each image with the checksum that it was packed with.

    Args:
        store: folder that `biovfm pack` wrote.
        num_workers: processes; -1 for all cores.
    """
    from biovfm_monai.data import verify as run  # noqa: PLC0415

    return run(str(store), num_workers)


def embed(*files: str, encoder: str, out: str = "embeddings.npz", modality: str | None = None) -> str:
    """Write one vector per image, for image files and for all images below folders.

    Args:
        *files: images, or folders of them.
        encoder: encoder file.
        out: .npz file to write, with "files" and "embeddings".
        modality: of all files, where neither a header nor a folder's name tells it.
    """
    if not files:
        raise InputError("name at least one image file or folder.")
    from biovfm_monai.evaluation import embed_files  # noqa: PLC0415

    images, width = embed_files([str(file) for file in files], encoder, out, modality)
    return f"{out}: {images} image(s), {width} numbers each"


def probe(
    benchmark: str,
    encoder: str,
    out: str = "probe.json",
    task: str | None = None,
    modality: str | None = None,
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
        modality: of a folder's images, where neither a header nor a folder's name tells it.
        probes: of knn, linear and logistic.
        img_size: to which images are fitted, such as [224,224]; without it the encoder's own.
        cache: folder where features are kept.
        device: such as cuda.
        batch_size: images that are embedded at a time; more than one only where all come in one size.
        seed: of the untrained weights, the linear probe and the intervals.
    """
    from biovfm_monai.evaluation import Probe, probe_listing  # noqa: PLC0415
    from biovfm_monai.evaluation.benchmarks import dataset, medmnist  # noqa: PLC0415

    path, names = str(benchmark), [probes] if isinstance(probes, str) else list(probes)
    data = medmnist(path) if path.endswith(".npz") else dataset(path, task, modality)
    run = Probe(encoder, data, names, img_size, cache, device, batch_size, seed=seed, output_path=out)
    return probe_listing(run.run())


def segment(
    bundle: str, *images: str, out: str, dicom_seg: bool = False, memory: float | None = None, **overrides: Any
) -> str:
    """Write a label map for each image, as NIfTI with its geometry, and a picture of it.

    Args:
        bundle: folder of a trained bundle.
        *images: files, folders of them, or folders of DICOM series.
        out: folder to write into.
        dicom_seg: to write DICOM segmentations of DICOM series, too.
        memory: GiB that an image may take, if not all that the machine has.
        **overrides: keys of the bundle's inference.json, as they were given for the training.
    """
    if not images:
        raise InputError("name at least one image file or folder.")
    from biovfm_monai.evaluation import segment_files  # noqa: PLC0415

    paths = [str(image) for image in images]
    done, aside = segment_files(str(bundle), paths, str(out), bool(dicom_seg), memory, overrides)
    return _served(str(out), done, aside)


def classify(bundle: str, *images: str, out: str = "probabilities.csv", **overrides: Any) -> str:
    """Write a table with the probability of each class for each image.

    Args:
        bundle: folder of a trained bundle.
        *images: files, folders of them, or folders of DICOM series.
        out: .csv file to write.
        **overrides: keys of the bundle's inference.json, as they were given for the training.
    """
    if not images:
        raise InputError("name at least one image file or folder.")
    from biovfm_monai.evaluation import classify_files  # noqa: PLC0415

    done, aside = classify_files(str(bundle), [str(image) for image in images], str(out), overrides)
    return _served(str(out), done, aside)


def _served(out: str, done: int, aside: Sequence[tuple[str, str]]) -> str:
    if not done:
        raise InputError(f"no image could be used. {aside[0][1] if aside else 'There is none.'}")
    return "\n".join([f"{out}: ready, {done} image(s).", *(f"set aside: {reason}" for _, reason in aside)])


def info(encoder: str) -> str:
    """Show how an encoder file's network is built, how its images were prepared, and how it was trained.

    Args:
        encoder: encoder file.
    """
    from biovfm_monai.checkpoints import encoder_info  # noqa: PLC0415

    return json.dumps(encoder_info(encoder), indent=1)


def convert(
    source: str,
    path: str,
    out: str,
    num_heads: int | None = None,
    in_channels: int | None = None,
    img_size: Any = None,
    volume_size: Any = None,
    inflation: str | None = None,
    mean: Any = None,
    std: Any = None,
    section: str | None = None,
) -> str:
    """Turn a checkpoint of another project into an encoder file.

    Args:
        source: its layout: biovfm, dino, dinov2, dinov3, eva02, huggingface, mae, mocov3, monai, pumit or timm.
        path: file, or folder of Hugging Face.
        out: encoder file to write.
        num_heads: of the network, where its width is none of the published ones.
        in_channels: 1 to make a colour encoder one of grey images.
        img_size: size the network was made for, where it was no square or cube, such as [224,448].
        volume_size: to make an encoder of 2D images one of volumes, such as [80,224,224].
        inflation: how, average or center.
        mean: of the normalisation of its input, one number or one per channel.
        std: likewise.
        section: which of the networks in a file, such as model or teacher.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    from biovfm_monai.checkpoints import convert as run  # noqa: PLC0415

    encoder, left_out = run(**options | {"path": str(path), "out": str(out)})
    size = " x ".join(str(n) for n in encoder.img_size)
    what = f"{size}, {encoder.in_channels} channel(s), {encoder.embed_dim} wide, {len(encoder.blocks)} blocks"
    done = f"{out}: ready. {what} of {encoder.arguments['num_heads']} heads, pooled by {encoder.global_pool!r}."
    without = "" if mean is not None else "\nWithout --mean and --std `biovfm embed` cannot use it."
    return f"{done}\nLeft out: {', '.join(left_out) or 'nothing'}{without}"


def export(target: str, path: str, out: str, img_size: Any = None, anisotropy: int | None = None) -> str:
    """Write an encoder file in another format, or all that a run has trained.

    Args:
        target: safetensors, timm, dinov2, huggingface, monai, pumit, torchscript, onnx, bundle (its
            models/model.pt); or method, with heads and teacher.
        path: encoder file; of method, a run's models/state, or one in it.
        out: file to write; of huggingface, a folder.
        img_size: of onnx, size of its input, such as [224,224].
        anisotropy: of onnx, 0 for isotropic volumes to 5 for 2D images.
    """
    from biovfm_monai.checkpoints import export as run  # noqa: PLC0415

    run(target, str(path), str(out), img_size, anisotropy)
    return f"{out}: ready."


def plan(
    *config: str,
    processes: int = 1,
    memory: float | None = None,
    rate: Any = None,
    price: float | None = None,
    grid: Any = None,
    **overrides: Any,
) -> str:
    """Tell what a run will take, before it begins: parameters, FLOPs, memory, time and cost.

    Args:
        *config: a bundle's train.json, and overlays that go on top of it.
        processes: that share each batch, one for each device.
        memory: GiB that tensors may take on a device, to find the largest micro-batch that fits.
        rate: FLOP/s of a device, or the log.jsonl of a run that measured it, for the time.
        price: of a device for an hour, for the cost.
        grid: values to plan with, such as "{'batch_size':[64,256]}"; a line for each combination.
        **overrides: keys of the configuration, as on the bundle's command line, such as --precision bf16.
    """
    from biovfm_monai.engines import report_plans  # noqa: PLC0415

    if not config:
        raise InputError("name a bundle's train.json.")
    return report_plans([str(file) for file in config], overrides, processes, memory, rate, price, grid)


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


def bundle(name: str, folder: str) -> str:
    """Copy a shipped bundle to FOLDER/NAME, and the overlays to FOLDER/configs, ready to edit and run.

    Args:
        name: such as biovfm_mae_pretraining.
        folder: is made if need be.
    """
    import shlex  # noqa: PLC0415

    from biovfm_monai.shipped import copy_bundle  # noqa: PLC0415

    root = str(copy_bundle(name, str(folder)))
    train = shlex.quote(root + "/configs/train.json")
    command = f"python -m monai.bundle run --config_file {train} --bundle_root {shlex.quote(root)}"
    return f"{root}: ready. Run it with\n\n    {command}\n"


def label_init(app: str, bundles: Any) -> str:
    """Write a MONAI Label app that serves bundles; docs/monai-label.md says how to install MONAI Label.

    Args:
        app: folder to make.
        bundles: shipped ones, or folders of your own with their models, such as brain_mri_segmentation,image_embedding.
    """
    import shlex  # noqa: PLC0415

    from biovfm_monai.label import init_app  # noqa: PLC0415

    names = bundles.split(",") if isinstance(bundles, str) else [str(name) for name in bundles]
    root = str(init_app(str(app), names))
    return f"{root}: ready. Serve it with\n\n    monailabel start_server --app {shlex.quote(root)} --studies IMAGES\n"


def main() -> None:
    """Entry point of the `biovfm` command."""
    report_input_errors()
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments) and "--" not in arguments:
        # A verb that takes any option would take this one, too, and begin its work.
        arguments = [text for text in arguments if text not in ("--help", "-h")] + ["--", "--help"]
    fire.Fire(
        {
            "quickstart": quickstart,
            "index": index,
            "pack": pack,
            "verify": verify,
            "embed": embed,
            "probe": probe,
            "segment": segment,
            "classify": classify,
            "info": info,
            "plan": plan,
            "scale": {"fit": scale_cli.fit, "factors": scale_cli.factors, "compare": scale_cli.compare},
            "report": report,
            "bundle": bundle,
            "label": {"init": label_init},
            "convert": convert,
            "export": export,
        },
        command=arguments,
        name="biovfm",
    )


if __name__ == "__main__":
    main()
