"""Every method obeys the contract of `SSLMethod`; add a line to METHODS for a new one."""

import pytest
import torch

from biovfm_monai.methods import MAE
from biovfm_monai.networks import ViT

METHODS = {"MAE": lambda encoder: MAE(encoder, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=3)}
SIZES = {"2D": (32, 32), "3D": (16, 32, 32)}


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def encoder(size):
    return ViT(1, size, 8, embed_dim=24, depth=2, num_heads=3)


def batch(size, n=4):
    return {"image": torch.randn(n, 1, *size)}


def test_every_trainable_parameter_gets_a_gradient(make, size):
    method = make(encoder(size))
    method(batch(size))["loss"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_falls_on_one_batch(make, size):
    method, data = make(encoder(size)), batch(size)
    optimizer = torch.optim.AdamW(method.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        torch.manual_seed(0)
        loss = method(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("n", [1, 2])
def test_small_batches_give_a_finite_loss_and_gradient(make, size, n):
    method = make(encoder(size))
    method(batch(size, n))["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_bf16_autocast_gives_the_same_loss_to_its_precision(make, size):
    method, data = make(encoder(size)), batch(size)
    torch.manual_seed(1)
    expected = method(data)["loss"]
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(data)["loss"]
    loss.backward()
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_the_state_goes_round(make, size):
    first, second, data = make(encoder(size)), make(encoder(size)), batch(size)
    second.load_state_dict(first.state_dict())
    losses = []
    for method in (first, second):
        torch.manual_seed(2)
        losses.append(method(data)["loss"].item())
    assert losses[0] == losses[1]


def test_training_three_lines_of_python_is_all_it_takes(make):
    make(encoder((32, 32)))({"image": torch.randn(2, 1, 32, 32)})["loss"].backward()
