"""Run under torchrun or alone: train an encoder on photos, thick slices and volumes in turn; write weights and maps."""

import sys

import torch
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from biovfm_monai import distributed
from biovfm_monai.networks import ViT

SHAPES = [(1, 32, 32), (1, 4, 32, 32), (1, 16, 32, 32)]
ANISOTROPY = [None, 2, 0]


def main(out: str, wrapping: str) -> None:
    torch.set_num_threads(1)
    distributed.initialize()
    torch.manual_seed(0)
    encoder = ViT(
        1, (16, 32, 32), 16, embed_dim=24, depth=2, num_heads=3, swiglu_mlp=True, scale_mlp=True, k_bias=False,
        pos_embed="learn", rope="index", init_values=0.5, reg_tokens=2,
    )  # fmt: skip
    encoder.grad_checkpointing = True
    network = encoder
    if wrapping == "ddp":
        network = DistributedDataParallel(encoder)
    elif wrapping == "fsdp2":
        for block in encoder.blocks:
            fully_shard(block)
        fully_shard(encoder)
        register_fsdp_forward_method(encoder, "features")
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    half = slice(distributed.rank(), None, 2) if wrapping != "alone" else slice(None)
    for step in range(6):
        images = torch.randn(4, *SHAPES[step % 3], generator=torch.Generator().manual_seed(step))
        network(images[half], ANISOTROPY[step % 3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        first, last = encoder.features(torch.ones(1, 1, 4, 32, 32), [0, 1], anisotropy=2)
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in encoder.named_parameters()}
    if distributed.rank() == 0:
        torch.save({name: p.detach() for name, p in weights.items()} | {"first": first, "last": last}, out)
    distributed.finalize()


if __name__ == "__main__":
    main(*sys.argv[1:])
