"""Trained bundles and encoders on files, without a server: label maps, probabilities of classes, and embeddings.

What cannot be used is set aside by name with the reason, and the rest is done.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset, MetaTensor
from PIL import Image

from biovfm_monai.checkpoints import load_encoder
from biovfm_monai.data import read_image
from biovfm_monai.data.find import NO_IMAGE, Rejected, require_modality, survey
from biovfm_monai.data.headers import suffix
from biovfm_monai.engines import draw_overlay, machine_memory, write_chances
from biovfm_monai.errors import InputError, reason_of
from biovfm_monai.evaluation.bundle import Bundle, open_bundle
from biovfm_monai.evaluation.dicom_seg import write_dicom_seg
from biovfm_monai.evaluation.embed import embed, transform_of
from biovfm_monai.files import write_atomically
from biovfm_monai.networks import Embedder
from biovfm_monai.sheet import draw_sheet

__all__ = ["classify_files", "embed_files", "segment_files"]


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
    budget = memory or machine_memory()
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

    done = _each(paths, classify, _listing(out))
    write_chances(out, names, files, rows)
    return done


def embed_files(
    paths: Sequence[str | Path], encoder_path: str | Path, out: str | Path, modality: str | None = None
) -> tuple[int, list[Rejected]]:
    """Write an .npz file with "files" and "embeddings", one vector per image.

    A volume in slices has the name of their folder, or of its first slice where several series share a folder.

    Args:
        paths: image files, folders of them, or folders of DICOM series.
        encoder_path: encoder file.
        out: file to write.
        modality: the only one wanted, which is also that of images that neither a header nor a folder gives one.

    Returns:
        How many images were embedded, and those set aside with the reason, which are in OUT-set_aside.csv, too.

    Raises:
        InputError: when the encoder file cannot be used.
    """
    network, transform, out = Embedder(load_encoder(encoder_path)), transform_of(encoder_path), Path(out)
    files: list[str] = []
    vectors: list[np.ndarray] = []

    def vector_of(item: Mapping[str, Any]) -> None:
        vectors.append(embed(network, Dataset(require_modality([dict(item)], modality), transform))[0])
        files.append(_shown(item["image"]))

    done = _each(paths, vector_of, _listing(out))
    with write_atomically(out) as draft, draft.open("wb") as file:
        np.savez(file, files=np.array(files), embeddings=np.array(vectors, np.float32))
    return done


def _listing(table: Path) -> Path:
    """Where what is set aside is listed, beside a table."""
    return table.with_name(f"{table.stem}-set_aside.csv")


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
