"""One MAE training step: against MONAI's `MaskedAutoEncoderViT` of equal size, and the matrix-product rate.

    python benchmarks/mae_speed.py [--rounds 9] [--threads 2]

ViT-S/16 at 224 px (2D, 3 channels) and at 96 x 96 x 96 (3D, 1 channel), with the published decoder (512 wide, 8 deep)
and a light one (192 wide, 4 deep). A step is forward, loss, backward and a fused AdamW update. All variants of a
setting take turns within one run, each round starting with another one, and medians are compared. "share" is the
step's floating-point operations over its time and over the rate of square matrix products of the same precision,
timed in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from monai_mae import MonaiMAE
from timing import PRODUCT, medians, product
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from biovfm_monai.methods import MAE
from biovfm_monai.networks import vit_small

SETTINGS = {"2D 224x224": ((224, 224), 3, 32), "3D 96x96x96": ((96, 96, 96), 1, 32)}
DECODERS = {"512 x 8": (512, 8, 16), "192 x 4": (192, 4, 6)}


def make_step(
    module: torch.nn.Module, loss: Callable[[], torch.Tensor], dtype: torch.dtype | None, device: str
) -> Callable[[], None]:
    """A function that takes one training step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flops(module: MAE, image: torch.Tensor) -> int:
    """Floating-point operations of forward and backward; the plain attention kernel, since torch counts that one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module({"image": image})["loss"].backward()
    module.zero_grad()
    return counter.get_total_flops()


def run_setting(setting: str, decoder: str, rounds: int, device: str) -> None:
    """Print the row of one image size and decoder."""
    img_size, channels, batch = SETTINGS[setting]
    image = torch.randn(batch, channels, *img_size, device=device)
    width, depth, heads = DECODERS[decoder]
    ours = MAE(vit_small(channels, img_size), 0.75, width, depth, heads).to(device)
    theirs = MonaiMAE(channels, img_size, 16, (384, 12, 6), DECODERS[decoder]).to(device)
    flops = count_flops(ours, image)
    our_loss, their_loss = lambda: ours({"image": image})["loss"], lambda: theirs({"image": image})["loss"]
    calls = {
        "ours fp32": make_step(ours, our_loss, None, device),
        "ours bf16": make_step(ours, our_loss, torch.bfloat16, device),
        "MONAI fp32": make_step(theirs, their_loss, None, device),
        "product fp32": product(torch.float32, device),
        "product bf16": product(torch.bfloat16, device),
    }
    try:
        with torch.autocast(device, dtype=torch.bfloat16):
            their_loss()
        calls["MONAI bf16"] = make_step(theirs, their_loss, torch.bfloat16, device)
    except RuntimeError as error:
        print(f"MONAI's MaskedAutoEncoderViT fails under bf16 autocast: {error}")
    seconds = medians(calls, rounds, device)
    base = seconds["MONAI fp32"]
    for name in ("ours fp32", "ours bf16", "MONAI fp32", "MONAI bf16"):
        if name not in seconds:
            continue
        share = ""
        if name.startswith("ours"):
            rate = 2 * PRODUCT**3 / seconds[f"product {name[-4:]}"]
            share = f"{flops / seconds[name] / rate:7.0%}"
        print(
            f"{setting:12} {decoder:8} {name:11} {batch / seconds[name]:9.1f} {base / seconds[name]:9.2f}x {share}",
            flush=True,
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads, {arguments.rounds} rounds")
    print(f"{'image':12} {'decoder':8} {'variant':11} {'images/s':>9} {'vs MONAI':>10} {'share':>7}")
    for setting in SETTINGS:
        for decoder in DECODERS:
            run_setting(setting, decoder, arguments.rounds, arguments.device)


if __name__ == "__main__":
    main()
