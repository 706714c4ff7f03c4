"""What one encoder for 2D images, volumes and thick slices costs, and what packing and checkpointing save.

    python benchmarks/vit_speed.py [--rounds 9] [--threads 2] [--dtype float32] [--compile]

1. `spad_vit_small` against a plain ViT of the same blocks that is fixed to one image size: a convolution of that size,
   positions and rotary tables made once. Forward pass and training step (forward, backward, fused AdamW).
2. Images of mixed sizes: packed one after the other, against padded to the longest with a mask in attention. Images
   come in no order, and sorted by size, where neighbours of one size share a call of attention.
3. Activation checkpointing, on and off. With --compile, the training step compiled and not.

All variants of a comparison take turns within one run, each round starting with another one; medians are compared.
"share" is the floating-point operations over the time and over the rate of square matrix products of the same
precision. Peak memory is of one training step in a process of its own, over what the process held before it: resident
memory on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import torch
from timing import PRODUCT, medians, product
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biovfm_monai.networks import ViT, encode_packed, spad_vit_small, vit_small

IMAGES = {
    "80x160x160 volume": ((80, 160, 160), 0),
    "20x160x160 thick": ((20, 160, 160), 2),
    "160x160 2D": ((160, 160), 5),
}
CHANNELS, BATCH = 1, 4


class Fixed(nn.Module):
    """An encoder's blocks behind a patch embedding and positions made for one size of image."""

    def __init__(self, encoder: ViT, image: Tensor, anisotropy: int) -> None:
        super().__init__()
        patches = encoder.patchify(image, anisotropy)
        stride = encoder.patch_embed.stride(anisotropy)
        self.proj = nn.Conv3d(CHANNELS, encoder.embed_dim, stride, stride)
        self.positions = nn.Parameter(torch.randn(1, patches.voxels.shape[1], encoder.embed_dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, encoder.embed_dim))
        angles = encoder.embed(patches)[1]
        self.turn = (angles.cos()[:, None], angles.sin()[:, None])
        self.blocks, self.norm = encoder.blocks, encoder.norm

    def forward(self, image: Tensor) -> Tensor:
        """Tokens of B x C x (D) x H x W."""
        x = self.proj(image if image.ndim == 5 else image[:, :, None]).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, self.turn)
        return self.norm(x)


def encode_padded(encoder: ViT, images: list[Tensor]) -> list[Tensor]:
    """Tokens of images padded to the longest, attention masked; the way without packing."""
    tokens = [encoder.embed(encoder.patchify(image))[0][0] for image in images]
    x = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(one) for one in tokens], device=x.device)
    mask = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None, None]
    for block in encoder.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attn.proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return [one[:length] for one, length in zip(encoder.norm(x), lengths.tolist(), strict=True)]


def mixed_images(device: str) -> list[Tensor]:
    """16 images of 64 to 320 pixels a side, four of each of four sizes, in no order."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.tensor([64, 96, 192, 320]).repeat(4)[torch.randperm(16, generator=generator)]
    return [torch.randn(1, CHANNELS, side, side, device=device) for side in sides.tolist()]


def by_size(images: list[Tensor]) -> list[Tensor]:
    """The images, those of one size next to each other."""
    return sorted(images, key=lambda image: image.shape[-1])


def inference(call: Callable[[], object], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """A function that takes one forward pass."""

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            call()

    return forward


def training(
    module: nn.Module, call: Callable[[], Tensor | list[Tensor]], dtype: torch.dtype, device: str
) -> Callable[[], None]:
    """A function that takes one training step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            tokens = call()
        tokens = tokens if isinstance(tokens, Tensor) else torch.cat([one.flatten(0, -2) for one in tokens])
        tokens.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_spad(name: str, arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the spatially adaptive encoder against the fixed one on one kind of image."""
    device, (size, anisotropy) = arguments.device, IMAGES[name]
    image = torch.randn(BATCH, CHANNELS, *size, device=device)
    spad = spad_vit_small(CHANNELS).to(device)
    fixed = Fixed(spad_vit_small(CHANNELS).to(device), image, anisotropy).to(device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tokens = spad(image, anisotropy)
        forward = counter.get_total_flops()
        tokens.sum().backward()
    spad.zero_grad()
    calls = {
        "forward SPAD": inference(lambda: spad(image, anisotropy), dtype, device),
        "forward fixed": inference(lambda: fixed(image), dtype, device),
        "training SPAD": training(spad, lambda: spad(image, anisotropy), dtype, device),
        "training fixed": training(fixed, lambda: fixed(image), dtype, device),
        "product": product(dtype, device),
    }
    seconds = medians(calls, arguments.rounds, device)
    for kind, flops in (("forward", forward), ("training", counter.get_total_flops())):
        ours, theirs = seconds[f"{kind} SPAD"], seconds[f"{kind} fixed"]
        share = flops / ours / (2 * PRODUCT**3 / seconds["product"])
        print(
            f"{name:18} {kind:8} {1e3 * theirs:9.1f} {1e3 * ours:9.1f} {ours / theirs - 1:9.1%} {share:6.0%}",
            flush=True,
        )


def variant(name: str, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """A training step by its name."""
    if name in ("padded", "packed", "packed, sorted"):
        encoder, images = vit_small(CHANNELS).to(device), mixed_images(device)
        images = by_size(images) if "sorted" in name else images
        call = (lambda: encode_padded(encoder, images)) if name == "padded" else lambda: encode_packed(encoder, images)
        return training(encoder, call, dtype, device)
    encoder = spad_vit_small(CHANNELS).to(device)
    encoder.grad_checkpointing = name == "checkpointed"
    network = torch.compile(encoder, fullgraph=True) if name == "compiled" else encoder
    image = torch.randn(BATCH, CHANNELS, 80, 160, 160, device=device)
    return training(encoder, lambda: network(image, 0), dtype, device)


def peak_memory(name: str, device: str, dtype: torch.dtype, threads: int, results: multiprocessing.Queue) -> None:
    """Put the MiB that one training step adds at its peak; to be run in a process of its own."""
    torch.set_num_threads(threads)
    step = variant(name, device, dtype)
    before = high_water(device)
    step()
    results.put(high_water(device) - before)


def high_water(device: str) -> float:
    """Most MiB that this process held at once."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) / 2**10


def compare_steps(title: str, names: list[str], arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print training steps against the first one, with peak memory."""
    device = arguments.device
    seconds = medians({name: variant(name, device, dtype) for name in names}, arguments.rounds, device)
    spawn = multiprocessing.get_context("spawn")
    print(f"\n{title:18} {'ms':>9} {'speed':>7} {'peak MiB':>9}")
    for name in names:
        results = spawn.Queue()
        child = spawn.Process(target=peak_memory, args=(name, device, dtype, arguments.threads, results))
        child.start()
        peak = results.get(timeout=600)
        child.join()
        print(f"{name:18} {1e3 * seconds[name]:9.1f} {seconds[names[0]] / seconds[name]:6.2f}x {peak:9.0f}", flush=True)


def check_padding(device: str) -> None:
    """Padded and packed images have the same tokens, or the comparison would mean nothing."""
    encoder, images = vit_small(CHANNELS, depth=2).to(device).eval(), mixed_images(device)
    with torch.inference_mode():
        for a, b in zip(encode_padded(encoder, images), encode_packed(encoder, images), strict=True):
            torch.testing.assert_close(a[None], b, rtol=1e-3, atol=1e-3)


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} threads"
    print(f"torch {torch.__version__}, {device}, {arguments.dtype}, {arguments.rounds} rounds, batches of {BATCH}")
    print(f"\n{'image':18} {'pass':8} {'fixed ms':>9} {'SPAD ms':>9} {'overhead':>9} {'share':>6}")
    for name in IMAGES:
        compare_spad(name, arguments, dtype)
    check_padding(arguments.device)
    compare_steps("mixed sizes", ["padded", "packed", "packed, sorted"], arguments, dtype)
    compare_steps("volume", ["plain", "checkpointed"] + ["compiled"] * arguments.compile, arguments, dtype)


if __name__ == "__main__":
    main()
