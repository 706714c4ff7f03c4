"""A bundle that answers one request after another, with the weights that are on disk at each."""

from __future__ import annotations

from pathlib import Path

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.bundle import Bundle, bundle_config, open_bundle, weights_of
from biovfm_monai.files import version_of

__all__ = ["Opened"]


class Opened:
    """A bundle that is opened once per device, and again when its weights are others: a training may have written them.

    Args:
        folder: of the bundle; its weights need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.config = bundle_config(folder)
        self.weights = weights_of(self.config)
        self._known: dict[str, tuple[tuple[int, ...], Bundle]] = {}

    def on(self, device: str) -> Bundle:
        """The bundle on a device.

        Raises:
            InputError: when weights are missing, or as `open_bundle`.
        """
        if not self.weights.is_file():
            raise InputError(
                f"{self.weights}: no such file. Put the weights there, or train them: POST /train/{self.folder.name}."
            )
        version = version_of(self.weights)
        known = self._known.get(device)
        if known is None or known[0] != version:
            known = self._known[device] = (version, open_bundle(self.folder, {"device": device}))
        return known[1]
