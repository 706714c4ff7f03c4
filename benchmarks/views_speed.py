"""Two large and eight small views of an image, from eight bits to the model's input: ours against the usual chain.

    python benchmarks/views_speed.py [--rounds 5] [--images 64]

The peer is DINO's chain of changes with lightly's published defaults (https://github.com/lightly-ai/lightly), rebuilt
from Pillow and torch, since torchvision, which lightly needs, is no dependency of ours: resize of a random box, flip,
brightness, contrast, saturation, hue, grey, blur, solarise, normalise, one view after the other. Ours makes a batch at
a time. Both have one thread. "grey" are images of one channel with the policy of radiographs, as configs/dinov2.json
has it; the peer, which has no other way, changes them as colours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from skimage import data as photographs
from torch import Tensor

from biovfm_monai.data import NATURAL, POLICIES, MultiCrop, Policy, RandomResizedCrop, with_chances

RNG = np.random.default_rng(0)
BLUR, SOLARISE = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)


def box(image: Image.Image, low: float, high: float) -> tuple[float, float, float, float]:
    """A random part of an image, as torchvision draws it."""
    width, height = image.size
    while True:
        area = width * height * RNG.uniform(low, high)
        ratio = np.exp(RNG.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= width and h <= height:
            x, y = RNG.integers(width - w + 1), RNG.integers(height - h + 1)
            return x, y, x + w, y + h


def jittered(image: Image.Image) -> Image.Image:
    """Brightness, contrast, saturation and hue."""
    for enhance, most in ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2)):
        image = enhance(image).enhance(RNG.uniform(1 - most, 1 + most))
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue) + np.uint8(int(RNG.uniform(-0.1, 0.1) * 255) % 256)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def peers_view(image: Image.Image, size: int, scale: tuple[float, float], blur: float, solarise: float) -> Tensor:
    """One view by the chain."""
    view = image.resize((size, size), Image.Resampling.BICUBIC, box(image, *scale))
    if RNG.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if RNG.random() < 0.8:
        view = jittered(view)
    if RNG.random() < 0.2:
        view = view.convert("L").convert("RGB")
    if RNG.random() < blur:
        view = view.filter(ImageFilter.GaussianBlur(RNG.uniform(0.1, 2.0)))
    if RNG.random() < solarise:
        view = ImageOps.solarize(view, 128)
    x = torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1).float().div_(255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


def peers(images: list[Image.Image], img_size: int = 224, local_size: int = 96) -> list[Tensor]:
    """All views of a batch, view by view."""
    large = [[peers_view(one, img_size, (0.32, 1.0), BLUR[n], SOLARISE[n]) for one in images] for n in (0, 1)]
    small = [[peers_view(one, local_size, (0.05, 0.32), BLUR[2], SOLARISE[2]) for one in images] for _ in range(8)]
    return [torch.stack(views) for views in (*large, *small)]


def ours(policies: Sequence[Policy], img_size: int = 224, local_size: int = 96) -> MultiCrop:
    """Our views with the same crops, and a policy for each large view and for the small ones."""
    large = [RandomResizedCrop((img_size,) * 2, scale=(0.32, 1.0), policy=one) for one in policies[:2]]
    return MultiCrop(large, RandomResizedCrop((local_size,) * 2, scale=(0.05, 0.32), policy=policies[2]))


def peers_changes() -> list[Policy]:
    """The chain's changes, as policies of ours."""
    return [with_chances({"": NATURAL}, blur=b, solarise=s)[""] for b, s in zip(BLUR, SOLARISE, strict=True)]


def rates(contestants: dict[str, Callable[[], object]], images: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of the thread's own time, in turns: other processes may share its core."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, make in contestants.items():
            begun = time.thread_time()
            make()
            if number:
                found[name].append(images / (time.thread_time() - begun))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = photographs.astronaut()
    starts = np.random.default_rng(0).integers(0, 256, (arguments.images, 2))
    cuts = np.stack([source[y : y + 256, x : x + 256] for y, x in starts])
    colour = torch.from_numpy(cuts).permute(0, 3, 1, 2)[:, :, None].contiguous()
    grey = colour[:, 1:2].contiguous()
    cpu, natural, medical = torch.device("cpu"), ours(peers_changes()), ours([POLICIES["xray"]] * 3)
    pictures = {
        "colour": [Image.fromarray(cut) for cut in cuts],
        "grey": [Image.fromarray(cut[..., 1]).convert("RGB") for cut in cuts],
    }
    found = rates(
        {
            "chain, colour": lambda: peers(pictures["colour"]), "ours, colour": lambda: natural({"image": colour}, cpu),
            "chain, grey": lambda: peers(pictures["grey"]), "ours, grey": lambda: medical({"image": grey}, cpu),
        },
        arguments.images, arguments.rounds,
    )  # fmt: skip
    for name, values in found.items():
        print(f"{name:15} {statistics.median(values):6.1f} images/s ({min(values):.1f} to {max(values):.1f})")
    for kind in ("colour", "grey"):
        pairs = zip(found[f"ours, {kind}"], found[f"chain, {kind}"], strict=True)
        print(f"{kind}: {statistics.median(a / b for a, b in pairs):.2f} times as fast, median of rounds")


if __name__ == "__main__":
    main()
