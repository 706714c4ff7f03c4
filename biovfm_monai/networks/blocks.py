"""The pre-norm transformer block of ViT (https://arxiv.org/abs/2010.11929), with its successors' options."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from biovfm_monai.networks.positions import rotate

__all__ = ["Attention", "Block", "DropPath", "LayerScale", "Mlp", "SwiGLU", "init_weights"]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled-dot-product attention, B x heads x N x width each.

    On CPUs torch's fused kernel takes up to twice as long as the plain products in bfloat16 (docs/experiments.md); they
    hold N x N weights, so long sequences keep the fused kernel.
    """
    if q.shape[2] > 1024 or q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.softmax(dim=-1) @ v


def _attend_within(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention of each image's tokens among themselves, images one after the other in a batch of one.

    On GPUs one kernel does all of them in half precision. Elsewhere neighbours of equal length are one batch, so that
    many small crops do not make many small calls.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - what stands under this alone is not compiled
        if _flash_takes(v):
            return _flash_within(q, k, v, lengths)
    parts: list[Tensor] = []
    start, number = 0, 0
    while number < len(lengths):
        length, first = lengths[number], number
        while number < len(lengths) and lengths[number] == length:
            number += 1
        end = start + length * (number - first)
        rows = [x[0, :, start:end].unflatten(1, (number - first, length)).transpose(0, 1) for x in (q, k, v)]
        parts.append(_attend(rows[0], rows[1], rows[2]).transpose(0, 1).flatten(1, 2))
        start = end
    return torch.cat(parts, dim=1)[None]


def _flash_takes(v: Tensor) -> bool:
    """Whether the kernel for sequences of several lengths can be used (https://arxiv.org/abs/2307.08691)."""
    return (
        v.is_cuda
        and v.dtype in (torch.float16, torch.bfloat16)
        and v.shape[-1] % 8 == 0
        and v.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(v.device) >= (8, 0)
    )


def _flash_within(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    # Without waiting for the device, which each block would do.
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(v.device, non_blocking=True)
    # Rotation and norms leave queries and keys in float32 under autocast.
    q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))
    attended: Tensor = varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths))  # type: ignore[assignment]
    return attended.transpose(0, 1)[None]


class Attention(nn.Module):
    """Multi-head self-attention: B x N x embed_dim to the same.

    Args:
        embed_dim: width of a token.
        num_heads: heads; divides embed_dim.
        qkv_bias: whether query and value have a bias.
        k_bias: whether the key has one, too; EVA-02's (https://arxiv.org/abs/2303.11331) has none.
        qk_norm: LayerNorm of each head's queries and keys (https://arxiv.org/abs/2302.05442).
        norm_eps: of that norm.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        k_bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias and k_bias)
        self.qv_bias = nn.Parameter(torch.zeros(2, embed_dim)) if qkv_bias and not k_bias else None
        self.q_norm = nn.LayerNorm(embed_dim // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(embed_dim // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None, lengths: list[int] | None = None) -> Tensor:
        """Let every token attend to every token of its image.

        Args:
            x: B x N x embed_dim.
            turn: cosines and sines of rotary positions, as `rotate` takes them.
            lengths: tokens per image when B is 1 and several images lie one after the other; None for one per row.
        """
        b, n, c = x.shape
        bias: Tensor | None = self.qkv.bias
        if self.qv_bias is not None:
            bias = torch.cat([self.qv_bias[0], torch.zeros_like(self.qv_bias[0]), self.qv_bias[1]])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.view(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn[0], turn[1]), rotate(k, turn[0], turn[1])
        x = _attend(q, k, v) if lengths is None else _attend_within(q, k, v, lengths)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    """Two linear layers with GELU between, applied to each token."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map B x N x embed_dim to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated layers applied to each token (https://arxiv.org/abs/2002.05202).

    Args:
        embed_dim, hidden_dim: widths; fc1 makes gate and value at once, the gate first.
        inner_norm: LayerNorm of the hidden numbers, as in EVA-02.
        norm_eps: of that norm.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, inner_norm: bool = False, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 2 * hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=norm_eps) if inner_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map B x N x embed_dim to the same."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(F.silu(gate) * value))


class LayerScale(nn.Module):
    """A learned factor per number of a token, small at first (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, embed_dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """Scale B x N x embed_dim."""
        return x * self.gamma


class DropPath(nn.Module):
    """Leave a residual branch out for some images of a batch in training (https://arxiv.org/abs/1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        """Zero whole images of B x N x embed_dim (lengths as in `Attention`), and scale the rest to keep the mean."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0] if lengths is None else len(lengths), 1, 1, device=x.device) >= self.rate
        if lengths is not None:
            keep = keep.repeat_interleave(torch.tensor(lengths, device=x.device), dim=0).transpose(0, 1)
        return x * keep.to(x.dtype) / (1 - self.rate)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised tokens and added back to them.

    Args:
        embed_dim, num_heads, mlp_ratio, qkv_bias, k_bias, qk_norm: as in `Attention` and the MLP.
        swiglu_mlp, scale_mlp: SwiGLU in place of the MLP, and its inner norm.
        init_values: first value of LayerScale; None for none.
        drop_path: share of images for which a branch is left out in training.
        norm_eps: of all norms.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        k_bias: bool = True,
        qk_norm: bool = False,
        swiglu_mlp: bool = False,
        scale_mlp: bool = False,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        hidden_dim = int(embed_dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = Attention(embed_dim, num_heads, qkv_bias, k_bias, qk_norm, norm_eps)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(embed_dim, init_values)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = SwiGLU(embed_dim, hidden_dim, scale_mlp, norm_eps) if swiglu_mlp else Mlp(embed_dim, hidden_dim)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(embed_dim, init_values)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None, lengths: list[int] | None = None) -> Tensor:
        """Map B x N x embed_dim to the same; turn and lengths as in `Attention`."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - what stands under this alone is not compiled
            if self.training and self.drop_path.rate > 0.0 and not torch.compiler.is_compiling():
                x = self._with_some(x, turn, lengths, self._attended)
                return self._with_some(x, turn, lengths, self._fed)
        x = x + self.drop_path(self._attended(x, turn, lengths), lengths)
        return x + self.drop_path(self._fed(x, turn, lengths), lengths)

    def _attended(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, lengths: list[int] | None) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), turn, lengths))

    def _fed(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, lengths: list[int] | None) -> Tensor:  # noqa: ARG002
        return self.ls2(self.mlp(self.norm2(x)))

    def _with_some(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, lengths: list[int] | None, branch: Callable[..., Tensor]
    ) -> Tensor:
        """Add a branch as `DropPath` lets through, which only images that keep it go through, as in DINOv2."""
        rate = self.drop_path.rate
        # Drawn on the CPU, so that no device is waited for.
        keep = torch.rand(x.shape[0] if lengths is None else len(lengths)) >= rate
        factor = 1 / (1 - rate) if keep.any() else 0.0
        # Even where all are left out, weights get a gradient, which processes wait for.
        keep[0] |= factor == 0.0
        dim = 0
        if lengths is not None:
            dim, own = 1, [length for length, kept in zip(lengths, keep.tolist(), strict=True) if kept]
            keep, lengths = keep.repeat_interleave(torch.tensor(lengths)), own
        rows = keep.nonzero()[:, 0].to(x.device, non_blocking=True)
        if turn is not None and (dim == 1 or turn[0].shape[0] > 1):
            turn = (turn[0].index_select(2 * dim, rows), turn[1].index_select(2 * dim, rows))
        added = branch(x.index_select(dim, rows), turn, lengths)
        return x.index_add(dim, rows, added.to(x.dtype), alpha=factor)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as MAE has them; use with `Module.apply`.

    Query, key and value are three matrices of their own for this, as in the ViT paper's code.
    """
    if isinstance(module, Attention):
        for matrix in module.qkv.weight.data.chunk(3):
            nn.init.xavier_uniform_(matrix)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
