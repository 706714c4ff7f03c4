"""What a network says of the images of a datastore, kept in a file beside them until images or weights change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from biovfm_monai.files import version_of, write_atomically

__all__ = ["Remembered"]


class Remembered:
    """Vectors of images; only those are computed that are not in the file, or are of other images or weights.

    Args:
        path: .npz file, which is made if need be.
        compute: an image's path -> its vector.
        weights: file that the vectors depend on.
    """

    def __init__(self, path: Path, compute: Callable[[str], np.ndarray], weights: Path) -> None:
        self.path, self.compute, self.weights = path, compute, weights

    def of(self, images: Mapping[str, str]) -> dict[str, np.ndarray]:
        """The vectors by name.

        Args:
            images: name -> path.
        """
        current = version_of(self.weights) if self.weights.exists() else (0, 0, 0)
        known = self._known(current)
        versions = {name: version_of(Path(path)) for name, path in images.items()}
        new = [name for name, version in versions.items() if known.get(name, (None,))[0] != version]
        for name in new:
            known[name] = (versions[name], np.asarray(self.compute(images[name])))
        if new:
            self._write(known, current)
        return {name: known[name][1] for name in images}

    def _known(self, current: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
        if not self.path.is_file():
            return {}
        with np.load(self.path, allow_pickle=False) as file:
            if tuple(file["weights"].tolist()) != current:
                return {}
            rows = zip(file["names"], file["versions"], file["vectors"], strict=True)
            return {str(name): (tuple(version.tolist()), vector) for name, version, vector in rows}

    def _write(self, known: Mapping[str, tuple[tuple[int, ...], np.ndarray]], current: tuple[int, ...]) -> None:
        versions, vectors = zip(*known.values(), strict=True)
        with write_atomically(self.path) as draft, draft.open("wb") as file:
            np.savez(
                file, names=np.array(list(known)), versions=np.array(versions), vectors=np.stack(vectors),
                weights=np.array(current),
            )  # fmt: skip
