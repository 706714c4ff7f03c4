"""Images side by side on one sheet, each with a line above it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

__all__ = ["draw_sheet", "middle_slice"]

_MARGIN, _HEADING = 4, 16


def middle_slice(image: Tensor) -> np.ndarray:
    """C x D x H x W in [0, 1] to H x W x 3, 8 bit: the first three channels of the slice in the middle."""
    plane = image[:, image.shape[1] // 2].clamp(0, 1).cpu().permute(1, 2, 0)
    colours = plane[..., :3] if plane.shape[-1] >= 3 else plane[..., :1].expand(*plane.shape[:2], 3)
    return np.asarray((colours.float().numpy() * 255).round().astype(np.uint8))


def draw_sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]], width: int = 192) -> np.ndarray:
    """Draw rows of (line, H x W x 3) as one image; each is resized to fit a square of `width` pixels."""
    tile, columns = width + _MARGIN, max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * tile + _MARGIN, len(rows) * (tile + _HEADING) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = number * (tile + _HEADING)
        for column, (line, image) in enumerate(row):
            left = column * tile + _MARGIN
            draw.text((left, top + 2), line[: width // 6], fill="black")
            ratio = width / max(image.shape[:2])
            size = (max(round(image.shape[1] * ratio), 1), max(round(image.shape[0] * ratio), 1))
            way = Image.Resampling.NEAREST if ratio >= 1 else Image.Resampling.BOX
            sheet.paste(Image.fromarray(image).resize(size, way), (left, top + _HEADING))
    return np.asarray(sheet)
