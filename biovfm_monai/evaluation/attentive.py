"""Attentive probes: a learned query over the tokens of a frozen encoder, as in V-JEPA (https://arxiv.org/abs/2404.08471)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from biovfm_monai.errors import InputError, require_within
from biovfm_monai.evaluation.linear import Chosen, loss_of_rates, probabilities
from biovfm_monai.evaluation.metrics import TASKS, ranked_auc
from biovfm_monai.networks import AttentivePool

__all__ = ["AttentiveHead", "attentive_probe", "train_attentive"]

_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_BLOCK = 256


class AttentiveHead(nn.Module):
    """Logits of standardised tokens: their mean, weighted by a learned query's attention, and a linear layer.

    Args:
        scaler: fitted to tokens; standardises each of their channels.
        num_heads: of the attention, as of the encoder; fewer where they do not divide the channels.
        outputs: classes, or findings.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, scaler: StandardScaler, num_heads: int, outputs: int) -> None:
        super().__init__()
        width = len(scaler.mean_)
        self.register_buffer("mean", torch.from_numpy(scaler.mean_).float())
        self.register_buffer("scale", torch.from_numpy(scaler.scale_).float())
        self.pooling = AttentivePool(width, math.gcd(num_heads, width))
        self.linear = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map B x tokens x channels, of any precision, to B x outputs."""
        return self.linear(self.pooling((tokens.float() - self.mean) / self.scale, 0))


def train_attentive(
    tokens: np.ndarray,
    labels: Tensor,
    outputs: int,
    num_heads: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int = 0,
) -> list[AttentiveHead]:
    """Train a head for each learning rate, from the same weights on the same batches; each is what it would be alone.

    They are trained by AdamW, their rates falling to 0 by a cosine, where the labels are; tokens come batch by batch.

    Args:
        tokens: images x tokens x channels.
        labels: int64, images; or float, images x outputs, of findings.
        outputs: classes, or findings.
        num_heads: as of `AttentiveHead`.
        rates: learning rates.
        epochs: passes over the images.
        batch_size: images a step.
        seed: of initial weights and the order of images.
    """
    scaler = StandardScaler()
    for block in _blocks(tokens):
        scaler.partial_fit(block.reshape(-1, block.shape[2]).astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = AttentiveHead(scaler, num_heads, outputs).to(labels.device)
    heads = [copy.deepcopy(first) for _ in rates]
    optimizer = torch.optim.AdamW(
        [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // batch_size))
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(batch_size):
            batch = torch.from_numpy(tokens[rows.numpy()]).to(labels.device)
            optimizer.zero_grad()
            for head in heads:
                loss_of_rates(head(batch)[None], labels[rows.to(labels.device)]).backward()
            optimizer.step()
            schedule.step()
    return heads


def attentive_probe(
    tokens: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    num_classes: int,
    task: str,
    num_heads: int,
    rates: Sequence[float] = _RATES,
    epochs: int = 20,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Chosen:
    """The best learning rate by AUC on the validation part; tokens standardised by the training part.

    Args:
        tokens: training, validation and test part, images x tokens x channels.
        labels: of these parts, as from `check_labels`.
        num_classes, task: as in `check_labels`.
        num_heads, rates, epochs, batch_size, seed: as in `train_attentive`.
        device: where it is trained.

    Raises:
        InputError: when it diverges at all rates.
    """
    require_within(1, whole=True, epochs=epochs, batch_size=batch_size, num_heads=num_heads)
    truth = torch.from_numpy(labels[0]).to(device)
    truth = truth.float() if task == TASKS[3] else truth
    heads = train_attentive(tokens[0], truth, num_classes, num_heads, rates, epochs, batch_size, seed)
    scores = [ranked_auc(labels[1], _likely(head, tokens[1], task), task) for head in heads]
    if np.isnan(scores).all():
        raise InputError("the attentive probe diverged at all rates. Look at the size of the encoder's tokens.")
    best = int(np.nanargmax(scores))
    return Chosen({"rate": rates[best]}, scores[best], _likely(heads[best], tokens[2], task))


def _blocks(tokens: np.ndarray) -> list[np.ndarray]:
    return np.array_split(tokens, -(-len(tokens) // _BLOCK))


@torch.no_grad()
def _likely(head: AttentiveHead, tokens: np.ndarray, task: str) -> np.ndarray:
    logits = [head(torch.from_numpy(block).to(head.mean.device)) for block in _blocks(tokens)]
    return probabilities(torch.cat(logits), task)
