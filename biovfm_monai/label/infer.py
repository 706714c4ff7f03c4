"""Inference tasks of MONAI Label that run a bundle's own preprocessing, network and postprocessing (0.8.5 and main)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer
from monai.transforms import SaveImaged, SqueezeDimd
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.tasks.infer.basic_infer import BasicInferTask
from monailabel.transform.writer import Writer
from monailabel.utils.others.generic import name_to_device
from torch import Tensor, nn

from biovfm_monai.checkpoints import load_model
from biovfm_monai.data import find_images
from biovfm_monai.errors import InputError
from biovfm_monai.files import version_of

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
        self.folder, self.modality, self.version = folder.resolve(), modality, metadata["version"]
        image, pred = (
            metadata["network_data_format"][part][key] for part, key in (("inputs", "image"), ("outputs", "pred"))
        )
        self.names = [name for _, name in sorted((int(number), name) for number, name in pred["channel_def"].items())]
        self.weights = self._weights()
        super().__init__(
            path=str(self.weights), network=None, type=kind, labels=self._labels(),
            dimension=len(image["spatial_shape"]), description=metadata["description"],
        )  # fmt: skip

    def is_valid(self) -> bool:
        """Whether to list the task; one without weights yet says so when asked."""
        return True

    def info(self) -> dict[str, Any]:
        """What clients are told."""
        return {**super().info(), "version": self.version}

    def parser(self, device: str | None = None) -> ConfigParser:
        """The bundle's configuration, anew, as what it instantiates depends on the device."""
        parser = ConfigParser()
        parser.read_config(str(self.folder / "configs/inference.json"))
        parser["bundle_root"] = str(self.folder)
        if device is not None:
            parser["device"] = device
        return parser

    def pre_transforms(self, data: Mapping[str, Any] | None = None) -> Sequence[Callable[..., Any]]:
        """The bundle's preprocessing."""
        return list(self.parser((data or {}).get("device")).get_parsed_content("preprocessing").transforms)

    def post_transforms(self, data: Mapping[str, Any] | None = None) -> Sequence[Callable[..., Any]]:
        """The bundle's postprocessing, but for what writes files: MONAI Label does."""
        parser = self.parser((data or {}).get("device"))
        if parser.get("postprocessing") is None:
            return []
        steps = parser.get_parsed_content("postprocessing").transforms
        return [step for step in steps if not isinstance(step, SaveImaged)]

    def inferer(self, data: Mapping[str, Any] | None = None) -> Inferer:
        """The bundle's inferer."""
        return self.parser((data or {}).get("device")).get_parsed_content("inferer")

    def run_pre_transforms(self, data: dict[str, Any], transforms: Sequence[Callable[..., Any]]) -> dict[str, Any]:
        """Prepare an image; what preprocessing drops of a request is kept for the steps that follow."""
        modality = data.get("modality") or self.modality
        if modality is None and self.parser().get("modality") is None:
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

    def _weights(self) -> Path:
        parser = self.parser()
        key = "encoder_path" if parser.get("ckpt_path") is None else "ckpt_path"
        return Path(parser.get_parsed_content(key))

    def _labels(self) -> dict[str, int]:
        return {name.lower(): number for number, name in enumerate(self.names) if name.lower() != "background"}

    def _get_network(self, device: str, data: Mapping[str, Any] | None) -> nn.Module:  # noqa: ARG002 - MONAI Label's
        """The network with the weights that are on disk now: a training task may have written others."""
        if not self.weights.is_file():
            raise InputError(
                f"{self.weights}: no such file. Put the weights there, or train them: POST /train/{self.folder.name}."
            )
        version = version_of(self.weights)
        known = self._networks.get(device)
        if known is None or known[1] != version:
            parser = self.parser(device)
            network = parser.get_parsed_content("network_def")
            if parser.get("ckpt_path") is not None:
                load_model(network, self.weights)
            known = self._networks[device] = (network.to(device).eval(), version)
        return known[0]


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
        return {name: number for number, name in enumerate(self.parser().get("classes") or self.names)}

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
