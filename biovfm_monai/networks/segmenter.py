"""A network that labels every voxel, and its training at several resolutions (https://arxiv.org/abs/1409.5185)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.anisotropy import check_spacing
from biovfm_monai.errors import InputError, require_within
from biovfm_monai.networks.decoders import Decoder, LightDecoder, LinearDecoder, UNETRDecoder
from biovfm_monai.networks.heads import as_slices
from biovfm_monai.networks.vit import ViT

__all__ = ["DeepSupervision", "Segmenter"]

_DECODERS = {"linear": LinearDecoder, "light": LightDecoder, "unetr": UNETRDecoder}


class Segmenter(nn.Module):
    """A class for every voxel: encoder, decoder, and a linear head.

    An encoder of 2D images reads a volume slice by slice.

    Args:
        encoder: fresh, or from `load_encoder` or `encoder_to_finetune`; its in_channels are the network's.
        out_channels: classes, the background included.
        decoder: made for the encoder, or "linear", "light" or "unetr" for one with its own defaults.
        spacing: mm along depth, height and width of all volumes, for those that carry no geometry of their own, such as
            the windows of a sliding one; None to do as `ViT.patchify`.

    Raises:
        InputError: on no class, an unknown decoder or one that the encoder cannot have, or as `check_spacing`.
    """

    def __init__(
        self,
        encoder: ViT,
        out_channels: int,
        decoder: Decoder | str = "light",
        spacing: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require_within(1, whole=True, out_channels=out_channels)
        self.encoder, self.out_channels = encoder, out_channels
        self.decoder = _made(decoder, encoder)
        self.spacing: list[float] | None = None if spacing is None else [float(value) for value in spacing]
        if self.spacing is not None:
            check_spacing(self.spacing)
        self.head = nn.Conv3d(self.decoder.widths[-1], out_channels, 1)

    def forward(self, image: Tensor, anisotropy: int | None = None, spacing: list[float] | None = None) -> Tensor:
        """Logits of an image's voxels, B x C x (D) x H x W to B x out_channels x (D) x H x W.

        Args:
            image, anisotropy, spacing: as in `ViT.patchify`; its size is a multiple of the patch.
        """
        shape = image.shape
        image, _ = as_slices(image, self.encoder.spatial_dims)
        logits = self.head(self.maps(image, anisotropy, spacing)[-1])
        size = [1, image.shape[2], image.shape[3]] if image.ndim == 4 else [shape[2], shape[3], shape[4]]
        if logits.shape[2] != size[0] or logits.shape[3] != size[1] or logits.shape[4] != size[2]:
            logits = F.interpolate(logits, size=size, mode="trilinear", align_corners=False)
        if len(shape) == 4:
            return logits[:, :, 0]
        if self.encoder.spatial_dims == 2:
            return logits[:, :, 0].unflatten(0, (shape[0], shape[2])).transpose(1, 2)
        return logits

    def maps(self, image: Tensor, anisotropy: int | None = None, spacing: list[float] | None = None) -> list[Tensor]:
        """The decoder's feature maps, the finest last; arguments as of `forward`, of what the encoder reads at once."""
        own = self.spacing
        if spacing is None and own is not None and image.ndim == 5:
            spacing = own
        patches = self.encoder.patchify(image, anisotropy, spacing)
        tapped = self.encoder.feature_maps(patches, self.decoder.taps)
        if not torch.jit.is_scripting():
            image = _plain(image)
        return self.decoder(tapped, image.unsqueeze(2) if image.ndim == 4 else image, patches.anisotropy)


class DeepSupervision(nn.Module):
    """A segmenter that, in training, also tells the classes at lower resolutions (https://arxiv.org/abs/1409.5185).

    In training it gives a list of logits, the finest first, as MONAI's `DeepSupervisionLoss` takes it; else what the
    segmenter gives.

    Args:
        segmenter: with a decoder of several maps.
        levels: how many of them besides the finest have a head.

    Raises:
        InputError: when the decoder has no so many.
    """

    def __init__(self, segmenter: Segmenter, levels: int = 2) -> None:
        super().__init__()
        widths = segmenter.decoder.widths
        if not isinstance(levels, int) or not 1 <= levels < len(widths):
            raise InputError(
                f"levels {levels!r} must be 1 to {len(widths) - 1}; the decoder has {len(widths)} map(s). Correct it."
            )
        self.segmenter = segmenter
        self.heads = nn.ModuleList(
            nn.Conv3d(width, segmenter.out_channels, 1) for width in widths[-2 : -2 - levels : -1]
        )

    def forward(
        self, image: Tensor, anisotropy: int | None = None, spacing: list[float] | None = None
    ) -> Tensor | list[Tensor]:
        """Map an image to logits, as `Segmenter.forward`; in training a volume of an encoder of volumes to several."""
        if not self.training:
            return self.segmenter(image, anisotropy, spacing)
        maps = self.segmenter.maps(image, anisotropy, spacing)[::-1]
        found = [head(x) for head, x in zip([self.segmenter.head, *self.heads], maps, strict=False)]
        return [logits[:, :, 0] for logits in found] if image.ndim == 4 else found


def _plain(image: Tensor) -> Tensor:
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def _made(decoder: Decoder | str, encoder: ViT) -> Decoder:
    if isinstance(decoder, Decoder):
        return decoder
    if decoder not in _DECODERS:
        raise InputError(f"decoder {decoder!r} is unknown. Give one of {', '.join(_DECODERS)}.")
    made: Decoder = _DECODERS[decoder](encoder)
    return made
