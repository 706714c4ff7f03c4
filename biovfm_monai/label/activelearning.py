"""Strategies of MONAI Label, and the scoring tasks that compute beforehand what they look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from biovfm_monai.errors import InputError
from biovfm_monai.label.choose import farthest_first, uncertainty
from biovfm_monai.label.infer import BundleInfer
from biovfm_monai.label.remembered import Remembered

__all__ = ["Embeddings", "FarthestFirst", "Said", "Uncertainties", "Uncertainty"]


class Said(ScoringMethod):
    """What networks say of the datastore's images, kept in files of the folder `cache`.

    Args:
        description: for clients.
        tasks: bundle's name -> its inference; a request's "model" chooses, by default the first.
        cache: folder.
    """

    def __init__(self, description: str, tasks: Mapping[str, BundleInfer], cache: Path) -> None:
        super().__init__(description)
        self.tasks, self.cache = tasks, cache

    def vector(self, task: BundleInfer, image: str) -> np.ndarray:
        """What one network says of one image file."""
        raise NotImplementedError

    def of(self, request: Mapping[str, Any], datastore: Datastore, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Vectors by image."""
        model = request.get("model") or next(iter(self.tasks))
        if model not in self.tasks:
            raise InputError(f"model {model!r} is none that can be asked. Give one of {', '.join(self.tasks)}.")
        task = self.tasks[model]
        known = Remembered(self.cache / f"{model}.npz", lambda image: self.vector(task, image), task.opened.weights)
        return known.of({name: datastore.get_image_uri(name) for name in names})

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Compute what is not known yet of every image."""
        return {"images": len(self.of(request, datastore, datastore.list_images()))}


class Embeddings(Said):
    """The encoder's vector."""

    def vector(self, task: BundleInfer, image: str) -> np.ndarray:
        """Its numbers."""
        return task.predict(image).flatten().numpy()


class Uncertainties(Said):
    """How unsure a segmentation is, one number."""

    def vector(self, task: BundleInfer, image: str) -> np.ndarray:
        """The mean entropy."""
        return np.array([uncertainty(task.predict(image))])


class FarthestFirst(Strategy):
    """The image whose embedding is farthest from those of all that are labelled or have been given out before.

    Args:
        embeddings: computed where they are not known yet.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        super().__init__("Farthest-first by embedding")
        self.embeddings = embeddings

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose; once all have been given out, those are offered again."""
        waiting = datastore.get_unlabeled_images()
        if not waiting:
            return None
        out = {name for name in waiting if request["strategy"] in datastore.get_image_info(name).get("strategy", {})}
        candidates = [name for name in waiting if name not in out] or waiting
        vectors = self.embeddings.of(request, datastore, datastore.list_images())
        covered = [vectors[name] for name in vectors if name not in candidates]
        row, distance = farthest_first(np.stack([vectors[name] for name in candidates]), np.array(covered))
        return {"id": candidates[row], "weight": distance}


class Uncertainty(Strategy):
    """The image that a segmentation is least sure of.

    Args:
        uncertainties: computed where they are not known yet.
    """

    def __init__(self, uncertainties: Uncertainties) -> None:
        super().__init__("Highest mean entropy of the segmentation")
        self.uncertainties = uncertainties

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose."""
        waiting = datastore.get_unlabeled_images()
        if not waiting:
            return None
        scores = self.uncertainties.of(request, datastore, waiting)
        chosen = max(waiting, key=lambda name: float(scores[name][0]))
        return {"id": chosen, "weight": float(scores[chosen][0])}
