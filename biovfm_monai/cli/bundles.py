"""Bundles: copied, planned, and used on files, or by a MONAI Label server."""

from __future__ import annotations

from typing import Any

from biovfm_monai.cli.served import served
from biovfm_monai.errors import InputError

__all__ = ["bundle", "classify", "label_init", "plan", "segment"]


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
    return served(str(out), done, aside)


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
    return served(str(out), done, aside)


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
