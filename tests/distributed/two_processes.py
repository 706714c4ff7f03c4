"""Run under torchrun or alone: train a method without randomness on a global batch of 8, write what came out."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from ignite.engine import Events
from torch.utils.data import DataLoader, Dataset

from biovfm_monai import distributed, parallelism
from biovfm_monai.data import GlobalBatchSampler
from biovfm_monai.engines import (
    PretrainingTrainer,
    ProfileHandler,
    ProgressHandler,
    StateHandler,
    WarmupCosine,
    parameter_groups,
)
from biovfm_monai.methods import SSLMethod
from biovfm_monai.networks import ViT


class Numbers(Dataset):
    """Image number n, endlessly."""

    def __getitem__(self, number):
        return {"image": torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(number)), "number": number}


class Autoencoder(SSLMethod):
    """Predicts the image's mean from its tokens."""

    def __init__(self):
        super().__init__()
        self.encoder = ViT(1, (16, 16), 8, embed_dim=24, depth=2, num_heads=3)
        self.head = torch.nn.Linear(24, 1)
        self.numbers = []

    def forward(self, batch):
        self.numbers += batch["number"].tolist()
        target = batch["image"].flatten(1).mean(1, keepdim=True)
        return {"loss": (self.head(self.encoder(batch["image"]).mean(1)) - target).square().mean()}


def die(states: Path) -> None:
    """Once the state of the first epoch is there."""
    while not [*states.glob("step-*")]:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def main(out: str, accumulation: str, epochs: str, resume: str) -> None:
    """`resume` is "anew", "resume", "signalled", "killed" or "profiled"."""
    torch.set_num_threads(1)
    distributed.initialize()
    torch.manual_seed(0)
    method = Autoencoder()
    network = parallelism.parallel(method, "cpu")
    loader = DataLoader(Numbers(), batch_sampler=GlobalBatchSampler(8, 5, int(accumulation)))
    # SGD: Adam would turn the rounding in gradients that are zero (the keys' biases) into whole steps.
    optimizer = torch.optim.SGD(parameter_groups(network), 0.003, momentum=0.9)
    trainer = PretrainingTrainer(
        "cpu", 2, loader, network, optimizer, prepare_batch=lambda batch, *_, **__: batch,
        accumulation_steps=int(accumulation), schedules={"lr": WarmupCosine(0.003)},
        train_handlers=[
            StateHandler(f"{out}/state", resume=resume in ("resume", "killed")), ProgressHandler(f"{out}/log.jsonl", 1),
        ],
    )  # fmt: skip
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.epoch == int(epochs) and e.terminate())
    if resume == "profiled":
        ProfileHandler(f"{out}/profile", first=2, iterations=3).attach(trainer)
    if resume == "signalled" and distributed.rank() == 1:
        # Only one of the processes gets it.
        trainer.add_event_handler(Events.ITERATION_STARTED(once=7), lambda _: os.kill(os.getpid(), signal.SIGTERM))
    if resume == "killed" and distributed.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        trainer.add_event_handler(Events.ITERATION_STARTED(once=7), lambda _: die(Path(out, "state")))
    trainer.run()
    result = {"numbers": method.numbers, "weights": torch.cat([p.flatten() for p in method.parameters()]).tolist()}
    with Path(out, f"rank{distributed.rank()}.json").open("w") as file:
        json.dump(result, file)
    distributed.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
