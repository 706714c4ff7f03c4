"""BioVFM's linear probe on MedMNIST as published (https://github.com/JiarunLiu/BioVFM), but for its stochastic depth.

Published, the frozen backbone is in training mode, so that DINOv2's leaves out three of ten branches at random while
the head is trained. Here it is in evaluation mode.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from biovfm_monai.draws import Use, forked, uniform
from biovfm_monai.errors import InputError, require_within
from biovfm_monai.evaluation.linear import Chosen, probabilities
from biovfm_monai.evaluation.metrics import TASKS, auc
from biovfm_monai.networks import ViT

__all__ = ["BioVFMHead", "biovfm_probe", "biovfm_views", "prepared"]

_DEGREES, _PADDING = 30.0, 4
_RATE = 1e-2


class BioVFMHead(nn.Module):
    """Logits of the mean of patch tokens as the last block leaves them.

    The pretrained final norm is left out; a fresh LayerNorm takes its place and is never trained. Then come a BatchNorm
    without weights and a linear layer.

    Args:
        encoder: frozen, and in evaluation mode always.
        outputs: classes, or findings.
    """

    def __init__(self, encoder: ViT, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.fc_norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6).requires_grad_(False)
        linear = nn.Linear(encoder.embed_dim, outputs)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6), linear)

    def train(self, mode: bool = True) -> BioVFMHead:
        """Set the head's mode, and leave the encoder in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Map B x C x H x W to B x outputs."""
        with torch.no_grad():
            encoder = self.encoder
            x, angles = encoder.embed(encoder.patchify(image))
            tokens = encoder.encode(x, angles, stop=len(encoder.blocks))[0]
            pooled = self.fc_norm(tokens[:, encoder.num_prefix_tokens :].mean(1))
        return self.head(pooled)


def biovfm_views(images: np.ndarray, keys: Tensor) -> np.ndarray:
    """Each image turned by up to 30 degrees (nearest pixel), and cut to its size at random with 4 pixels around it.

    Args:
        images: uint8, B x H x W (x 3).
        keys: int64, one per image, of which the draws are a function.
    """
    drawn = uniform(keys, 3, Use.PROBE).numpy()
    views = np.empty_like(images)
    for number, (image, (turn, down, right)) in enumerate(zip(images, drawn, strict=True)):
        turned = np.asarray(Image.fromarray(image).rotate(float(2 * turn - 1) * _DEGREES, Image.Resampling.NEAREST))
        around = np.pad(turned, [(_PADDING, _PADDING)] * 2 + [(0, 0)] * (image.ndim - 2))
        top, left = int(down * (2 * _PADDING + 1)), int(right * (2 * _PADDING + 1))
        views[number] = around[top : top + image.shape[0], left : left + image.shape[1]]
    return views


def prepared(images: np.ndarray, channels: int) -> Tensor:
    """B x channels x H x W in [-1, 1] of uint8 images, B x H x W (x 3); grey ones in each channel."""
    tensor = torch.from_numpy(images)
    tensor = tensor.movedim(-1, 1) if tensor.ndim == 4 else tensor[:, None].expand(-1, channels, -1, -1)
    return (tensor.float() / 255 - 0.5) / 0.5


def biovfm_probe(
    encoder: ViT,
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    num_classes: int,
    task: str,
    epochs: int = 100,
    batch_size: int = 128,
    seed: int = 42,
    device: torch.device | str = "cpu",
) -> Chosen:
    """Train the published probe, and keep the epoch with the lowest loss on the validation part.

    AdamW with rate 0.01 falling to 0 by a cosine, a step each epoch, without weight decay or warm-up; cross-entropy, or
    binary cross-entropy of findings; float32. Published are 100 epochs of images of 224 x 224 pixels.

    Args:
        encoder: is frozen.
        images: training, validation and test part, uint8, images x H x W (x 3).
        labels: of these parts, as from `check_labels`.
        num_classes, task: as in `check_labels`.
        epochs: passes over the training part, each with views of its own.
        batch_size: images a step; a last one of a single image is left out, of which there is no batch statistic.
        seed: of initial weights, order and views.
        device: where it runs.

    Raises:
        InputError: when images are of no 8 bits, or have colours that the encoder does not take.
    """
    require_within(1, whole=True, epochs=epochs)
    require_within(2, whole=True, batch_size=batch_size)
    _require_readable(images, encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BioVFMHead(encoder, num_classes).to(device)
    truth = [torch.from_numpy(of).to(device).to(torch.float32 if task == TASKS[3] else torch.int64) for of in labels]
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loss_of = nn.BCEWithLogitsLoss() if task == TASKS[3] else nn.CrossEntropyLoss()
    order, least, best, kept = torch.Generator().manual_seed(seed), float("inf"), 0, model.head.state_dict()
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(images[0]), generator=order).split(batch_size):
            if len(rows) > 1:
                views = biovfm_views(images[0][rows.numpy()], forked(rows + seed, epoch))
                loss = loss_of(model(prepared(views, encoder.in_channels).to(device)), truth[0][rows.to(device)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        schedule.step()
        found = float(loss_of(_logits(model, images[1], batch_size, device), truth[1]))
        if found < least:
            least, best, kept = found, epoch, copy.deepcopy(model.head.state_dict())
    model.head.load_state_dict(kept)
    validation, test = (probabilities(_logits(model, part, batch_size, device), task) for part in images[1:])
    return Chosen({"protocol": "BioVFM", "epoch": best}, auc(labels[1], validation, task), test)


def _require_readable(images: Sequence[np.ndarray], encoder: ViT) -> None:
    for part in images:
        if part.dtype != np.uint8 or (part.ndim == 4 and part.shape[-1] != encoder.in_channels):
            raise InputError(
                f"the BioVFM protocol takes 8-bit images that are grey or have the encoder's {encoder.in_channels} "
                f"channel(s), got {part.dtype} {part.shape}. Convert them."
            )


@torch.no_grad()
def _logits(model: BioVFMHead, images: np.ndarray, batch_size: int, device: torch.device | str) -> Tensor:
    model.eval()
    channels = model.encoder.in_channels
    parts = [images[n : n + batch_size] for n in range(0, len(images), batch_size)]
    return torch.cat([model(prepared(part, channels).to(device)) for part in parts])
