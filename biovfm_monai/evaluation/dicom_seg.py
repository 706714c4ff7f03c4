"""Label maps as DICOM segmentation objects (https://highdicom.readthedocs.io/en/latest/seg.html)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from biovfm_monai import __version__
from biovfm_monai.data.dicom import image_headers, is_dicom, sorted_slices
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically

__all__ = ["write_dicom_seg"]


def write_dicom_seg(path: Path, image: str | Sequence[str], classes: np.ndarray, names: Sequence[str], by: str) -> None:
    """Write a label map of a DICOM series as one segment per class; patient and study are those of the series.

    Args:
        path: of the file, .dcm.
        image: the series' folder, or its files.
        classes: X x Y x Z on the grid that `read_image` gives the series, 0 for background.
        names: of the classes from 1 on.
        by: name of what found them.

    Raises:
        InputError: when the image is no DICOM series of single slices, or highdicom is not installed.
    """
    try:
        import highdicom as hd  # noqa: PLC0415 - optional
        from pydicom.sr.codedict import codes  # noqa: PLC0415
    except ImportError as error:
        raise InputError("--dicom_seg needs highdicom. Install biovfm-monai[dicomseg].") from error
    slices = [pydicom.dcmread(file) for file in _series(image)]
    if len(slices) != (classes.shape[2] if classes.ndim == 3 else 1):
        raise InputError(f"{image}: {len(slices)} DICOM file(s) for {classes.shape} voxels. Give single slices.")
    kind = hd.sr.CodedConcept("123037004", "SCT", "Anatomical Structure")
    found: Any = hd.AlgorithmIdentificationSequence(by, codes.cid7162.ArtificialIntelligence, __version__)
    segments = [
        hd.seg.SegmentDescription(
            number, name, kind, hd.sr.CodedConcept(f"class-{number}", "99BIOVFM", name),
            hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, found,
        )
        for number, name in enumerate(names, start=1)
    ]  # fmt: skip
    frames = classes.reshape(*classes.shape[:2], -1).transpose(2, 1, 0)
    made = hd.seg.Segmentation(
        slices, np.ascontiguousarray(frames), hd.seg.SegmentationTypeValues.BINARY, segments, hd.UID(), 1, hd.UID(), 1,
        "biovfm_monai", by, __version__, "none",
    )  # fmt: skip
    with write_atomically(path) as draft:
        made.save_as(draft)


def _series(image: str | Sequence[str]) -> list[Path]:
    """Files in the order in which `read_image` stacks them."""
    files = [Path(image)] if isinstance(image, str) else [Path(one) for one in image]
    if files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if not file.name.startswith(".") and file.is_file())
    files = [file for file in files if is_dicom(file)]
    if not files:
        raise InputError(f"{image}: is no DICOM series, so it has no DICOM segmentation. Leave --dicom_seg out.")
    headers = image_headers(files)
    return sorted_slices(headers).paths if len(headers) > 1 else list(headers)
