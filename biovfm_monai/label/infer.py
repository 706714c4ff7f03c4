"""Inference tasks of MONAI Label that run a bundle's own preprocessing, network and postprocessing (0.8.5 and main)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.transforms import SqueezeDimd
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.tasks.infer.basic_infer import BasicInferTask
from monailabel.transform.writer import Writer
from monailabel.utils.others.generic import name_to_device
from torch import Tensor, nn

from biovfm_monai.data import find_images
from biovfm_monai.evaluation.bundle import Bundle
from biovfm_monai.label.opened import Opened

__all__ = ["BundleInfer", "ClassificationInfer", "EmbeddingInfer", "SegmentationInfer"]


class BundleInfer(BasicInferTask):
    """What a bundle's configs/inference.json says of one image.

    MONAI Label's own `BundleInferTask` goes on with random weights where they do not fit, and resizes every output to
    the image; here weights fit or it is an error, and outputs are what the bundle's postprocessing makes them.

    Args:
        folder: of the bundle.
        kind: MONAI Label's name of the task.
        modality: of images that neither their header nor a folder's name nor the bundle gives one.
    """

    def __init__(self, folder: Path, kind: InferType, modality: str | None = None) -> None:
        metadata = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))
        self.opened, self.modality, self.version = Opened(folder), modality, metadata["version"]
        image, pred = (
            metadata["network_data_format"][part][key] for part, key in (("inputs", "image"), ("outputs", "pred"))
        )
        self.names = [name for _, name in sorted((int(number), name) for number, name in pred["channel_def"].items())]
        super().__init__(
            path=str(self.opened.weights), network=None, type=kind, labels=self._labels(),
            dimension=len(image["spatial_shape"]), description=metadata["description"],
        )  # fmt: skip

    def is_valid(self) -> bool:
        """Whether to list the task; one without weights yet says so when asked."""
        return True

    def info(self) -> dict[str, Any]:
        """What clients are told."""
        return {**super().info(), "version": self.version}

    def pre_transforms(self, data: Mapping[str, Any] | None = None) -> Sequence[Callable[..., Any]]:
        """The bundle's preprocessing."""
        return list(self._opened_for(data).preprocessing.transforms)

    def post_transforms(self, data: Mapping[str, Any] | None = None) -> Sequence[Callable[..., Any]]:
        """The bundle's postprocessing, but for what writes files: MONAI Label does."""
        return list(self._opened_for(data).postprocessing.transforms)

    def inferer(self, data: Mapping[str, Any] | None = None) -> Inferer:
        """The bundle's inferer."""
        return self._opened_for(data).inferer

    def run_pre_transforms(self, data: dict[str, Any], transforms: Sequence[Callable[..., Any]]) -> dict[str, Any]:
        """Prepare an image; what preprocessing drops of a request is kept for the steps that follow."""
        modality = data.get("modality") or self.modality
        if modality is None and self.opened.config.get("modality") is None:
            modality = find_images(data["image"])[0]["modality"]
        given = data if modality is None else {**data, "modality": modality}
        return {**given, **super().run_pre_transforms(given, transforms)}

    def predict(self, image: str, device: str = "cuda") -> Tensor:
        """What the network says of an image file, before postprocessing.

        Args:
            image: path.
            device: asked for; without GPUs it is the CPU.
        """
        device = name_to_device(device)
        data = {"image": image, "image_path": image, "device": device}
        prepared = self.run_pre_transforms(data, self.pre_transforms(data))
        return torch.as_tensor(self.run_inferer(prepared, device=device)["pred"]).cpu()

    def _labels(self) -> dict[str, int]:
        return {name.lower(): number for number, name in enumerate(self.names) if name.lower() != "background"}

    def _opened_for(self, data: Mapping[str, Any] | None) -> Bundle:
        return self.opened.on((data or {}).get("device") or name_to_device("cuda"))

    def _get_network(self, device: str, data: Mapping[str, Any] | None) -> nn.Module:  # noqa: ARG002 - MONAI Label's
        return self.opened.on(device).network


class SegmentationInfer(BundleInfer):
    """A label map on the grid of the image's file."""

    def __init__(self, folder: Path, modality: str | None = None) -> None:
        super().__init__(folder, InferType.SEGMENTATION, modality)

    def post_transforms(self, data: Mapping[str, Any] | None = None) -> Sequence[Callable[..., Any]]:
        """The bundle's postprocessing, and no axis of channels, as MONAI Label's writer wants it."""
        return [*super().post_transforms(data), SqueezeDimd("pred", dim=0)]

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = np.uint8) -> tuple[Any, Any]:
        """Write the label map; by nibabel, since ITK makes the affine of a tilted gantry orthogonal."""
        given = {"result_dtype": dtype, "labels": self.labels} | ({"result_extension": extension} if extension else {})
        return Writer(label="pred", json="result", nibabel=True)({**data, **given})


class ClassificationInfer(BundleInfer):
    """The chance of each class."""

    def __init__(self, folder: Path, modality: str | None = None) -> None:
        super().__init__(folder, InferType.CLASSIFICATION, modality)

    def _labels(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.opened.config.get("classes") or self.names)}

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:  # noqa: ARG002
        """The classes as MONAI Label's clients know them."""
        chances = zip(self.labels.items(), data["pred"].flatten().tolist(), strict=True)
        return None, {"prediction": [{"idx": idx, "label": name, "score": score} for (name, idx), score in chances]}


class EmbeddingInfer(BundleInfer):
    """The vector that an encoder makes of an image."""

    def __init__(self, folder: Path, modality: str | None = None) -> None:
        super().__init__(folder, InferType.OTHERS, modality)

    def _labels(self) -> dict[str, int]:
        return {}

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:  # noqa: ARG002
        """The vector."""
        return None, {"embedding": data["pred"].flatten().tolist()}
