"""Run under torchrun or alone: write the loss and gradients of each method on one batch, shared out over processes."""

import sys

import torch
from methods import METHODS, SIZES, batch, encoder, of_rank

from biovfm_monai import distributed, parallelism


def gradients(name, make, size):
    torch.manual_seed(0)
    method, data = make(encoder(size)), batch(size)
    network = parallelism.parallel(method, "cpu")
    found = {}
    for number in range(2):
        # The second step sees what the first one left in queues and teachers.
        loss = network(of_rank(data, distributed.rank(), distributed.world_size()))["loss"]
        method.zero_grad()
        loss.backward()
        method.after_step(0.5)
        found[f"{name} {number} loss"] = distributed.mean(loss.detach())
        for key, p in method.named_parameters():
            if p.grad is not None:
                found[f"{name} {number} {key}"] = p.grad.clone()
    return found


def main(out: str) -> None:
    torch.set_num_threads(1)
    distributed.initialize()
    found = {}
    for name, make in METHODS.items():
        if "drop-path" in name:
            continue  # Which images leave out a branch is drawn by each process, as dropout always is.
        for dims, size in SIZES.items():
            found |= gradients(f"{name} {dims}", make, size)
    if distributed.is_main():
        torch.save(found, out)
    distributed.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
