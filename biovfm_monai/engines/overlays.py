"""Pictures of what a segmentation finds, beside the truth: the drawing follows scikit-image's `label2rgb`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import AsDiscrete
from PIL import Image
from skimage.color import hsv2rgb
from torch import Tensor

from biovfm_monai import distributed
from biovfm_monai.data.modalities.base import SlicesFirstd
from biovfm_monai.files import write_atomically
from biovfm_monai.sheet import draw_sheet, middle_slice

__all__ = ["OverlayHandler", "draw_overlay"]

_OPACITY = 0.5
_SQUARE = 1.5
_KEYS = ("image", "label", "pred")


class OverlayHandler:
    """Draw (image, truth, prediction) of an evaluation's first images as `overlay.png`, one row each.

    Of a volume it is the slice with most of the truth, across the axis along which the volume is thinnest in mm and
    pixels are nearly squares. A class has the same colour everywhere. Nothing of the files' names is written.

    Args:
        folder: where the picture goes.
        rows: most images that are shown.
    """

    def __init__(self, folder: str | Path, rows: int = 4) -> None:
        self.path, self.rows = Path(folder) / "overlay.png", rows
        self._drawn: list[list[tuple[str, np.ndarray]]] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator whose outputs hold "image", and "label" and "pred" with a channel per class."""
        engine.add_event_handler(Events.STARTED, self._drawn.clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._draw)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _draw(self, engine: Engine) -> None:
        for sample in engine.state.output:
            if len(self._drawn) < self.rows:
                self._drawn.append(_row(sample, len(self._drawn) + 1))

    def _write(self) -> None:
        if distributed.is_main() and self._drawn:
            with write_atomically(self.path) as draft:
                Image.fromarray(draw_sheet(self._drawn, width=240)).save(draft, format="PNG")


def draw_overlay(image: MetaTensor, found: MetaTensor, classes: int) -> list[tuple[str, np.ndarray]]:
    """The slice of an image with most of what is found, and the same with that in colours, as `OverlayHandler` draws.

    Args:
        image: C x X x Y (x Z).
        found: 1 x X x Y (x Z), the number of a class, 0 for background.
        classes: how many there are, the background included.
    """
    one_hot = AsDiscrete(to_onehot=classes)(found)
    plane, _, shown = _row({"image": image, "label": one_hot, "pred": one_hot}, 1)
    return [("image", plane[1]), ("found", shown[1])]


def _row(sample: Mapping[str, Tensor], number: int) -> list[tuple[str, np.ndarray]]:
    turned = SlicesFirstd(_KEYS)({name: sample[name] for name in _KEYS})
    axis = _thinnest(turned["image"])
    image, truth, found = (_across(torch.as_tensor(turned[name]), axis) for name in _KEYS)
    place = int((truth.argmax(0) > 0).flatten(1).sum(1).argmax())
    image = image[:, place : place + 1].float()
    low, high = image.amin(), image.amax()
    plane = middle_slice((image - low) / (high - low).clamp(min=1e-6))
    colours = _colours(len(truth))
    return [
        (f"image {number}", plane),
        ("truth", _blended(plane, truth[:, place].argmax(0), colours)),
        ("prediction", _blended(plane, found[:, place].argmax(0), colours)),
    ]


def _thinnest(image: MetaTensor) -> int:
    """The axis to look along, of an image whose slices come first."""
    spacing = [float(value) for value in image.pixdim]
    planes = [sorted(spacing[:axis] + spacing[axis + 1 :]) for axis in range(3)]
    square = [axis for axis in range(3) if axis == 0 or planes[axis][1] < _SQUARE * planes[axis][0]]
    return min(square, key=lambda axis: image.shape[1 + axis] * spacing[axis])


def _across(image: Tensor, axis: int) -> Tensor:
    """C x slices x height x width, where what is uppermost in the body is drawn uppermost."""
    return image if axis == 0 else image.movedim(1 + axis, 1).flip(2)


def _colours(classes: int) -> np.ndarray:
    """One colour per class, evenly around the circle; that of background is not used."""
    hues = np.arange(classes) / max(classes - 1, 1)
    return np.asarray(hsv2rgb(np.stack([hues, np.full(classes, 0.9), np.ones(classes)], axis=-1)) * 255)


def _blended(plane: np.ndarray, classes: Tensor, colours: np.ndarray) -> np.ndarray:
    number = classes.cpu().numpy()
    mixed = np.where((number > 0)[..., None], (1 - _OPACITY) * plane + _OPACITY * colours[number], plane)
    return np.asarray(mixed.round().astype(np.uint8))
