"""What the numbers of a DICOM file mean: values for display of radiographs, uptake in PET.

https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.11.2.html (VOI LUT), sect_C.7.6.3.html
(polarity), and QIBA's profile of the standardised uptake value, https://doi.org/10.1118/1.3483293.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pydicom

try:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
except ImportError:  # pydicom 2, which MONAI Label 0.8.5 needs
    from pydicom.pixel_data_handlers import apply_modality_lut, apply_voi_lut

__all__ = ["displayed", "is_radiograph", "measured", "uptake_factor"]

logger = logging.getLogger(__name__)

_RADIOGRAPHS = {"CR", "DX", "IO", "MG", "PX", "RF", "RG", "XA"}
_DAY = timedelta(days=1)


def is_radiograph(header: pydicom.Dataset) -> bool:
    """Whether a file holds projections in grey, whose values mean something on a display only."""
    return header.get("Modality") in _RADIOGRAPHS and header.get("SamplesPerPixel", 1) == 1


def measured(values: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    """What the file stores, rescaled: ITK's reader turns MONOCHROME1 around before it rescales, which is undone here.

    Args:
        values: of the file as ITK reads it.
        header: of the file.
    """
    if header.get("PhotometricInterpretation") != "MONOCHROME1":
        return values
    slope, intercept = _rescaling(header)
    both = -1 if header.get("PixelRepresentation") else 2 ** int(header.BitsStored) - 1
    return np.asarray(slope * both + 2 * intercept - values.astype(np.float64))


def displayed(values: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    """What a display shows: the window or table of the file applied, and dense tissue bright whatever the polarity.

    Args:
        values: as from `measured`, in any shape.
        header: of the file, without its pixels.

    Returns:
        float32 of the same shape; where the header marks padding, the darkest value.
    """
    padding = _padding(values, header)
    whole = values.astype(np.int64) if (values == np.rint(values)).all() else values
    if header.get("ModalityLUTSequence"):
        whole = apply_modality_lut(whole, header)
    try:
        shown = np.asarray(apply_voi_lut(whole, header), dtype=np.float32)
    except (ValueError, NotImplementedError, IndexError, TypeError) as error:
        logger.warning("the window of a radiograph means nothing (%s), and is left out", error)
        shown = whole.astype(np.float32)
    if header.get("PhotometricInterpretation") == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        shown = shown[~padding].max(initial=0) - shown
    shown[padding] = shown[~padding].min() if (~padding).any() else 0
    return shown


def _padding(values: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    """Which pixels hold the value, or lie in the range, that stands for no measurement."""
    if header.get("PixelPaddingValue") is None:
        return np.zeros(values.shape, dtype=bool)
    slope, intercept = _rescaling(header)
    ends = [
        float(value) * slope + intercept
        for value in (header.PixelPaddingValue, header.get("PixelPaddingRangeLimit", header.PixelPaddingValue))
    ]
    return np.asarray((values >= min(ends)) & (values <= max(ends)))


def _rescaling(header: pydicom.Dataset) -> tuple[float, float]:
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), float(intercept or 0)


def uptake_factor(header: pydicom.Dataset) -> float | None:
    """What activity is to be multiplied by to become standardised uptake by body weight, in g/ml.

    Dose and weight come from the header of a PET file; the dose is taken at the beginning of the scan, to which
    "START" has corrected the decay. None where the header does not say enough, or what it says cannot be.
    """
    units = header.get("Units")
    if units == "GML":
        return 1.0
    if units == "CNTS":
        philips = header.get((0x7053, 0x1000))
        return float(philips.value) if philips is not None and float(philips.value) > 0 else None
    injected = (header.get("RadiopharmaceuticalInformationSequence") or [None])[0]
    correction, weight = header.get("DecayCorrection"), header.get("PatientWeight")
    if units != "BQML" or injected is None or not weight or correction not in ("START", "ADMIN"):
        return None
    dose = injected.get("RadionuclideTotalDose")
    if not dose:
        return None
    decayed = float(dose)
    if correction == "START":
        half_life, waited = injected.get("RadionuclideHalfLife"), _waited(header, injected)
        if not half_life or waited is None:
            return None
        decayed *= 2 ** (-waited / float(half_life))
    return float(weight) * 1000 / decayed


def _waited(header: pydicom.Dataset, injected: pydicom.Dataset) -> float | None:
    """Seconds from the injection to the beginning of the scan; None when unknown or more than a day."""
    scan = _moment(header.get("SeriesDate"), header.get("SeriesTime"))
    if scan is None:
        return None
    begin = _stamp(injected.get("RadiopharmaceuticalStartDateTime"))
    if begin is None:
        begin = _moment(header.get("SeriesDate"), injected.get("RadiopharmaceuticalStartTime"))
        if begin is not None and begin > scan:
            begin -= _DAY
    if begin is None or not timedelta() <= scan - begin < _DAY:
        return None
    return (scan - begin).total_seconds()


def _moment(date: Any, time: Any) -> datetime | None:
    return _stamp(f"{date}{time}") if date and time else None


def _stamp(text: Any) -> datetime | None:
    """A DICOM date and time without its zone, YYYYMMDDHHMMSS.F."""
    whole, _, fraction = str(text or "").split("+")[0].split("-")[0].strip().partition(".")
    try:
        seconds = datetime.strptime(whole, "%Y%m%d%H%M%S")
    except ValueError:
        return None
    return seconds + timedelta(seconds=float(f"0.{fraction}") if fraction.isdigit() else 0.0)
