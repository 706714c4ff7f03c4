"""The MONAI Label app that serves every bundle below its folder's model/ (https://github.com/Project-MONAI/MONAILabel)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from biovfm_monai.errors import InputError, reason_of
from biovfm_monai.label.activelearning import Embeddings, FarthestFirst, Uncertainties, Uncertainty
from biovfm_monai.label.folder import bundles_of
from biovfm_monai.label.infer import ClassificationInfer, EmbeddingInfer, SegmentationInfer
from biovfm_monai.label.train import PretrainingTrain, SegmentationTrain

__all__ = ["BundleApp"]

logger = logging.getLogger(__name__)


@contextmanager
def _told() -> Iterator[None]:
    """Let a client see the one line of a user's mistake, which MONAI may have wrapped."""
    try:
        yield
    except (InputError, RuntimeError) as error:
        logger.exception("what a client asked for failed")
        raise HTTPException(500, reason_of(error)) from error


class BundleApp(MONAILabelApp):
    """Inference of segmentation, classification and embedding bundles, training, pretraining and active learning.

    Args:
        app_dir: folder that `biovfm label init` wrote.
        studies: datastore.
        conf: of `--conf`; "modality" is that of images that neither a header, a folder nor a bundle gives one.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.modality = (conf or {}).get("modality")
        folder = Path(studies)
        self.cache = (folder if folder.is_dir() else Path(app_dir)) / "biovfm_label"
        super().__init__(app_dir, studies, conf, "biovfm_monai", "Bundles on pretrained vision transformers")

    def init_infers(self) -> dict[str, InferTask]:
        """One per bundle that can say something of an image."""
        self.segmentations = {
            f.name: SegmentationInfer(f, self.modality) for f in bundles_of(self.app_dir, "segmentation")
        }
        self.embedders = {f.name: EmbeddingInfer(f, self.modality) for f in bundles_of(self.app_dir, "embedding")}
        classifiers = {
            f.name: ClassificationInfer(f, self.modality) for f in bundles_of(self.app_dir, "classification")
        }
        return {**self.segmentations, **classifiers, **self.embedders}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Fine-tuning of segmentation bundles, and pretraining."""
        embeddings = bundles_of(self.app_dir, "embedding")
        pretraining = bundles_of(self.app_dir, "pretraining")
        return {
            **{folder.name: SegmentationTrain(folder) for folder in bundles_of(self.app_dir, "segmentation")},
            **{folder.name: PretrainingTrain(folder, embeddings, self.modality) for folder in pretraining},
        }

    def init_strategies(self) -> dict[str, Strategy]:
        """MONAI Label's random one, and those that have a network to ask."""
        strategies = super().init_strategies()
        if self.embedders:
            strategies["farthest_first"] = FarthestFirst(self._embeddings())
        if self.segmentations:
            strategies["uncertainty"] = Uncertainty(self._uncertainties())
        return strategies

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """What the strategies look at, computed beforehand."""
        methods: dict[str, ScoringMethod] = {}
        if self.embedders:
            methods["embeddings"] = self._embeddings()
        if self.segmentations:
            methods["uncertainties"] = self._uncertainties()
        return methods

    def infer(self, request: dict[str, Any], datastore: Any = None) -> Any:
        """Run an inference task."""
        with _told():
            return super().infer(request, datastore)

    def train(self, request: dict[str, Any]) -> Any:
        """Run a training task."""
        with _told():
            return super().train(request)

    def next_sample(self, request: dict[str, Any]) -> Any:
        """Run a strategy."""
        with _told():
            return super().next_sample(request)

    def scoring(self, request: dict[str, Any], datastore: Any = None) -> Any:
        """Run a scoring task."""
        with _told():
            return super().scoring(request, datastore)

    def _embeddings(self) -> Embeddings:
        return Embeddings("Embeddings of all images", self.embedders, self.cache)

    def _uncertainties(self) -> Uncertainties:
        return Uncertainties("Uncertainty of a segmentation of all images", self.segmentations, self.cache)
