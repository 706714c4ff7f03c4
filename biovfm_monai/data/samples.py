"""Real images that ship inside our dependencies, so that everything can be tried without a download.

MNI152 T1 with grey and white matter maps (nilearn), retina, microaneurysms, immunohistochemistry and a cell
(scikit-image), CT, MR and ultrasound test files (pydicom). Origins and licences: docs/sample-images.md.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from skimage.transform import AffineTransform, warp

from biovfm_monai import distributed
from biovfm_monai.data.datalist import DATALIST
from biovfm_monai.errors import InputError

__all__ = ["PLACES", "sample_datalist", "write_samples"]

PLACES = [f"{height} {depth}" for height in ("low", "middle", "high") for depth in ("back", "centre", "front")]
"""Classes of the probe: which ninth of the brain a crop's centre lies in, by height and by depth."""

_CROP = 64
_PERIOD, _TRAIN, _GAP = 15, 8, 2
_THICK = (0, 2, 4, 6)
_CROPS = {"place_training": 200, "place_test": 80}


def sample_datalist() -> list[dict[str, Any]]:
    """The images as they lie in the installed packages, described as a user's own would be.

    The T1 volume's "label" is its grey and white matter maps. Spacing in mm where the file or its documentation
    states one.
    """
    brain = _package("nilearn") / "datasets" / "data"
    photos = _package("skimage") / "data"

    def volume(name: str) -> str:
        return str(brain / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")

    def item(image: str | Path, modality: str, source: str, subject: str, **more: Any) -> dict[str, Any]:
        return {"image": str(image), "modality": modality, "source": source, "subject": subject, **more}

    def dicom(name: str) -> Path:
        return _package("pydicom") / "data/test_files" / name

    return [
        item(volume("t1"), "mri", "nilearn", "mni152", spacing=[1.0, 1.0, 1.0], label=[volume("gm"), volume("wm")]),
        item(photos / "retina.jpg", "fundus", "scikit-image", "retina"),
        item(photos / "microaneurysms.png", "fundus", "scikit-image", "hrf-07"),
        item(photos / "ihc.png", "pathology", "scikit-image", "colon-ihc"),
        item(photos / "cell.png", "microscopy", "scikit-image", "cell", spacing=[0.000107, 0.000107]),
        item(dicom("CT_small.dcm"), "ct", "pydicom", "pydicom-ct", spacing=[0.661468, 0.661468, 5.0]),
        item(dicom("examples_overlay.dcm"), "mri", "pydicom", "pydicom-mr", spacing=[0.723140, 0.723140, 4.0]),
        item(dicom("examples_rgb_color.dcm"), "ultrasound", "pydicom", "pydicom-us"),
    ]


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the sample images need the package {name}: pip install {name}")
    return Path(spec.origin).parent


def write_samples(folder: str | Path) -> str:
    """Lay the sample images out as a dataset folder with a datalist.json; a folder that has one is left as it is.

    "training" holds slabs of eight axial slices of the T1 volume and all the other images. Between the slabs, three
    slices with two to spare on either side are held out. "mixed" holds these images, the slabs' slices once more as
    volumes of slices 15 mm apart, and two isotropic volumes of another head (nibabel). "place_training" and
    "place_test" are labelled 64 x 64 crops of the slabs and of the held-out slices for a probe: in which ninth of the
    brain (`PLACES`) does the crop's centre lie? Each crop is turned, mirrored, zoomed and changed in contrast at
    random, so that no pixel sits where its neighbour in a training slice does.

    Of several processes only the main one writes, and the others wait for it.

    Returns:
        The folder.

    Raises:
        InputError: when the folder holds something else.
    """
    return lay_out(Path(folder), _sections)


def lay_out(folder: Path, write: Callable[[Path], Mapping[str, Any]]) -> str:
    """Make a dataset folder in one step; one that has a datalist.json is left as it is.

    Of several processes only the main one writes, and the others wait for it.

    Args:
        folder: to make.
        write: puts images into an empty folder, and returns the sections of its datalist.

    Returns:
        The folder.

    Raises:
        InputError: when the folder holds something else.
    """
    if distributed.is_main() and not (folder / DATALIST).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"{folder}: holds files but no {DATALIST}. Give your images as --dataset_dir, or move them away."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            new = Path(name) / folder.name
            new.mkdir()
            (new / DATALIST).write_text(json.dumps(write(new), indent=1), encoding="utf-8")
            os.replace(new, folder)  # noqa: PTH105 - takes the place of an empty folder in one step
    distributed.barrier()
    return str(folder)


def _sections(folder: Path) -> dict[str, list[dict[str, Any]]]:
    brain, *others = sample_datalist()
    sections: dict[str, list[dict[str, Any]]] = {"training": _write_slabs(brain, folder)}
    for item in others:
        copy = folder / item["modality"] / Path(item["image"]).name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(item["image"], copy)
        sections["training"].append({**item, "image": str(copy.relative_to(folder))})
    sections["mixed"] = [*sections["training"], *_write_volumes(brain, folder)]
    return sections | _write_crops(brain, folder)


def brain_box(volume: np.ndarray) -> list[slice]:
    ranges = [np.flatnonzero(volume.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return [slice(int(r[0]), int(r[-1]) + 1) for r in ranges]


def _write_slabs(brain: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    image = nib.load(brain["image"])
    x, y, z = brain_box(np.asarray(image.dataobj))
    (folder / "mri").mkdir()
    items = []
    for start in range(z.start, z.stop - _TRAIN + 1, _PERIOD):
        path = folder / "mri" / f"mni152_slices_{start:03d}.nii.gz"
        nib.save(image.slicer[x, y, start : start + _TRAIN], path)
        items.append({**{k: v for k, v in brain.items() if k != "label"}, "image": str(path.relative_to(folder))})
    return items


def _write_volumes(brain: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Volumes that show no held-out slice: one slice of each slab makes thick slices, with gaps, of the same brain."""
    head = _package("nibabel") / "tests/data/example4d.nii.gz"
    shutil.copyfile(head, folder / "mri" / head.name)
    fields = {"modality": "mri", "source": "nibabel", "subject": "nibabel-head", "spacing": [2.0, 2.0, 2.2]}
    items: list[dict[str, Any]] = [{"image": f"mri/{head.name}::{number}", **fields} for number in range(2)]
    image = nib.load(brain["image"])
    x, y, z = brain_box(np.asarray(image.dataobj))
    for first in _THICK:
        path = folder / "mri" / f"mni152_thick_{first}.nii.gz"
        nib.save(image.slicer[x, y, z.start + first : z.stop - _TRAIN + first + 1 : _PERIOD], path)
        fields = {key: value for key, value in brain.items() if key != "label"}
        items.append({**fields, "image": str(path.relative_to(folder)), "spacing": [1.0, 1.0, float(_PERIOD)]})
    return items


def _write_crops(brain: dict[str, Any], folder: Path) -> dict[str, list[dict[str, Any]]]:
    volume = np.asarray(nib.load(brain["image"]).dataobj).astype(np.float32)
    volume /= np.percentile(volume, 99.5)
    box = brain_box(volume)[2]
    place = np.arange(box.stop - box.start) % _PERIOD
    slices = {"place_training": place < _TRAIN, "place_test": (place >= _TRAIN + _GAP) & (place < _PERIOD - _GAP)}
    # Thirds by the brain's own tissue, so that no ninth is a thin rim.
    cuts = [np.quantile(np.nonzero(volume)[axis], (1 / 3, 2 / 3)) for axis in (2, 1)]
    rng = np.random.default_rng(0)
    sections: dict[str, list[dict[str, Any]]] = {}
    for name, chosen in slices.items():
        (folder / name).mkdir()
        allowed = np.zeros(volume.shape[2], dtype=bool)
        allowed[box] = chosen
        centres = np.argwhere((volume > 0) & allowed)
        ninths = 3 * np.digitize(centres[:, 2], cuts[0]) + np.digitize(centres[:, 1], cuts[1])
        sections[name] = []
        for label, title in enumerate(PLACES):
            for number, (x, y, z) in enumerate(rng.choice(centres[ninths == label], _CROPS[name], replace=False)):
                path = folder / name / f"{title.replace(' ', '_')}_{number:03d}.png"
                crop = _disguised_crop(volume[:, :, z].T[::-1], (x, volume.shape[1] - 1 - y), rng)
                Image.fromarray((crop * 255).round().astype(np.uint8)).save(path)
                sections[name].append({"image": str(path.relative_to(folder)), "modality": "mri", "label": title})
    return sections


def _disguised_crop(plane: np.ndarray, centre: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A crop around (column, row), turned, mirrored, zoomed and changed in contrast at random; values in [0, 1]."""
    half = (_CROP - 1) / 2
    zoom = rng.uniform(0.8, 1.25)
    mirror = rng.choice([-1.0, 1.0])
    view = AffineTransform(translation=(-half, -half))
    view += AffineTransform(scale=(mirror * zoom, zoom))
    view += AffineTransform(rotation=rng.uniform(0, 2 * np.pi))
    view += AffineTransform(translation=centre)
    crop = warp(plane, view, output_shape=(_CROP, _CROP), order=1, mode="constant", cval=0.0)
    return np.clip(crop, 0, 1) ** rng.uniform(0.7, 1.4)
