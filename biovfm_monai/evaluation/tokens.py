"""What a tokenizer is worth: what decoding loses, and which codes are used (https://arxiv.org/abs/1711.00937)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import MAEMetric, PSNRMetric
from PIL import Image
from torch import Tensor

from biovfm_monai.checkpoints import load_tokenizer
from biovfm_monai.data import RandomCropDataset, training_transform
from biovfm_monai.errors import require_within
from biovfm_monai.evaluation.embed import preprocessing_of
from biovfm_monai.files import write_atomically, write_json
from biovfm_monai.losses.quantiser import code_entropy
from biovfm_monai.sheet import draw_sheet, middle_slice

__all__ = ["TokenizerProbe"]

logger = logging.getLogger(__name__)

_LEAST = 0.1


class TokenizerProbe:
    """Score a tokenizer file on crops of images: what is lost when they are decoded, and which codes are used.

    Args:
        tokenizer_path: what is scored.
        data: datalist items, or a `Store`.
        crop_size, zoom, seed: of the crops, as of `RandomCropDataset`.
        num_crops: how many.
        device: where the tokenizer runs.
        output_path: JSON file for the scores; beside it comes a picture, .png: of each modality and degree the crop
            that varies most, and what is decoded. None for no files.

    Raises:
        InputError: when the file cannot be used, or there is no crop.
    """

    def __init__(
        self,
        tokenizer_path: str | Path,
        data: Sequence[dict[str, Any]],
        crop_size: Sequence[int],
        zoom: tuple[float, float] = (1.0, 1.0),
        num_crops: int = 256,
        device: torch.device | str = "cpu",
        seed: int = 0,
        output_path: str | Path | None = None,
    ) -> None:
        require_within(1, whole=True, num_crops=num_crops)
        self.tokenizer = load_tokenizer(tokenizer_path).to(device)
        prepared = preprocessing_of(tokenizer_path)
        self.mean, self.std = (torch.tensor(prepared[name]).view(-1, 1, 1, 1).to(device) for name in ("mean", "std"))
        transform = training_transform(
            self.tokenizer.in_channels, prepared.get("spacing"), presets=prepared.get("presets")
        )
        self.crops = RandomCropDataset(data, transform, crop_size, seed, zoom=zoom)
        self.num_crops, self.device, self.output_path = num_crops, device, output_path

    @torch.inference_mode()
    def run(self) -> dict[str, Any]:
        """Errors of images in [0, 1], of all crops, by modality and by degree of anisotropy; and the use of "codes".

        These are "perplexity", the exponential of the entropy of their mean share p in the tokens; "in_use", how many
        have a tenth of an even share or more; "likeliest", how many are the likeliest of a token; the mean
        "token_entropy"; and the "marginal_entropy" of p, the loss of always predicting p in masked modelling, in nats.
        """
        errors: dict[str, list[tuple[float, float]]] = {}
        share, likeliest = torch.zeros(self.tokenizer.num_codes, dtype=torch.float64), set[int]()
        tokens, entropy, shown = 0, 0.0, dict[str, tuple[np.ndarray, np.ndarray]]()
        for number in range(self.num_crops):
            sample = self.crops[number]
            degree = sample.get("anisotropy", 5)
            image = sample["image"].float().to(self.device)
            decoded, log_p = self._decoded(image, degree)
            error = float(MAEMetric()(decoded, image[None])), float(PSNRMetric(max_val=1.0)(decoded, image[None]))
            kind, pair = f"{sample['modality']}, degree {degree}", (middle_slice(image), middle_slice(decoded[0]))
            if kind not in shown or pair[0].std() > shown[kind][0].std():
                shown[kind] = pair
            for name in ("all", sample["modality"], f"anisotropy {degree}"):
                errors.setdefault(name, []).append(error)
            p = log_p.exp().transpose(0, 1).flatten(1).double().cpu()
            share += p.sum(1)
            likeliest.update(p.argmax(0).tolist())
            tokens += p.shape[1]
            entropy += code_entropy(log_p).item() * p.shape[1]
        codes = {**_codes(share / tokens), "likeliest": len(likeliest), "token_entropy": entropy / tokens}
        scores = {"codes": codes, **_means(errors)}
        for name, of in scores.items():
            logger.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in of.items()))
        if self.output_path is not None:
            write_json(self.output_path, scores)
            with write_atomically(Path(self.output_path).with_suffix(".png")) as draft:
                rows = [[(kind, shown[kind][0]), ("decoded", shown[kind][1])] for kind in sorted(shown)]
                Image.fromarray(draw_sheet(rows)).save(draft, format="PNG")
        return scores

    def _decoded(self, image: Tensor, degree: int) -> tuple[Tensor, Tensor]:
        """What is decoded of a crop, in [0, 1], and the logarithms of its soft tokens."""
        log_p = self.tokenizer(((image - self.mean) / self.std)[None], degree).float().log_softmax(1)
        return (self.tokenizer.decode(log_p.exp(), degree) * self.std + self.mean).clamp(0, 1), log_p


def _codes(share: Tensor) -> dict[str, float]:
    """How codes are used, by the mean share of each."""
    count = len(share)
    entropy = float(-torch.xlogy(share, share).sum())
    return {
        "count": count,
        "perplexity": float(np.exp(entropy)),
        "in_use": int((share >= _LEAST / count).sum()),
        "marginal_entropy": entropy,
    }


def _means(errors: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    means = {name: np.mean(of, axis=0) for name, of in sorted(errors.items())}
    return {
        name: {"crops": len(errors[name]), "l1": float(mean[0]), "psnr": float(mean[1])} for name, mean in means.items()
    }
