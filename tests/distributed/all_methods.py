"""Run under torchrun or alone: train every method for twenty steps by the engine, write losses, weights and states."""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

sys.path.append(str(Path(__file__).parents[1] / "contract"))

from methods import METHODS, batch, encoder

from biovfm_monai import distributed, parallelism
from biovfm_monai.data import GlobalBatchSampler
from biovfm_monai.engines import (
    EncoderHandler,
    PretrainingTrainer,
    ProgressHandler,
    StateHandler,
    WarmupCosine,
    parameter_groups,
)
from biovfm_monai.networks import ViT

PHOTOS = [((32, 32), 5)]
ALL_KINDS = [*PHOTOS, ((8, 32, 32), 1), ((16, 32, 32), 0)]
"""Photos, thick slices and volumes; a micro-batch is of one kind."""


def adaptive(size):
    return ViT(
        1, size, 8, embed_dim=24, depth=2, num_heads=3, swiglu_mlp=True, scale_mlp=True, k_bias=False,
        pos_embed="learn", rope="index", init_values=0.5, reg_tokens=2,
    )  # fmt: skip


class Samples(Dataset):
    """Views of image number n, endlessly."""

    def __init__(self, kinds, micro):
        self.kinds, self.micro = kinds, micro

    def __getitem__(self, number):
        size, degree = self.kinds[number // self.micro % len(self.kinds)]
        with torch.random.fork_rng():
            torch.manual_seed(number)
            sample = batch(size, 1)
        views = {name: x[:, 0] if name.endswith("crops") else x[0] for name, x in sample.items()}
        return views | ({"anisotropy": degree} if len(self.kinds) > 1 else {})


def on_device(data, *_, **__):
    views = {name: x.transpose(0, 1) if name.endswith("crops") else x for name, x in data.items()}
    return views | ({"anisotropy": int(data["anisotropy"][0])} if "anisotropy" in data else {})


def train(name, out, options, resume=False):
    torch.manual_seed(0)
    kinds, build = (ALL_KINDS, adaptive) if name == "all kinds" else (PHOTOS, encoder)
    method = METHODS["MAE" if name == "all kinds" else name](build(kinds[-1][0]))
    network = parallelism.parallel(method, "cpu", **options)
    loader = DataLoader(Samples(kinds, 4), batch_sampler=GlobalBatchSampler(8, 10, 2))
    optimizer = torch.optim.SGD(parameter_groups(network), 0.003, momentum=0.9)
    PretrainingTrainer(
        "cpu", 2, loader, network, optimizer, prepare_batch=on_device, accumulation_steps=2, clip_norm=1.0,
        precision=options.get("precision", "fp32"),
        schedules={"lr": WarmupCosine(0.003)},
        train_handlers=[
            StateHandler(out / "state", resume=resume), ProgressHandler(out / "log.jsonl", 1), EncoderHandler(out),
        ],
    ).run()  # fmt: skip


def main(out: str, options: str, *names: str) -> None:
    """Names are of methods, or "all kinds"; with "+" behind it a run goes on from the state that is there."""
    torch.set_num_threads(1)
    distributed.initialize()
    for name in names:
        train(name.rstrip("+"), Path(out, name), json.loads(options), resume=name.endswith("+"))
    distributed.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
