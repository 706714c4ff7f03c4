"""Trained bundles on files, without a server: label maps and probabilities of classes, by a bundle's inference.json.

Of the configuration the keys preprocessing, network_def, inferer and postprocessing are used, as MONAI Label does
(https://monai.readthedocs.io/en/stable/mb_specification.html), and the weights in models/model.pt.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, list_data_collate
from monai.inferers import Inferer
from monai.transforms import Compose, SaveImage, SaveImaged
from PIL import Image

from biovfm_monai.checkpoints import load_model
from biovfm_monai.data import read_image
from biovfm_monai.data.find import NO_IMAGE, Rejected, survey
from biovfm_monai.data.headers import suffix
from biovfm_monai.engines import draw_overlay, write_chances
from biovfm_monai.errors import InputError, reason_of
from biovfm_monai.evaluation.dicom_seg import write_dicom_seg
from biovfm_monai.files import write_atomically
from biovfm_monai.sheet import draw_sheet

__all__ = ["Bundle", "classify_files", "open_bundle", "segment_files"]


class Bundle(NamedTuple):
    """What a bundle's inference.json makes: parts from file to answer, the network with its weights."""

    root: Path
    parser: ConfigParser
    preprocessing: Compose
    network: torch.nn.Module
    inferer: Inferer
    postprocessing: Compose
    device: torch.device

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The sample of a datalist item, with "pred" as the bundle's postprocessing leaves it; it writes no file."""
        sample = self.preprocessing({key: item[key] for key in ("image", "modality") if item.get(key)})
        batch = list_data_collate([{"image": sample["image"]}])["image"].to(self.device)
        with torch.inference_mode():
            sample["pred"] = self.inferer(batch, self.network)[0]
        return dict(self.postprocessing(sample))


def open_bundle(root: str | Path, overrides: Mapping[str, Any] | None = None) -> Bundle:
    """Make a bundle's parts, with trained weights.

    Args:
        root: the bundle's folder.
        overrides: keys of inference.json, those that the training was given, such as classes or encoder_path.

    Raises:
        InputError: when it is no bundle, a key is unknown, or weights are missing or do not fit.
    """
    root = Path(root).expanduser().resolve()
    config = root / "configs/inference.json"
    if not config.is_file():
        raise InputError(f"{config}: no such file. Give the folder of a bundle, as `biovfm bundle` makes it.")
    parser = ConfigParser()
    parser.read_config(str(config))
    for key, value in {"bundle_root": str(root), **(overrides or {})}.items():
        if key.replace("::", "#").split("#")[0] not in parser:
            raise InputError(f"{config}: has no key {key!r}. Give one of its own.")
        parser[key] = value
    try:
        parts = {name: parser.get_parsed_content(name) for name in ("preprocessing", "inferer", "postprocessing")}
        network = parser.get_parsed_content("network_def")
        device = torch.device(parser.get_parsed_content("device"))
        weights = str(parser.get_parsed_content("ckpt_path"))
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{config}: {reason_of(error)}") from error
    kept = [step for step in parts["postprocessing"].transforms if not isinstance(step, SaveImage | SaveImaged)]
    network = load_model(network, weights).to(device).eval()
    return Bundle(root, parser, parts["preprocessing"], network, parts["inferer"], Compose(kept), device)


def segment_files(
    bundle: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    dicom_seg: bool = False,
    memory: float | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[int, list[Rejected]]:
    """Write a label map for each image, NAME_seg.nii.gz with its geometry, and NAME_overlay.png.

    Args:
        bundle: folder of a trained bundle whose postprocessing leaves classes on the file's grid.
        paths: image files, folders of them, or folders of DICOM series.
        out: folder to write into.
        dicom_seg: whether to write NAME_seg.dcm as well, of DICOM series; needs highdicom.
        memory: GiB that an image may take; None for all that the machine has.
        overrides: as of `open_bundle`.

    Returns:
        How many images were labelled, and those set aside with the reason, which are in OUT/set_aside.csv, too.

    Raises:
        InputError: as `open_bundle`.
    """
    opened, folder = open_bundle(bundle, overrides), Path(out)
    budget = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    taken: set[str] = set()

    def label(item: Mapping[str, Any]) -> None:
        _require_fits(item, opened.parser, budget)
        found = opened(item)["pred"]
        name = _name_of(item["image"], taken)
        classes = np.asarray(torch.as_tensor(found)[0].cpu()).astype(np.uint8)
        with write_atomically(folder / f"{name}_seg.nii.gz") as draft:
            affine = np.asarray(found.affine, dtype=float)
            draft.write_bytes(_nifti(classes, affine))
        image = read_image(item["image"])
        with write_atomically(folder / f"{name}_overlay.png") as draft:
            count = int(opened.parser.get_parsed_content("out_channels"))
            row = draw_overlay(image, MetaTensor(torch.from_numpy(classes)[None], affine=image.affine), count)
            Image.fromarray(draw_sheet([row], width=384)).save(draft, format="PNG")
        if dicom_seg:
            write_dicom_seg(folder / f"{name}_seg.dcm", item["image"], classes, _class_names(opened), opened.root.name)

    return _each(paths, label, folder / "set_aside.csv")


def classify_files(
    bundle: str | Path, paths: Sequence[str | Path], out: str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[int, list[Rejected]]:
    """Write a table (.csv) with a row per image, and a column per class with its probability.

    Args:
        bundle: folder of a trained bundle whose postprocessing leaves a probability per class of its key "classes".
        paths: image files, folders of them, or folders of DICOM series.
        out: table to write.
        overrides: as of `open_bundle`.

    Returns:
        How many images were classified, and those set aside with the reason, which are in OUT-set_aside.csv, too.

    Raises:
        InputError: as `open_bundle`, or when the bundle has no classes.
    """
    opened, out = open_bundle(bundle, overrides), Path(out)
    if "classes" not in opened.parser:
        raise InputError(f"{bundle}: its inference.json has no key 'classes'. Give a bundle that classifies.")
    names = [str(name) for name in opened.parser.get_parsed_content("classes")]
    files: list[str] = []
    rows: list[list[float]] = []

    def classify(item: Mapping[str, Any]) -> None:
        chances = opened(item)["pred"].tolist()
        files.append(_shown(item["image"]))
        rows.append(chances)

    done = _each(paths, classify, out.with_name(f"{out.stem}-set_aside.csv"))
    write_chances(out, names, files, rows)
    return done


def _each(
    paths: Iterable[str | Path], call: Callable[[Mapping[str, Any]], None], listing: Path
) -> tuple[int, list[Rejected]]:
    """Call for every image that files and folders hold; what fails by the user's mistake is set aside and listed."""
    done, aside = 0, []
    for path in paths:
        items: list[dict[str, Any]] = []
        try:
            for found in survey(path):
                items += found.items
                aside += [one for one in found.rejected if one.reason != NO_IMAGE or Path(path).is_file()]
        except InputError as error:
            aside.append(Rejected(str(path), str(error)))
        for item in items:
            try:
                call(item)
                done += 1
            except (InputError, RuntimeError, MemoryError) as error:
                # MONAI wraps what a transform refuses in a RuntimeError.
                aside.append(Rejected(_shown(item["image"]), reason_of(error)))
    listing.unlink(missing_ok=True)
    if aside:
        with write_atomically(listing) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Rejected._fields, *aside])
    return done, aside


def _require_fits(item: Mapping[str, Any], parser: ConfigParser, budget: float) -> None:
    """Refuse an image for which the network's answers would not fit, by its header, before any of it is read.

    Counted are the image and two times the logits in float32 on the network's grid, the sliding window's sums among
    them, and the logits on the file's grid, which are resampled in float64.
    """
    voxels, classes = float(np.prod(item["shape"])), int(parser.get_parsed_content("out_channels"))
    wanted = parser.get_parsed_content("spacing") if "spacing" in parser else None
    there = voxels
    if wanted is not None and item.get("spacing") and len(item["shape"]) == 3:
        there *= float(np.prod(item["spacing"])) / float(np.prod(wanted))
    channels = int(item.get("channels", 1))
    needed = (there * 4 * (channels + 2 * classes + 1) + voxels * (8 * channels + 8 * classes)) / 2**30
    if needed > budget:
        size = " x ".join(str(n) for n in item["shape"])
        raise InputError(
            f"{_shown(item['image'])}: {size} voxels need about {needed:.3g} GiB with {classes} classes, and there are "
            f"{budget:.3g}. Crop it, resample it to larger voxels, or give --memory."
        )


def _class_names(bundle: Bundle) -> list[str]:
    """The classes without background, as the metadata name them."""
    meta = ConfigParser.load_config_file(str(bundle.root / "configs/metadata.json"))
    count = int(bundle.parser.get_parsed_content("out_channels"))
    named = meta["network_data_format"]["outputs"]["pred"].get("channel_def", {})
    return [str(named.get(str(number), f"class {number}")) for number in range(1, count)]


def _nifti(classes: np.ndarray, affine: np.ndarray) -> bytes:
    image = nib.Nifti1Image(classes, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes())


def _shown(image: Any) -> str:
    return image if isinstance(image, str) else str(image[0])


def _name_of(image: Any, taken: set[str]) -> str:
    """The file's name without its ending, and a number where another file has it, too."""
    path = Path(_shown(image).replace("::", "_"))
    name = path.name.removesuffix(suffix(path)) or path.name
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    taken.add(unique)
    return unique
