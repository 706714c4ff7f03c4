"""How large the state of a run is, and how long training stands still while it is written.

    python benchmarks/state.py [--encoder vit_base] [--rounds 5] [--folder FOLDER]

A masked autoencoder with the published decoder and AdamW's states, fp32. Each round, `StateHandler` writes a state at
the end of an epoch; the first one takes the memory that all copies use. Then as many bytes are written to a file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from biovfm_monai import networks
from biovfm_monai.checkpoints.state import newest_state
from biovfm_monai.data import GlobalBatchSampler
from biovfm_monai.engines import PretrainingTrainer, StateHandler, parameter_groups
from biovfm_monai.methods import MAE


class Nothing(Dataset):
    """One grey image, endlessly."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(3, 224, 224), "key": torch.tensor(number)}


class TimedStates(StateHandler):
    """Notes how long training stands still for each state, and how long until it is there, with training waiting."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seconds: list[tuple[float, float]] = []

    def _save(self, engine: PretrainingTrainer) -> None:
        begun = time.perf_counter()
        super()._save(engine)
        copied = time.perf_counter()
        self._wait()
        self.seconds.append((copied - begun, time.perf_counter() - copied))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        states = TimedStates(Path(folder))
        method = MAE(getattr(networks, chosen.encoder)())
        PretrainingTrainer(
            "cpu", chosen.rounds, DataLoader(Nothing(), batch_sampler=GlobalBatchSampler(1, 1)), method,
            torch.optim.AdamW(parameter_groups(method), 1e-4), prepare_batch=lambda batch, *_, **__: batch,
            train_handlers=[states],
        ).run()  # fmt: skip
        content = b"".join(path.read_bytes() for path in newest_state(Path(folder)).iterdir())
        plain = []
        for number in range(chosen.rounds):
            begun = time.perf_counter()
            Path(folder, str(number)).write_bytes(content)
            plain.append(time.perf_counter() - begun)
            Path(folder, str(number)).unlink()
    parameters = sum(p.numel() for p in method.parameters())
    (first, _), *later = states.seconds
    copied, written = (statistics.median(seconds) for seconds in zip(*later, strict=True))
    print(f"{chosen.encoder}, {parameters / 1e6:.1f} M parameters with the decoder: {len(content) / 2**20:,.0f} MiB")
    print(f"a state stops training for {copied:.2f} s (the first, {first:.2f} s); it is there {written:.2f} s later")
    print(f"as many bytes are written in {statistics.median(plain):.2f} s")


if __name__ == "__main__":
    main()
