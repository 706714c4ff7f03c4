"""Feature maps whose distance is LPIPS (https://arxiv.org/abs/1801.03924), of VGG16 (https://arxiv.org/abs/1409.1556)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biovfm_monai.errors import InputError

__all__ = ["LPIPSFeatures"]

# Width and number of convolutions.
_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_SMALLEST = 2 ** (len(_STAGES) - 1)


class LPIPSFeatures(nn.Module):
    """Maps of 2D images whose squared distance, as `perceptual_loss` takes it, is LPIPS; `load_lpips` makes it.

    The maps are those at the end of VGG16's five stages, of unit length and times the root of LPIPS's learned weights.

    Attributes:
        features: VGG16's convolutions, numbered as in torchvision.
        linear: learned weights of each stage's channels, 0 or more; ones until they are loaded.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, count in _STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.ParameterList(torch.ones(1, width, 1, 1) for width, _ in _STAGES)
        for name, colours in (("shift", (-0.030, -0.088, -0.188)), ("scale", (0.458, 0.448, 0.450))):
            self.register_buffer(name, torch.tensor(colours).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map B x C x H x W in [-1, 1], grey or in colour, to B x width x ... per stage; gradients flow to the image.

        Raises:
            InputError: when an image has neither 1 nor 3 channels, or a side of less than 16 pixels.
        """
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise InputError(
                f"LPIPS takes 2D images of 1 or 3 channels, got a batch of {tuple(image.shape)}. Set --in_channels to "
                "one of them, or compare by EncoderFeatures."
            )
        if min(image.shape[2:]) < _SMALLEST:
            raise InputError(
                f"LPIPS takes images of at least {_SMALLEST} pixels along each side, got {tuple(image.shape[2:])}. "
                "Give a larger --img_size."
            )
        # Against the constants of three colours, a grey image becomes three equal channels.
        x, maps = (image - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [_unit(x) * w.sqrt() for x, w in zip([*maps, x], self.linear, strict=True)]


def _unit(x: Tensor) -> Tensor:
    """Vectors of channels at unit length, in float32; what is 0 stays so."""
    x = x.float()
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
