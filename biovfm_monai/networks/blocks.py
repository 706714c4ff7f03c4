"""The pre-norm transformer block of ViT (https://arxiv.org/abs/2010.11929) with scaled-dot-product attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention", "Block", "Mlp", "init_weights"]

_SHORT = 1024


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled-dot-product attention, B x heads x N x width each.

    On CPUs torch's fused kernel takes about twice as long as the plain products in a bfloat16 training step
    (benchmarks/mae_speed.py); they hold N x N weights, so long sequences keep the fused kernel.
    """
    plain = q.dtype is torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[2] <= _SHORT
    if not plain:
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention: B x N x embed_dim to the same.

    Args:
        embed_dim: width of a token.
        num_heads: heads; divides embed_dim.
        qkv_bias: whether query, key and value have a bias.
    """

    def __init__(self, embed_dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Let every token attend to every token of its image."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = _attend(q, k, v)
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


class Block(nn.Module):
    """Attention, then MLP, each on the normalised tokens and added back to them."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map B x N x embed_dim to the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


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
