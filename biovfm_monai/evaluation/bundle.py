"""A trained bundle's parts, from a file to what its network says of it, as its inference.json has them.

Of the configuration the keys preprocessing, network_def, inferer and postprocessing are used, as MONAI Label does
(https://monai.readthedocs.io/en/stable/mb_specification.html), and the weights of ckpt_path, or of encoder_path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.data import list_data_collate
from monai.inferers import Inferer
from monai.transforms import Compose, SaveImage, SaveImaged

from biovfm_monai.checkpoints import load_model
from biovfm_monai.errors import InputError, reason_of

__all__ = ["Bundle", "bundle_config", "open_bundle", "weights_of"]

_CONFIG = "configs/inference.json"
_WEIGHTS = ("ckpt_path", "encoder_path")


class Bundle(NamedTuple):
    """What a bundle's inference.json makes: parts from file to answer, the network with its weights."""

    root: Path
    parser: ConfigParser
    preprocessing: Compose
    network: torch.nn.Module
    inferer: Inferer
    postprocessing: Compose
    device: torch.device

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The sample of a datalist item, with "pred" as the bundle's postprocessing leaves it; it writes no file."""
        sample = self.preprocessing({key: item[key] for key in ("image", "modality") if item.get(key)})
        batch = list_data_collate([{"image": sample["image"]}])["image"].to(self.device)
        with torch.inference_mode():
            sample["pred"] = self.inferer(batch, self.network)[0]
        return dict(self.postprocessing(sample))


def open_bundle(root: str | Path, overrides: Mapping[str, Any] | None = None) -> Bundle:
    """Make a bundle's parts, with trained weights.

    Args:
        root: the bundle's folder.
        overrides: keys of inference.json, those that the training was given, such as classes or encoder_path.

    Raises:
        InputError: when it is no bundle, a key is unknown, or weights are missing or do not fit.
    """
    parser = bundle_config(root, overrides)
    config = f"{parser['bundle_root']}/{_CONFIG}"
    weights = weights_of(parser)
    try:
        network = parser.get_parsed_content("network_def")
        device = torch.device(parser.get_parsed_content("device"))
        preprocessing, inferer = (parser.get_parsed_content(name) for name in ("preprocessing", "inferer"))
        after = parser.get_parsed_content("postprocessing").transforms if "postprocessing" in parser else []
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{config}: {reason_of(error)}") from error
    if _WEIGHTS[0] in parser:
        load_model(network, weights)
    postprocessing = Compose([step for step in after if not isinstance(step, SaveImage | SaveImaged)])
    network = network.to(device).eval()
    return Bundle(Path(parser["bundle_root"]), parser, preprocessing, network, inferer, postprocessing, device)


def bundle_config(root: str | Path, overrides: Mapping[str, Any] | None = None) -> ConfigParser:
    """A bundle's inference.json, its paths in the bundle's folder; arguments as of `open_bundle`.

    Raises:
        InputError: when it is no bundle, or a key is unknown.
    """
    root = Path(root).expanduser().resolve()
    config = root / _CONFIG
    if not config.is_file():
        raise InputError(f"{config}: no such file. Give the folder of a bundle, as `biovfm bundle` makes it.")
    parser = ConfigParser()
    parser.read_config(str(config))
    for key, value in {"bundle_root": str(root), **(overrides or {})}.items():
        if key.replace("::", "#").split("#")[0] not in parser:
            raise InputError(f"{config}: has no key {key!r}. Give one of its own.")
        parser[key] = value
    return parser


def weights_of(config: ConfigParser) -> Path:
    """The file with the weights of a bundle's network: its ckpt_path, or the encoder_path of one that is an encoder.

    Raises:
        InputError: when the configuration does not say where it is.
    """
    key = next((key for key in _WEIGHTS if key in config), None)
    path = None if key is None else config.get_parsed_content(key)
    if path is None:
        raise InputError(f"{config['bundle_root']}/{_CONFIG}: has no {key or ' or '.join(_WEIGHTS)}. Give one.")
    return Path(path)
