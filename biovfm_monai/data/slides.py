"""Whole slides, as tiles of tissue at half a micrometre per pixel (that of a 20x objective), through OpenSlide.

https://openslide.org/formats/; tissue is what is more saturated than Otsu's threshold (https://doi.org/10.1109/TSMC.1979.4310076).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from monai.data import WSIReader
from PIL import Image
from skimage.color import rgb2hsv
from skimage.filters import threshold_otsu

from biovfm_monai.data.headers import TIFF, readable, suffix
from biovfm_monai.errors import InputError

__all__ = ["SLIDES", "describe_slide", "is_slide", "read_tile"]

SLIDES = (".bif", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".vms", ".vmu")

_RESOLUTION, _TILE = 0.5, 512
_MASK_PIXEL = 32
_AT_ONCE = 8192
_TISSUE, _LEAST_SATURATION = 0.25, 0.05


def is_slide(path: Path) -> bool:
    """Whether a file is a whole slide: by its name, or as a TIFF that holds itself at several sizes."""
    if suffix(path) not in TIFF:
        return suffix(path) in SLIDES
    try:
        with readable(path, "header cannot be read"), tifffile.TiffFile(path) as file:
            return bool(file.series[0].is_pyramidal and file.pages.first.is_tiled)
    except InputError:
        return False


def describe_slide(path: Path) -> list[dict[str, Any]]:
    """One item per tile of 512 x 512 pixels of 0.5 µm of which a quarter at least is tissue.

    The image is named FILE::X::Y, by the tile's upper left corner in pixels of the largest size.

    Raises:
        InputError: when OpenSlide is not installed or cannot read the file, or the file does not say its resolution.
    """
    with readable(path, "cannot be read as a whole slide"):
        slide = _opened(path)
        side = _TILE * _shrunk(path, slide)
        width, height = slide.dimensions
        columns, rows = int(width // side), int(height // side)
        mask = _tissue(slide, columns, rows, side) if columns and rows else np.zeros((0, 0))
    share = mask.reshape(rows, _MASK_PIXEL, columns, _MASK_PIXEL).mean((1, 3)) if mask.size else mask
    described = {
        "modality": "pathology", "shape": [_TILE, _TILE], "channels": 3, "dtype": "uint8", "anisotropy": 5,
        "spacing": [_RESOLUTION / 1000] * 2, "patient": path.stem,
    }  # fmt: skip
    corners = [
        (round(column * side), round(row * side)) for row, column in zip(*np.nonzero(share >= _TISSUE), strict=True)
    ]
    if not corners:
        raise InputError(f"{path}: shows no tissue. Remove the file.")
    return [{"image": f"{path}::{x}::{y}", **described} for x, y in corners]


def read_tile(path: Path, part: str | None) -> np.ndarray:
    """The tile of a whole slide that "X::Y" names, 3 x height x width.

    Raises:
        InputError: as `describe_slide`, and when no tile is named.
    """
    corner = (part or "").split("::")
    if len(corner) != 2 or not all(number.isdecimal() for number in corner):
        raise InputError(f"{path}: a whole slide does not fit into memory. Name a tile as {path.name}::0::0.")
    slide = _opened(path)
    shrunk = _shrunk(path, slide)
    level = slide.get_best_level_for_downsample(shrunk * 1.01)
    side = round(_TILE * shrunk / slide.level_downsamples[level])
    x, y = map(int, corner)
    reader = WSIReader(backend="openslide")
    tile, _ = reader.get_data(reader.read(str(path)), location=(y, x), size=(side, side), level=level)
    picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(tile, 0, -1)))
    return np.moveaxis(np.asarray(picture.resize((_TILE, _TILE), Image.Resampling.BOX)), -1, 0)


def _opened(path: Path) -> Any:
    try:
        import openslide  # noqa: PLC0415 - optional
    except ImportError as error:
        raise InputError(f'{path}: whole slides need OpenSlide. Run pip install "biovfm-monai[wsi]".') from error
    return openslide.OpenSlide(path)


def _shrunk(path: Path, slide: Any) -> float:
    """How many pixels of the largest size make one of a tile, along each axis."""
    pixel = slide.properties.get("openslide.mpp-x")
    if pixel is None or not 0 < float(pixel) < 100:
        raise InputError(f"{path}: does not say how many micrometres a pixel has. Save it with its resolution.")
    return _RESOLUTION / float(pixel)


def _tissue(slide: Any, columns: int, rows: int, side: float) -> np.ndarray:
    """Which pixels of a small picture, 32 x 32 to a tile, show tissue."""
    level = slide.get_best_level_for_downsample(side / _MASK_PIXEL)
    fine = side / slide.level_downsamples[level]
    # A slide that holds no small picture of itself does not fit into memory.
    step = max(int(_AT_ONCE / fine), 1)
    picture = np.empty((rows * _MASK_PIXEL, columns * _MASK_PIXEL, 3), dtype=np.uint8)
    for row, column in product(range(0, rows, step), range(0, columns, step)):
        counts = min(step, columns - column), min(step, rows - row)
        corner = round(column * side), round(row * side)
        block = slide.read_region(corner, level, [round(count * fine) for count in counts]).convert("RGB")
        block = block.resize([count * _MASK_PIXEL for count in counts], Image.Resampling.BOX)
        top, left = row * _MASK_PIXEL, column * _MASK_PIXEL
        picture[top : top + block.height, left : left + block.width] = np.asarray(block)
    saturation = rgb2hsv(picture)[..., 1]
    return np.asarray(saturation > max(threshold_otsu(saturation), _LEAST_SATURATION))
