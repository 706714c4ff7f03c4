"""What fine-tuning adds to MONAI's trainer: schedules with layer-wise decay, a frozen encoder, flips."""

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer, SlidingWindowInferer

from biovfm_monai.checkpoints import load_model
from biovfm_monai.engines import (
    AnisotropyInferer,
    FlipInferer,
    FreezeHandler,
    ScheduleHandler,
    WarmupCosine,
    parameter_groups,
)
from biovfm_monai.errors import InputError
from biovfm_monai.networks import Segmenter, spad_vit_tiny, with_adapters


def network():
    return Segmenter(spad_vit_tiny(1, (8, 8, 8), 8, embed_dim=48, depth=2), 2)


def train(module, optimizer, handlers, epochs=3):
    batch = {"image": torch.randn(1, 1, 8, 8, 8), "label": torch.randn(1, 2, 8, 8, 8)}
    trainer = SupervisedTrainer(
        device="cpu", max_epochs=epochs, train_data_loader=[batch, batch], network=module, optimizer=optimizer,
        loss_function=torch.nn.MSELoss(), train_handlers=handlers, decollate=False,
    )  # fmt: skip
    trainer.run()
    return trainer


def test_a_schedule_sets_each_groups_rate_by_its_layer():
    module, seen = network(), []
    optimizer = torch.optim.SGD(parameter_groups(module, layer_decay=0.5), lr=1.0)

    class Watch:
        def attach(self, engine):
            from ignite.engine import Events

            engine.add_event_handler(
                Events.ITERATION_STARTED, lambda _: seen.append([group["lr"] for group in optimizer.param_groups])
            )

    train(module, optimizer, [ScheduleHandler(optimizer, {"lr": WarmupCosine(1e-3, warmup=0.5)}), Watch()])
    assert max(seen[0]) == pytest.approx(1e-3 * (0.5 / 6) / 0.5)
    assert sorted(set(seen[2])) == pytest.approx([max(seen[2]) * 0.5**n for n in (3, 2, 1, 0)])
    assert max(seen[-1]) < max(seen[2])


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained_of_an_encoder():
    module = network()
    image, before = torch.randn(1, 1, 8, 8, 8), copy.deepcopy(module).eval()
    with_adapters(module.encoder, rank=4)
    torch.testing.assert_close(module.eval()(image), before(image))
    trained = {name for name, p in module.named_parameters() if p.requires_grad and name.startswith("encoder")}
    assert trained == {
        f"encoder.blocks.{n}.attn.{layer}.parametrizations.weight.0.{part}"
        for n in (0, 1) for layer in ("qkv", "proj") for part in ("down", "up")
    }  # fmt: skip
    assert sum(p.numel() for name, p in module.named_parameters() if name in trained) == 2 * 4 * (48 + 144 + 48 + 48)
    train(module, torch.optim.SGD(parameter_groups(module), lr=0.1), [FreezeHandler(module.encoder, 1)])
    after = module.state_dict()
    changed = {name for name, x in before.state_dict().items() if not torch.equal(x, after[name])}
    assert {name for name in changed if name.startswith("encoder")} == {
        f"encoder.blocks.{n}.attn.{layer}.weight" for n in (0, 1) for layer in ("qkv", "proj")
    }


def test_weights_with_adapters_are_those_of_a_plain_network_and_go_back_into_one_with_adapters(tmp_path):
    module, image = network(), torch.randn(1, 1, 8, 8, 8)
    with_adapters(module.encoder, rank=2)
    train(module, torch.optim.SGD(parameter_groups(module), lr=0.5), [])
    torch.save({"model": module.state_dict()}, tmp_path / "model.pt")
    for rank in (0, 2):
        other = network()
        with_adapters(other.encoder, rank)
        load_model(other, tmp_path / "model.pt")
        torch.testing.assert_close(other.eval()(image), module.eval()(image))


@pytest.mark.parametrize("rank", [-1, 49, 1.5])
def test_a_rank_that_an_encoder_cannot_have_is_refused(rank):
    with pytest.raises(InputError, match="rank"):
        with_adapters(network().encoder, rank)


@pytest.mark.parametrize(("frozen", "moves"), [(0, True), (2, True), (3, False)])
def test_an_encoder_stays_frozen_for_as_many_epochs_as_are_asked_for(frozen, moves):
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(module, optimizer, [FreezeHandler(module.encoder, frozen)])
    changed = {
        name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == ({"encoder", "decoder", "head"} if moves else {"decoder", "head"})
    with pytest.raises(InputError, match="epochs -1"):
        FreezeHandler(module.encoder, -1)


def test_flips_average_what_is_found_in_each_mirror_image():
    image, weight = torch.randn(1, 1, 4, 6, 8), torch.randn(8)

    def sided(x):
        return x * weight

    found = FlipInferer(SimpleInferer(), [4])(image, sided)
    torch.testing.assert_close(found, image * (weight + weight.flip(0)) / 2)
    even = FlipInferer(SlidingWindowInferer((4, 4, 4), overlap=0.5), [2, 3, 4])(image, lambda x: x**2)
    torch.testing.assert_close(even, image**2)
    assert torch.equal(FlipInferer(SimpleInferer(), [])(image, sided), sided(image))
    with pytest.raises(InputError, match="axes"):
        FlipInferer(SimpleInferer(), [1])


@pytest.mark.parametrize(("thickness", "slices", "degree"), [(1.0, 8, 0), (5.0, 8, 2), (1.0, 1, 5)])
def test_windows_are_read_by_their_images_thickness_of_slices(thickness, slices, degree):
    seen = []

    def network(window, anisotropy=None):
        seen.append(anisotropy)
        return window

    inferer = AnisotropyInferer(SlidingWindowInferer((8, 8, 8), overlap=0))
    affine = torch.diag(torch.tensor([thickness, 1.0, 1.0, 1.0]))
    inferer(MetaTensor(torch.zeros(1, 1, slices, 16, 8), affine=affine), network)
    assert seen == [degree] * len(seen)
    inferer(torch.zeros(1, 1, 8, 8, 8), network)
    assert seen[-1] is None


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file. Train first"),
        (lambda path: path.write_bytes(b"x"), "damaged, or no weights"),
        (lambda path: torch.save({"other": 1}, path), "weights do not fit the network: missing"),
        (lambda path: torch.save({"model": {"a": torch.ones(1)}}, path), "missing encoder.*unexpected a"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(tmp_path, write, message):
    write(tmp_path / "model.pt")
    with pytest.raises(InputError, match=message):
        load_model(network(), tmp_path / "model.pt")
