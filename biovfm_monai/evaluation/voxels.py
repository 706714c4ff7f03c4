"""What a frozen encoder says of every voxel: a linear layer on its tokens (https://arxiv.org/abs/2304.07193)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from biovfm_monai.errors import require_within
from biovfm_monai.networks import ViT
from biovfm_monai.networks.heads import as_slices

__all__ = ["OUTSIDE", "RATES", "VoxelLayer", "token_maps", "train_voxel_layers"]

RATES = (0.003, 0.01, 0.03, 0.1)
#: stands in label maps where there is no image.
OUTSIDE = 255
_BLOCK = 64


class VoxelLayer(nn.Module):
    """Logits of voxels: a linear layer on standardised tokens, interpolated between them.

    Args:
        scaler: fitted to tokens; standardises each of their channels.
        out_channels: classes, the background included.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, scaler: StandardScaler, out_channels: int) -> None:
        super().__init__()
        for name, values in (("mean", scaler.mean_), ("scale", scaler.scale_)):
            self.register_buffer(name, torch.from_numpy(values).float().view(-1, 1, 1, 1))
        self.linear = nn.Conv3d(len(scaler.mean_), out_channels, 1)

    def forward(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Map B x C x grid, of any precision, to B x out_channels x size."""
        logits = self.linear((maps.float() - self.mean) / self.scale)
        return F.interpolate(logits, tuple(size), mode="trilinear")


def train_voxel_layers(
    windows: Sequence[tuple[Tensor, Tensor]],
    out_channels: int,
    rates: Sequence[float] = RATES,
    steps: int = 600,
    batch_size: int = 8,
    seed: int = 0,
) -> list[VoxelLayer]:
    """Train a layer for each learning rate, from the same weights on the same batches, by Dice and cross entropy.

    They are trained by AdamW without decay, rates rising and falling by one cycle; a batch is of windows of one size.

    Args:
        windows: token maps, N x C x grid, and their classes, N x D x H x W, of one size each; `OUTSIDE` is taken for
            background.
        out_channels: classes, the background included.
        rates: largest learning rates.
        steps, batch_size: of training, in windows.
        seed: of initial weights and batches.
    """
    require_within(1, whole=True, steps=steps, batch_size=batch_size)
    scaler = StandardScaler()
    for block in (block for maps, _ in windows for block in maps.split(_BLOCK)):
        scaler.partial_fit(block.movedim(1, -1).flatten(0, -2).float().cpu().numpy())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = VoxelLayer(scaler, out_channels).to(windows[0][0].device)
    layers = [copy.deepcopy(first) for _ in rates]
    groups = [{"params": layer.linear.parameters(), "lr": rate} for layer, rate in zip(layers, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates), total_steps=steps)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    drawn = torch.Generator().manual_seed(seed)
    counts = torch.tensor([float(len(maps)) for maps, _ in windows])
    for _ in range(steps):
        maps, classes = windows[int(torch.multinomial(counts, 1, generator=drawn))]
        rows = torch.randperm(len(maps), generator=drawn)[:batch_size].to(maps.device)
        truth = classes[rows, None].long()
        truth = truth.where(truth != OUTSIDE, 0)
        optimizer.zero_grad()
        for layer in layers:
            loss_of(layer(maps[rows], truth.shape[2:]), truth).backward()
        optimizer.step()
        schedule.step()
    return layers


@torch.inference_mode()
def token_maps(encoder: ViT, image: Tensor, spacing: list[float] | None = None, raw: bool = False) -> Tensor:
    """The last block's tokens where they are in an image, B x C x grid.

    Args:
        encoder: frozen; one of 2D images reads a volume slice by slice.
        image, spacing: as in `ViT.patchify`.
        raw: give the voxels of its patches instead, which tokens should be compared with.
    """
    volumes = image.ndim == 5 and encoder.spatial_dims == 2
    image, slices = as_slices(image, encoder.spatial_dims)
    patches = encoder.patchify(image, spacing=None if image.ndim == 4 else spacing)
    if raw:
        maps = patches.voxels.transpose(1, 2).unflatten(2, patches.grid_size)
    else:
        maps = encoder.feature_maps(patches, [len(encoder.blocks) - 1])[0]
    return maps[:, :, 0].unflatten(0, (-1, slices)).transpose(1, 2) if volumes else maps
