"""What a survey found, as a table and as a sheet of thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from biovfm_monai.data.preprocessing import ByModalityd
from biovfm_monai.data.reading import read_image
from biovfm_monai.errors import InputError, reason_of
from biovfm_monai.files import write_atomically
from biovfm_monai.sheet import draw_sheet, middle_slice

__all__ = ["Overview"]

_DEGREES = ("isotropic", "2-4 x as thick", "4-8 x as thick", "8-16 x as thick", "16-32 x as thick", "slices apart")
_THUMBNAILS, _COLUMNS = 48, 8


class Overview:
    """Counts images by modality, degree of anisotropy and section, and keeps a few of each source to show."""

    def __init__(self) -> None:
        self.splits: set[str] = set()
        self.groups: dict[tuple[str, bool, int], dict[str, Any]] = {}
        self.shown: dict[tuple[str, str, int], list[dict[str, Any]]] = {}

    def add(self, items: Sequence[dict[str, Any]]) -> None:
        """Count items."""
        for item in items:
            volume = len(item["shape"]) > 2
            group = self.groups.setdefault(
                (item["modality"], volume, item["anisotropy"]),
                {"images": 0, "slices": 0, "splits": {}, "spacing": [np.inf, 0.0, np.inf, 0.0]},
            )
            self.splits.add(item["split"])
            group["images"] += 1
            group["slices"] += min(item["shape"]) if volume else 1
            group["splits"][item["split"]] = group["splits"].get(item["split"], 0) + 1
            if item.get("spacing"):
                plane, thick = min(item["spacing"]), max(item["spacing"][:3])
                low, high, thin, thickest = group["spacing"]
                group["spacing"] = [min(low, plane), max(high, plane), min(thin, thick), max(thickest, thick)]
            shown = self.shown.setdefault((item["modality"], str(item.get("source")), item["anisotropy"]), [])
            if len(shown) < _THUMBNAILS:
                shown.append(item)

    def lines(self) -> list[str]:
        """The table as text."""
        rows = []
        for (modality, volume, degree), of in sorted(self.groups.items()):
            low, high, thin, thick = of["spacing"]
            rows.append(
                {
                    "modality": modality,
                    "kind": f"3D, {_DEGREES[degree]}" if volume else "2D",
                    "images": of["images"],
                    "slices": of["slices"],
                    "mm in plane": _span(low, high) if high else "",
                    "mm between slices": _span(thin, thick) if high and volume and degree < 5 else "",
                    **{name: of["splits"].get(name, 0) for name in sorted(self.splits)},
                }
            )
        return pd.DataFrame(rows).to_string(index=False).splitlines()

    def draw(self, path: Path) -> list[str]:
        """Write a sheet with the middle of some images after their presets; returns why others cannot be shown."""
        each = -(-_THUMBNAILS // len(self.shown))
        chosen = [of[n] for _, of in sorted(self.shown.items()) for n in range(0, len(of), -(-len(of) // each))]
        prepare = ByModalityd("image")
        tiles, failures = [], []
        for item in chosen[:_THUMBNAILS]:
            try:
                image = prepare({"image": read_image(item["image"]), "modality": item["modality"]})["image"]
                tiles.append((f"{item['modality']}: {item.get('source', '')}", middle_slice(image)))
            except (InputError, RuntimeError) as error:
                failures.append(reason_of(error))
        if tiles:
            rows = [tiles[n : n + _COLUMNS] for n in range(0, len(tiles), _COLUMNS)]
            with write_atomically(path) as draft:
                Image.fromarray(draw_sheet(rows, width=128)).save(draft, format="PNG")
        return failures


def _span(low: float, high: float) -> str:
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
