"""Run as one of two processes: meet the other, be refused again and again, and lose the other in the end."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from biovfm_monai import distributed, parallelism
from biovfm_monai.data import GlobalBatchSampler, load_datalist
from biovfm_monai.errors import InputError, report_input_errors
from biovfm_monai.networks import ViT


def refusals(rank):
    """What is said to a batch that two processes cannot share, and to networks that differ, as copies and in parts."""
    network = ViT(1, (16, 16), 8, embed_dim=24, depth=1 + rank, num_heads=3)
    for attempt in (
        lambda: GlobalBatchSampler(7, 1),
        lambda: parallelism.parallel(network, "cpu"),
        lambda: parallelism.parallel(network, "cpu", sharding="full"),
    ):
        try:
            attempt()
        except InputError as error:
            yield str(error)
        else:
            yield "nothing"


def main(out, late=""):
    report_input_errors()
    torch.set_num_threads(1)
    distributed.initialize(timeout=8 if late else 60)
    rank = distributed.rank()
    if late and rank == 1:
        time.sleep(240)
    known = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    places = {"size": distributed.world_size(), "here": distributed.local_world_size(), "environment": known}
    Path(out, f"rank{rank}.json").write_text(json.dumps({**places, "said": list(refusals(rank))}))
    if rank == 1:
        load_datalist(Path(out, "no data"))
    distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
