"""Convolution, transposed convolution and resampling that adapt to the spacing of slices: PUMIT / SPAD-Nets.

https://github.com/function2-llx/PUMIT describes the rule; the code here is written from its formula. A feature map of
an image whose degree of anisotropy is a, after n in-plane halvings, has max(a - n, 0) halvings to go until its voxels
are isotropic (`pending`), and depth was halved max(n - a, 0) times (`halved`). Both are plain arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "AdaptiveConv3d", "AdaptiveConvBlock", "AdaptiveConvTranspose3d", "adaptive_downsample", "adaptive_upsample",
    "halved", "pending",
]  # fmt: skip


def pending(anisotropy: int, halvings: int) -> int:
    """In-plane halvings still to go until voxels are isotropic."""
    return max(anisotropy - halvings, 0)


def halved(anisotropy: int, halvings: int) -> int:
    """How often depth was halved in so many in-plane halvings."""
    return max(halvings - anisotropy, 0)


class AdaptiveConv3d(nn.Module):
    """3D convolution whose kernel is summed along depth while slices are thick.

    With kernel_size = stride that is exactly the full convolution of the slices repeated. A kernel of 3 at stride 1
    acts as 1 x 3 x 3 while halvings are pending, and as 3 x 3 x 3 after.

    Args:
        in_channels, out_channels: of the feature maps.
        kernel_size: the stride; or 3, at stride 1 or 2.
        stride: a power of two.
        bias: whether there is one.

    Raises:
        ValueError: on another kernel_size or stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        if stride < 1 or stride & (stride - 1) or not (kernel_size == stride or (kernel_size == 3 and stride <= 2)):
            raise ValueError(
                f"stride {stride} must be a power of two, and kernel_size {kernel_size} it, or 3 at stride 1 or 2"
            )
        self.kernel_size, self.stride = kernel_size, stride
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *(kernel_size,) * 3))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, pending: int = 0) -> Tensor:
        """Map B x C x D x H x W; depth shrinks by max(stride >> pending, 1), the plane by stride."""
        k, s = self.kernel_size, self.stride
        depth = max(s >> pending, 1)
        pad = k // 2 if k != s else 0
        if pending == 0 and pad and x.shape[2] == 2:
            # Of two slices padded inside, oneDNN's weight gradient in bfloat16 has memory never written (torch 2.13).
            return F.conv3d(F.pad(x, (0, 0, 0, 0, pad, pad)), self.weight, self.bias, s, (0, pad, pad))
        if pending == 0:
            return F.conv3d(x, self.weight, self.bias, s, pad)
        groups = depth if k == s else 1
        weight = self.weight.unflatten(2, (groups, k // groups)).sum(3)
        return F.conv3d(x, weight, self.bias, (depth, s, s), (0, pad, pad))


class AdaptiveConvBlock(nn.Module):
    """Adaptive convolution of kernel 3, group norm, leaky ReLU.

    Args:
        in_channels, out_channels, stride: as of `AdaptiveConv3d`.
        norm_groups: of the group norm; divides out_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = AdaptiveConv3d(in_channels, out_channels, 3, stride)
        self.norm = nn.GroupNorm(norm_groups, out_channels)

    def forward(self, x: Tensor, pending: int = 0) -> Tensor:
        """Map B x C x D x H x W, with so many halvings pending."""
        return F.leaky_relu(self.norm(self.conv(x, pending)))


class AdaptiveConvTranspose3d(nn.Module):
    """3D transposed convolution with kernel_size = stride that widens depth no further than it was narrowed.

    Each voxel of its output is made by one tap along depth, so the taps that fall together are averaged, not summed:
    the output then is the mean of the slices that the full kernel would have made.

    Args:
        in_channels, out_channels: of the feature maps.
        stride: a power of two, and the kernel's size.
        bias: whether there is one.

    Raises:
        ValueError: on another stride.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bias: bool = True) -> None:
        super().__init__()
        if stride < 1 or stride & (stride - 1):
            raise ValueError(f"stride {stride} must be a power of two")
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, *(stride,) * 3))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, halved: int) -> Tensor:
        """Map B x C x D x H x W, whose depth was halved `halved` times; depth grows by min(2^halved, stride)."""
        depth = min(1 << halved, self.stride)
        weight = self.weight.unflatten(2, (depth, self.stride // depth)).mean(3)
        return F.conv_transpose3d(x, weight, self.bias, (depth, self.stride, self.stride))


def adaptive_downsample(x: Tensor, pending: int) -> Tensor:
    """Halve B x C x D x H x W in the plane, and in depth once nothing is pending, by averaging."""
    return F.avg_pool3d(x, (1 if pending else 2, 2, 2))


def adaptive_upsample(x: Tensor, halved: int, mode: str = "trilinear") -> Tensor:
    """Double B x C x D x H x W in the plane, and in depth if it was halved, in torch's interpolation mode."""
    return F.interpolate(x, scale_factor=(2.0 if halved else 1.0, 2.0, 2.0), mode=mode)
