"""An encoder of 2D images made one of volumes (https://arxiv.org/abs/1705.07750), and other numbers of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["inflate", "with_channels"]


@torch.no_grad()
def inflate(encoder: ViT, img_size: Sequence[int], patch_depth: int | None = None, mode: str = "average") -> ViT:
    """An encoder of volumes from one of 2D images, which gives 2D images the same tokens as before.

    Learned positions are repeated along depth; fixed ones become learned ones that begin as the same table. So 2D
    images of the new height and width have the same tokens, and with learned positions images of other sizes, too, if
    height and width are those that the encoder was made for.

    Args:
        encoder: of 2D images.
        img_size: (depth, height, width) that the new one is made for.
        patch_depth: voxels per token along depth; None for the power of two next to those along the height, since thick
            slices halve it.
        mode: "average" spreads the patch kernel over depth, so that a slice repeated gives the 2D image's tokens;
            "center" puts it on the middle slice (or halves of it on the two).

    Raises:
        InputError: when the encoder is of volumes already, the size is no multiple of the patch, or the mode unknown.
    """
    if encoder.spatial_dims != 2:
        raise InputError("this encoder is one of volumes already. Leave volume_size out.")
    if mode not in ("average", "center"):
        raise InputError(f"inflation must be 'average' or 'center', got {mode!r}")
    depth = patch_depth or 2 ** round(math.log2(encoder.patch_size[0]))
    patch = (depth, *encoder.patch_size)
    if (
        not isinstance(img_size, Sequence)
        or len(img_size) != 3
        or any(not isinstance(n, int) or n < p or n % p for n, p in zip(img_size, patch, strict=True))
    ):
        raise InputError(
            f"volume_size {img_size} must be three multiples of {list(patch)}, such as {[4 * p for p in patch]}."
        )
    arguments = {**encoder.arguments, "img_size": list(img_size), "patch_size": list(patch)}
    volume = ViT(**arguments | ({"pos_embed": "learn"} if encoder.sincos else {}))
    state: dict[str, Tensor] = encoder.state_dict()
    plane = state["patch_embed.weight"][:, None]
    weight = torch.zeros(plane.shape[0], depth, plane.shape[2])
    middle = slice(0, depth) if mode == "average" else slice((depth - 1) // 2, depth // 2 + 1)
    weight[:, middle] = plane / len(range(depth)[middle])
    state["patch_embed.weight"] = weight.flatten(1)
    if volume.pos_embed is not None:
        d, h, w = volume.pos_embed.shape[2:]
        table = encoder.positions((1, h, w), plane.device)
        assert table is not None  # noqa: S101 - the volume's positions come from the encoder's
        state["pos_embed"] = table.transpose(1, 2).unflatten(2, (1, h, w)).expand(-1, -1, d, -1, -1)
    volume.load_state_dict(state)
    return volume.train(encoder.training)


@torch.no_grad()
def with_channels(encoder: ViT, in_channels: int) -> ViT:
    """The encoder for another number of channels.

    To one channel, kernels are summed: a grey image gives what it gave as equal channels. From one channel, they are
    shared out evenly.

    Raises:
        InputError: when neither number is one.
    """
    given = encoder.in_channels
    if given == in_channels:
        return encoder
    if 1 not in (given, in_channels):
        raise InputError(f"cannot make {given} channels {in_channels}: one of the two must be 1.")
    changed = ViT(**{**encoder.arguments, "in_channels": in_channels})
    state = encoder.state_dict()
    weight = state["patch_embed.weight"].unflatten(1, (-1, given))
    weight = weight.sum(2, keepdim=True) if in_channels == 1 else weight.expand(-1, -1, in_channels) / in_channels
    state["patch_embed.weight"] = weight.flatten(1)
    changed.load_state_dict(state)
    return changed.train(encoder.training)
