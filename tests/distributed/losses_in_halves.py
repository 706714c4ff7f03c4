"""Run as two processes: write how far losses of half of the rows each, and gradients, are from those of all rows."""

import json
import sys
from pathlib import Path

import torch

from biovfm_monai import distributed
from biovfm_monai.losses import info_nce, sigreg
from biovfm_monai.losses.dino import koleo, sinkhorn, soft_cross_entropy
from biovfm_monai.losses.quantiser import code_usage
from biovfm_monai.methods import BarlowTwins, DINOv2, LeJEPA, MoCoV3, VICReg
from biovfm_monai.methods.projector import BatchNorm
from biovfm_monai.networks import ViT

ROWS, PIXELS = 8, 64


def two(loss):
    """A loss of two rows for each image."""
    return lambda rows: loss(*rows.chunk(2, dim=1))


def of_views(make, **options):
    """A method's loss of the two views that a row has of an image, in two steps, so that what it keeps counts, too."""

    def loss(rows):
        torch.manual_seed(0)
        method = make(ViT(1, (8, 8), 4, embed_dim=12, depth=1, num_heads=3), **options)
        key = torch.arange(len(rows)) + distributed.rank() * len(rows)
        views = rows.view(-1, 2, 1, 8, 8).transpose(0, 1)
        return sum(method({"global_crops": crops, "key": key})["loss"] for crops in (views, views.sin()))

    return loss


WIDE = {"projector_dims": (16, 16, 10)}
HEADS = {"prototypes": 6, "hidden_dim": 12, "bottleneck_dim": 5}
LOSSES = {
    "info_nce": two(lambda queries, keys: info_nce(queries, keys, 0.2)),
    "koleo": koleo,
    "sigreg": lambda rows: sigreg(rows, torch.tensor(3), 32),
    "code_usage": lambda rows: code_usage(rows.log_softmax(1)),
    "sinkhorn": two(lambda teacher, student: soft_cross_entropy(sinkhorn(teacher, 0.5), student, 0.1).mean()),
    "BatchNorm": lambda rows: BatchNorm(2 * PIXELS)(rows).pow(3).mean(),
    "BarlowTwins": of_views(BarlowTwins, **WIDE),
    "VICReg": of_views(VICReg, **WIDE),
    "LeJEPA": of_views(LeJEPA, **WIDE, num_slices=32),
    "MoCoV3": of_views(MoCoV3, hidden_dim=16, projection_dim=10),
    "DINOv2": of_views(DINOv2, **HEADS),
    "DINOv2, centred": of_views(DINOv2, **HEADS, centering="mean"),
    "DINOv2, queue": of_views(DINOv2, **HEADS, queue=40),
}


def value_and_gradient(loss, rows):
    """As DDP makes them of all processes': the mean of values, and of gradients."""
    rows = rows.clone().requires_grad_()
    value = loss(rows)
    value.backward()
    return distributed.mean(value.detach()), rows.grad / distributed.world_size()


def main(out: str) -> None:
    # Losses take float32; in float64 rounding is far smaller than whatever could be wrong.
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    rows = torch.randn(ROWS, 2 * PIXELS, generator=torch.Generator().manual_seed(0))
    alone = {name: value_and_gradient(loss, rows) for name, loss in LOSSES.items()}
    distributed.initialize()
    half, gaps = distributed.rank(), {}
    for name, loss in LOSSES.items():
        value, gradient = value_and_gradient(loss, rows.chunk(2)[half])
        whole, its_gradient = alone[name][0], alone[name][1].chunk(2)[half]
        gaps[name] = float((value - whole).abs() / whole.abs())
        gaps[f"gradient of {name}"] = float((gradient - its_gradient).norm() / its_gradient.norm())
    Path(out, f"rank{half}.json").write_text(json.dumps(gaps))
    distributed.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
