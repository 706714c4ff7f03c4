"""Training tasks of MONAI Label: a segmentation bundle on what is labelled, a pretraining bundle on what is not."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.train.bundle import BundleTrainTask

from biovfm_monai.data import find_images
from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically, write_json

__all__ = ["PretrainingTrain", "SegmentationTrain"]

logger = logging.getLogger(__name__)


class SegmentationTrain(BundleTrainTask):
    """Train a segmentation bundle on the datastore's final labels, from its own weights unless "pretrained" is false.

    Args:
        folder: of the bundle.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder.resolve()), {}, load_strict=True)

    def config(self) -> dict[str, Any]:
        """What clients offer; a bundle without weights yet begins from random ones."""
        return {**super().config(), "pretrained": self._weights({}).is_file()}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train.

        Raises:
            InputError: when nothing is labelled, or weights are asked for that are not there.
        """
        if not datastore.datalist():
            raise InputError("no image has a final label. Save one: PUT /datastore/label?image=...&tag=final.")
        weights = self._weights(request)
        request = {"pretrained": weights.is_file(), **request}
        if request["pretrained"] and not weights.is_file():
            raise InputError(f'{weights}: no such file. Put the weights there, or ask for {{"pretrained": false}}.')
        # An earlier request has left its own handlers in the configuration.
        self.bundle_config = self._load_bundle_config(self.bundle_path, self.bundle_config_path)
        return super().__call__(request, datastore)

    def _weights(self, request: Mapping[str, Any]) -> Path:
        name = request.get("model_filename", self.const.model_pytorch())
        return Path(self.bundle_path, "models", name if isinstance(name, str) else name[0])

    def _load_checkpoint(self, model_pytorch: str, pretrained: bool, train_handlers: list[dict[str, Any]]) -> None:
        # MONAI Label's own asks the file system for None where weights are not wanted.
        if pretrained:
            super()._load_checkpoint(model_pytorch, pretrained, train_handlers)

    def _partition_datalist(
        self, datalist: Sequence[Any], request: Mapping[str, Any], shuffle: bool = False
    ) -> tuple[Any, Any]:
        training, validation = super()._partition_datalist(datalist, request, shuffle)
        if validation == []:
            logger.warning("%d labelled image(s) are too few to keep some for validation: weights are chosen by the "
                           "score on the images that they are trained with.", len(training))  # fmt: skip
            validation = training
        return training, validation

    def _run_command(self, cmd: Sequence[str], env: Mapping[str, str]) -> None:
        # MONAI Label's own takes no notice of a run that failed.
        subprocess.run(cmd, env=env, check=True)  # noqa: S603


class PretrainingTrain(TrainTask):
    """Pretrain an encoder on the datastore's images without labels, with a pretraining bundle.

    Args:
        folder: of the bundle.
        embeddings: bundles of which a request may give the name as "give_to", to have the encoder.
        modality: of images that neither a header nor a folder gives one.
    """

    def __init__(self, folder: Path, embeddings: Sequence[Path], modality: str | None = None) -> None:
        metadata = json.loads((folder / "configs/metadata.json").read_text(encoding="utf-8"))
        super().__init__(metadata["description"])
        self.folder, self.modality = folder.resolve(), modality
        self.embeddings = {path.name: path.resolve() for path in embeddings}

    def config(self) -> dict[str, Any]:
        """What a request may say; "overrides" are keys of the bundle's train.json."""
        return {"max_epochs": 15, "images": ["unlabeled", "all"], "give_to": ["", *self.embeddings], "overrides": {}}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Pretrain.

        Returns:
            "encoder", the file, and "images", how many it saw.

        Raises:
            InputError: when there is no such image, the bundle named is not there, or the run fails.
        """
        receiver = request.get("give_to") or None
        receiver = receiver[0] if isinstance(receiver, list) else receiver
        if receiver and receiver not in self.embeddings:
            raise InputError(
                f"give_to {receiver!r} is no embedding bundle of this app. Give {', '.join(self.embeddings)}."
            )
        names = datastore.list_images() if request.get("images") == "all" else datastore.get_unlabeled_images()
        items = [item for name in names for item in find_images(datastore.get_image_uri(name), self.modality)]
        if not items:
            raise InputError('the datastore has no image without a label. Upload some, or ask for {"images": "all"}.')
        kept = [{key: item[key] for key in ("image", "modality", "spacing") if key in item} for item in items]
        write_json(self.folder / "data/datalist.json", {"training": kept})
        self._run({**request.get("overrides", {}), **{key: request[key] for key in ("max_epochs",) if key in request}})
        encoder = self.folder / "models/encoder.safetensors"
        if receiver:
            with write_atomically(self.embeddings[receiver] / "models/encoder.safetensors") as draft:
                shutil.copyfile(encoder, draft)
        return {"encoder": str(encoder), "images": len(items)}

    def _run(self, overrides: Mapping[str, Any]) -> None:
        chosen = {"bundle_root": str(self.folder), "dataset_dir": str(self.folder / "data"), **overrides}
        options = [text for key, value in chosen.items() for text in (f"--{key}", str(value))]
        command = [
            sys.executable,
            "-m",
            "monai.bundle",
            "run",
            "--config_file",
            str(self.folder / "configs/train.json"),
        ]
        done = subprocess.run([*command, *options], stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
        if done.returncode:
            logger.error("%s", done.stderr)
            raise InputError(f"{self.folder.name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
