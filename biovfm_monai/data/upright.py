"""Pictures turned as a camera's tag of orientation says (EXIF 2.3, 4.6.4 A; TIFF 6.0, p. 36)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import tifffile
from PIL import Image

__all__ = ["orientation_of", "orientation_of_tiff", "upright", "upright_array", "upright_size"]

_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_T = TypeVar("_T")


def orientation_of(image: Image.Image) -> int:
    """How an opened JPEG or PNG is still to be turned, 1 (not at all) to 8; no pixel is read.

    A tag that cannot be read, or stands behind a PNG's pixels, turns nothing.
    """
    # Pillow turns TIFF by itself, and would read all of a PNG to look behind its pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        return _known(image.getexif().get(_TAG))
    except (SyntaxError, ValueError, LookupError, TypeError, struct.error):
        return 1


def orientation_of_tiff(file: tifffile.TiffFile) -> int:
    """How all pages of a TIFF are to be turned, 1 (not at all) to 8, as its first one says."""
    tag = file.pages.first.tags.get(_TAG)
    return 1 if tag is None else _known(tag.value)


def _known(value: Any) -> int:
    return int(value) if value in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """An opened JPEG or PNG, turned."""
    orientation = orientation_of(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def upright_array(array: np.ndarray, orientation: int, x: int, y: int) -> np.ndarray:
    """An array turned likewise, of which x and y are the axes."""
    if orientation >= 5:
        array = array.swapaxes(x, y)
    flipped = tuple(axis for axis, of in ((x, (2, 3, 6, 7)), (y, (3, 4, 7, 8))) if orientation in of)
    return np.flip(array, flipped)


def upright_size(along: Sequence[_T], orientation: int) -> tuple[_T, ...]:
    """Size or spacing along x, y and maybe z, of the turned image."""
    x, y, *rest = along
    return (y, x, *rest) if orientation >= 5 else (x, y, *rest)
