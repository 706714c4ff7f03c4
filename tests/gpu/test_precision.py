"""Mixed precision on a CUDA device."""

import pytest
import torch
from ignite.engine import Events
from torch.utils.data import DataLoader

from biovfm_monai.data import GlobalBatchSampler, RandomResizedCrop
from biovfm_monai.engines import PretrainingTrainer
from biovfm_monai.methods import MAE
from biovfm_monai.networks import ViT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Numbers(torch.utils.data.Dataset):
    """Image number n, endlessly."""

    def __getitem__(self, number):
        return {"image": torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(number))}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_in_every_precision(precision):
    method = MAE(
        ViT(1, (32, 32), 8, embed_dim=96, depth=2, num_heads=3),
        decoder_embed_dim=48,
        decoder_depth=1,
        decoder_num_heads=3,
    )
    losses = []
    trainer = PretrainingTrainer(
        "cuda", 1, DataLoader(Numbers(), batch_sampler=GlobalBatchSampler(32, 60)), method.cuda(),
        torch.optim.AdamW(method.parameters(), 1e-3), prepare_batch=RandomResizedCrop((32, 32)),
        precision=precision, clip_norm=1.0,
    )  # fmt: skip
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"].item()))
    trainer.run()
    assert torch.tensor(losses).isfinite().all()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
