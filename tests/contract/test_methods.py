"""Every method obeys the contract of `SSLMethod`; add a line to METHODS in methods.py for a new one."""

import copy
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from methods import METHODS, SIZES, batch, encoder
from programs import run_python, run_together

from biovfm_monai.errors import InputError
from biovfm_monai.methods.projector import BatchNorm

#: of one image nothing is left to compare.
COMPARES_IMAGES = ("DINOv2", "MoCoV3", "BarlowTwins", "VICReg")
SCRIPT = str(Path(__file__).with_name("gradients.py"))


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def step(method, data, optimizer):
    loss = method(data)["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_every_trainable_parameter_gets_a_gradient(make, size):
    method = make(encoder(size))
    method(batch(size))["loss"].backward()
    trainable = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    assert [name for name, p in trainable if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)


def test_the_loss_falls_on_one_batch(make, size):
    method, data = make(encoder(size)), batch(size)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(60):
        torch.manual_seed(0)
        losses.append(step(method, data, optimizer))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("n", [1, 2])
def test_small_batches_train_or_are_refused(make, size, n):
    method = make(encoder(size))
    if n == 1 and make in (METHODS[name] for name in COMPARES_IMAGES):
        with pytest.raises(InputError, match="a step has 1"):
            method(batch(size, n))
        return
    loss = method(batch(size, n))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert any(p.grad.any() for p in method.encoder.parameters() if p.grad is not None)


def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_state(make, size):
    method, data = make(encoder(size)), batch(size)
    for name in ("image", "global_crops", "local_crops"):
        data[name][..., 0, 0] = torch.nan
    method(data)
    # Its step is left out, so `after_step` is not called.
    assert all(value.isfinite().all() for value in method.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_same_loss_to_its_precision(make, size, dtype):
    method = make(encoder(size))
    # Of four images batch norm would magnify the rounding to 3 % of the loss and more.
    data = batch(size, 32 if any(isinstance(module, BatchNorm) for module in method.modules()) else 4)
    torch.manual_seed(1)
    expected = copy.deepcopy(method)(data)["loss"]
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        loss = method(data)["loss"]
    loss.backward()
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def trained(make, size, data, steps, states=None):
    """Train from the start, or from states; returns the losses, and the states at the end."""
    # What goes on begins with other weights, prototypes and queues, all of which the state must replace.
    torch.manual_seed(6 if states else 5)
    method = make(encoder(size))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
    if states:
        method.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    losses = []
    for number in steps:
        torch.manual_seed(number)
        losses.append(step(method, data[number], optimizer))
        method.after_step((number + 1) / 4)
    return losses, (method.state_dict(), optimizer.state_dict())


def test_the_state_goes_round_and_training_goes_on_as_it_would_have(make, size):
    data = [batch(size) for _ in range(4)]
    whole, _ = trained(make, size, data, range(4))
    begun, states = trained(make, size, data, range(2))
    gone_on, _ = trained(make, size, data, range(2, 4), states)
    assert begun + gone_on == whole


def test_three_lines_of_python_are_all_it_takes(make):
    make(encoder((32, 32)))(batch((32, 32)))["loss"].backward()


def test_a_batch_without_images_is_refused_by_the_name_of_what_is_missing(make):
    whose = (
        '(image"[.] Let biovfm_monai[.]data[.]RandomResizedCrop|global_crops"[.] Let biovfm_monai[.]data[.]MultiCrop)'
    )
    with pytest.raises(InputError, match=f'the batch has no "{whose} make'):
        make(encoder((32, 32)))({"key": torch.arange(2)})


@pytest.mark.parametrize("degree", [0, 2, 5])
def test_thick_slices_and_2d_images_train_an_encoder_of_volumes(make, degree):
    size = (32, 32, 32)
    method = make(encoder(size))
    thin = {5: 1}.get(degree, 32 >> degree)
    data = batch((thin, 32, 32)) | {"anisotropy": torch.full((4,), degree)}
    depth = {0: 16, 2: 4, 5: 1}[degree]
    data["local_crops"] = torch.randn(3, 4, 1, depth, 16, 16)
    method(data)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_the_encoder_to_keep_is_the_teachers_where_it_is_the_better_one(make, size):
    method = make(encoder(size))
    places = {METHODS[name]: "teacher.network.encoder" for name in METHODS if name.startswith("DINOv2")}
    places[METHODS["IJEPA"]] = "teacher.network"
    assert method.trained is method.get_submodule(places.get(make, "encoder"))
    assert method.trained(torch.randn(2, 1, *size)).shape[0] == 2
    assert method.trained.arguments == method.encoder.arguments


@pytest.mark.xdist_group("distributed")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """All methods in one go, since starting processes takes longer than their gradients."""
    assert run_python([SCRIPT, tmp_path / "1.pt"], tmp_path).returncode == 0
    run_together(2, [SCRIPT, tmp_path / "2.pt"], tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert one.keys() == two.keys()
    largest = defaultdict(float)
    for name, expected in one.items():
        step = name.rsplit(" ", 1)[0]
        largest[step] = max(largest[step], float(expected.abs().max()))
    wrong = []
    for name, expected in one.items():
        # What batch norm takes out again, such as the offset of the norm before, has rounding errors for a gradient.
        scale = max(float(expected.abs().max()), 1e-3 * largest[name.rsplit(" ", 1)[0]])
        gap = float((two[name] - expected).abs().max()) / scale
        if gap > 3e-3:
            wrong.append((name, gap))
    assert wrong == []
