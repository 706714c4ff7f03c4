"""Training of SPAD's visual tokenizer, with PUMIT's weights of terms: https://github.com/function2-llx/PUMIT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from biovfm_monai import distributed
from biovfm_monai.anisotropy import degree_of_batch
from biovfm_monai.draws import Use, uniform
from biovfm_monai.errors import require_within
from biovfm_monai.losses.adversarial import hinge_loss
from biovfm_monai.losses.perceptual import perceptual_loss
from biovfm_monai.losses.quantiser import code_entropy, code_usage
from biovfm_monai.methods.base import SSLMethod, images_of_batch, keep_finite, keys_of_batch
from biovfm_monai.networks import PatchDiscriminator, SoftTokenizer, take_tokens

__all__ = ["SPADTokenizer"]

_SLICES = 24


class SPADTokenizer(SSLMethod):
    """Train a tokenizer to decode what it encoded, with all codes in use and each token sure of its own.

    The discriminator learns at the same time, from the same loss: its hinge loss sees decoded images without their
    gradient, and the tokenizer's adversarial term sees the discriminator without its. PUMIT's discriminator learns ten
    times as fast: give its parameter groups `lr_scale` 10.

    Args:
        encoder: the tokenizer; weights are published for images in [-1, 1].
        discriminator: None leaves the adversarial term out.
        perceptual: maps images, B x C x H x W, to a list of feature maps, whose squared distance counts, such as
            `EncoderFeatures` and `LPIPSFeatures`; frozen here. None leaves the term out.
        perceptual_weight, usage_weight, entropy_weight, adversarial_weight: of the terms beside the L1 distance. PUMIT
            weighs the perceptual one by 1, and doubles it.
        gate: the adversarial term counts while the discriminator's loss, now and on average, is not above this.
        gate_momentum: of that average.

    Raises:
        InputError: when gate_momentum is no share.
    """

    encoder: SoftTokenizer
    pictures = ("likeliest codes", "soft tokens")
    discriminator_loss: Tensor

    def __init__(
        self,
        encoder: SoftTokenizer,
        discriminator: PatchDiscriminator | None,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 2.0,
        usage_weight: float = 0.03,
        entropy_weight: float = 1.0,
        adversarial_weight: float = 3e-3,
        gate: float = 0.025,
        gate_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        require_within(0, 1, gate_momentum=gate_momentum)
        require_within(
            0, gate=gate, perceptual_weight=perceptual_weight, usage_weight=usage_weight, entropy_weight=entropy_weight,
            adversarial_weight=adversarial_weight,
        )  # fmt: skip
        self.encoder, self.discriminator = encoder, discriminator
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False).eval()
        self.weights = {
            "l1": 1.0, "perceptual": perceptual_weight, "usage": usage_weight, "entropy": entropy_weight,
            "adversarial": adversarial_weight, "discriminator": 1.0,
        }  # fmt: skip
        self.gate, self.gate_momentum = gate, gate_momentum
        self.register_buffer("discriminator_loss", torch.tensor(0.1))

    def train(self, mode: bool = True) -> SPADTokenizer:
        """Switch mode; what compares images stays in evaluation mode."""
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weighted sum of the terms, and each, for batch["image"], B x C x (D) x H x W.

        batch["anisotropy"], if there, is the degree of anisotropy of all its images; batch["key"] tells which slices
        of a volume are compared by their features.
        """
        image, degree = self.encoder.prepare(images_of_batch(batch, "image"), degree_of_batch(batch))
        log_p = self.encoder(image, degree).float().log_softmax(1)
        decoded = self.encoder.decode(log_p.exp(), degree)
        terms = {
            "l1": F.l1_loss(decoded.float(), image.float()),
            "usage": code_usage(log_p),
            "entropy": code_entropy(log_p),
        }
        if self.perceptual is not None:
            terms["perceptual"] = self._perceptual(self.perceptual, image, decoded, batch)
        if self.discriminator is not None:
            terms |= self._adversarial(self.discriminator, image, decoded, degree)
        return {"loss": torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(), **terms}

    @torch.no_grad()
    def reconstruct(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Show what is decoded from soft tokens.

        Returns:
            The image decoded from the likeliest code of each position alone, and that from its soft tokens; both
            B x C x D x H x W.
        """
        image, degree = self.encoder.prepare(images_of_batch(batch, "image"), degree_of_batch(batch))
        soft = self.encoder(image, degree).float().softmax(1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        return self.encoder.decode(hard, degree).float(), self.encoder.decode(soft, degree).float()

    def _perceptual(self, network: nn.Module, image: Tensor, decoded: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Distance of slices by their features: of a volume, at most 24 at random."""
        keys = keys_of_batch(batch, image.shape[0], image.device)
        index = uniform(keys, image.shape[2], Use.SLICE).argsort(dim=1)[:, :_SLICES]
        with torch.no_grad():
            target = network(_slices(image, index))
        return perceptual_loss(network(_slices(decoded, index)), target)

    def _adversarial(self, network: nn.Module, image: Tensor, decoded: Tensor, degree: int) -> dict[str, Tensor]:
        """The discriminator's loss, and while it is winning what its view of decoded images adds to the tokenizer's."""
        loss = hinge_loss(network(image, degree), network(decoded.detach(), degree))
        if not self._winning(loss.detach()):
            return {"discriminator": loss, "adversarial": torch.zeros_like(loss)}
        frozen = {name: p.detach() for name, p in network.named_parameters()}
        return {
            "discriminator": loss,
            "adversarial": -functional_call(network, frozen, (decoded, degree)).float().mean(),
        }

    def _winning(self, loss: Tensor) -> bool:
        """Whether the discriminator's loss, over all processes, has been low; in training, follow its average."""
        # A wait for the device, but a discriminator has more to compute than the tokenizer.
        loss = distributed.mean(loss)
        if self.training:
            keep_finite(self.discriminator_loss, self.discriminator_loss.lerp(loss, 1 - self.gate_momentum))
        return bool(torch.maximum(self.discriminator_loss, loss) <= self.gate)


def _slices(volume: Tensor, index: Tensor) -> Tensor:
    """Slices by number: B x C x D x H x W and B x K to (B * K) x C x H x W."""
    _, c, _, h, w = volume.shape
    return take_tokens(volume.transpose(1, 2).flatten(2), index).flatten(0, 1).unflatten(1, (c, h, w))
