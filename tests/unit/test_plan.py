"""What a run takes, planned without weights, against what real tensors take."""

import json
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import BUNDLE, ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "tests/contract"))
from methods import METHODS, SIZES, batch, encoder

from biovfm_monai import cli
from biovfm_monai.data import GlobalBatchSampler, MultiCrop, RandomResizedCrop
from biovfm_monai.engines import epochs_for, make_plan, report_plans, scaled_rate
from biovfm_monai.engines.cost import blank_batch, cost_of, flops_of, imagined, outlined, tokens_of
from biovfm_monai.engines.memory import memory_of
from biovfm_monai.errors import InputError
from biovfm_monai.methods import MAE
from biovfm_monai.networks import ViT
from biovfm_monai.parallelism import parallel

TRAIN = str(BUNDLE / "configs/train.json")
SMALL = {"encoder#depth": 1, "batch_size": 8, "device": "cpu", "precision": "fp32"}


def small_mae(**options):
    torch.manual_seed(0)
    return MAE(ViT(1, (32, 32), 8, embed_dim=48, depth=2, num_heads=3, **options), decoder_depth=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_planned_operations_are_those_that_torch_counts_in_the_real_pass(name, size):
    method, data = METHODS[name](encoder(SIZES[size])), batch(SIZES[size])
    if name == "SPADTokenizer":
        # Plans are for when its discriminator is winning.
        method.gate = float("inf")
    planned = flops_of(imagined(method), outlined(data))
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = method(data)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    assert planned == (forward, counter.get_total_flops())


def test_an_imagined_method_has_no_numbers_and_leaves_the_real_one_and_the_random_numbers_alone():
    method, data = small_mae(drop_path_rate=0.5), {"image": torch.randn(2, 1, 32, 32), "key": torch.arange(2)}
    before, drawn = {name: x.clone() for name, x in method.state_dict().items()}, torch.get_rng_state()
    copy = imagined(method)
    flops_of(copy, outlined(data))
    assert {p.device.type for p in copy.parameters()} == {"meta"}
    assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def planned_memory(method, count, dtype=None, device="cpu", **options):
    copy = imagined(method)
    optimizer = torch.optim.AdamW(copy.parameters(), fused=True)
    views = RandomResizedCrop((32, 32))
    return memory_of(copy, lambda: blank_batch(copy, views, (32, 32), count), optimizer, dtype, device, **options)


def test_planned_memory_has_all_weights_gradients_and_two_states_of_each():
    method = small_mae()
    size = sum(4 * p.numel() for p in method.parameters())
    memory = planned_memory(method, 4)
    assert (memory.weights, memory.gradients) == (size, size)
    assert memory.optimizer == pytest.approx(2 * size, rel=1e-3)
    assert max(memory[:4]) < memory.peak <= sum(memory[:4]) * 1.1


def test_planned_activations_are_what_the_backward_pass_holds_on_to():
    method, kept = small_mae(), {}
    image = torch.randn(64, 1, 32, 32)

    def note(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = method({"image": image})["loss"]
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    held = sum(size for place, size in kept.items() if place not in own)
    assert loss.isfinite()
    assert planned_memory(method, 64).activations == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_the_planned_peak_of_a_pass_is_what_torch_allocates(tmp_path, kind):
    method, data = small_mae(), {"image": torch.randn(64, 1, 32, 32), "key": torch.arange(64)}
    network = parallel(method, "cpu", checkpointing=kind)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network(data)["loss"].backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    allocated = accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))
    copy = parallel(imagined(method), "meta", checkpointing=kind)
    memory = memory_of(copy, lambda: outlined(data), torch.optim.SGD(copy.parameters()), device="cpu")
    assert memory.peak - memory.weights - data["image"].nbytes == pytest.approx(max(allocated), rel=0.05)


def test_gradients_that_stay_are_there_when_most_activations_are():
    method = small_mae()
    plain, staying = planned_memory(method, 64), planned_memory(method, 64, gradients_stay=True)
    assert staying[:4] == plain[:4]
    assert staying.peak == pytest.approx(plain.peak + plain.gradients, rel=0.01)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_many_processes_plan_with_little_beside_activations_and_what_is_put_together(dtype):
    method = small_mae()
    alone, parts = planned_memory(method, 64, dtype), planned_memory(method, 64, dtype, parts=2**20)
    assert parts.weights + parts.gradients + parts.optimizer < 100
    largest = max(sum(p.nbytes for p in block.parameters()) for block in method.decoder_blocks)
    outside = sum(p.nbytes for name, p in method.named_parameters() if "blocks." not in name)
    buffers = sum(x.nbytes for x in method.buffers())
    short_lived = alone.peak - alone.weights - alone.optimizer - alone.activations
    assert parts.peak == pytest.approx(parts.activations + outside + buffers + 3 * largest + short_lived, rel=0.01)
    # Weights in half precision are of one block at a time.
    assert (parts.activations < alone.activations) == (dtype is not None)


def test_half_precision_and_fused_attention_are_planned_with_less_memory():
    method = small_mae()
    full, half = planned_memory(method, 64), planned_memory(method, 64, torch.bfloat16, "cuda")
    assert half.weights == full.weights
    assert half.activations < 0.85 * full.activations
    assert half.activations < planned_memory(method, 64, torch.bfloat16, "cpu").activations


def test_blocks_computed_anew_are_planned_with_less_memory_and_the_same_operations():
    plain, anew = (
        make_plan([TRAIN], {**SMALL, "encoder#depth": 4, "precision": "bf16", "checkpointing": kind})
        for kind in ("none", "full")
    )
    assert anew.memory.activations < 0.6 * plain.memory.activations
    assert anew.memory.weights == plain.memory.weights
    assert anew.cost == plain.cost


def test_a_frozen_part_is_planned_without_gradients_and_states():
    method = small_mae()
    method.encoder.requires_grad_(False)
    trained = sum(4 * p.numel() for p in method.parameters() if p.requires_grad)
    memory = planned_memory(method, 2)
    assert memory.gradients == trained
    assert memory.optimizer == pytest.approx(2 * trained, rel=1e-3)


@pytest.mark.parametrize(
    ("views", "crop_size", "tokens"),
    [
        (RandomResizedCrop((32, 32)), (40, 40), 16),
        (RandomResizedCrop((16, 32, 32)), (16, 40, 40), 32),
        (MultiCrop([RandomResizedCrop((32, 32))] * 2, RandomResizedCrop((16, 16)), 3), (40, 40), 2 * 16 + 3 * 4),
    ],
)
def test_tokens_are_the_patches_of_all_views(views, crop_size, tokens):
    network = imagined(MAE(ViT(1, (16, 32, 32)[-len(crop_size) :], 8, 24, 1, 3)))
    assert tokens_of(network.encoder, blank_batch(network, views, crop_size, 5)) == 5 * tokens


def test_thick_slices_have_tokens_as_the_encoder_cuts_them():
    vit = ViT(1, (16, 32, 32), 8, 24, 1, 3)
    image = torch.randn(2, 1, 4, 32, 32)
    tokens = tokens_of(vit, {"image": image, "anisotropy": torch.tensor([2, 2])})
    assert tokens == 2 * (vit(image, 2).shape[1] - vit.num_prefix_tokens)


def test_a_plan_of_a_bundle_counts_its_networks_steps_and_images():
    plan = make_plan([TRAIN], {**SMALL, "max_epochs": 2, "steps_per_epoch": 5, "accumulation_steps": 2}, processes=2)
    assert (plan.steps, plan.samples, plan.micro_batch) == (10, 80, 2)
    assert plan.cost.tokens == 64
    assert plan.parameters > plan.encoder_parameters > 0
    # Two processes have half of the weights and the optimizer's states each, and all gradients while they sum them up.
    assert plan.sharded.weights == pytest.approx(plan.memory.weights / 2, rel=1e-3)
    assert plan.sharded.optimizer == pytest.approx(plan.memory.optimizer / 2, rel=1e-3)
    assert (plan.sharded.gradients, plan.sharded.activations) == (plan.memory.gradients, plan.memory.activations)
    assert plan.flops == 80 * plan.cost.flops
    assert plan.hours(plan.flops / 7200) == pytest.approx(1)


def test_the_largest_micro_batch_fits_and_one_image_more_does_not():
    given = {**SMALL, "batch_size": 1}
    room = make_plan([TRAIN], {**given, "batch_size": 41}).memory.peak
    assert make_plan([TRAIN], given, memory=room / 2**30).largest_micro_batch == 41
    assert make_plan([TRAIN], given, memory=(room - 1) / 2**30).largest_micro_batch == 40
    assert make_plan([TRAIN], given, memory=0.001).largest_micro_batch == 0


@pytest.mark.parametrize("options", [{"checkpointing": "full"}, {"compiled": True}], ids=str)
def test_operations_of_a_method_in_training_do_not_depend_on_how_its_blocks_are_computed(options):
    data = outlined({"image": torch.rand(2, 1, 32, 32), "key": torch.arange(2)})
    plain = flops_of(imagined(small_mae()), data)
    assert flops_of(imagined(parallel(small_mae(), "cpu", **options)), data) == plain


def test_a_budget_gives_runs_of_different_size_the_same_operations():
    plans = [
        make_plan([TRAIN], {**SMALL, "encoder#depth": depth, "steps_per_epoch": 1, "budget": "1e12 flops"})
        for depth in (1, 3)
    ]
    for plan in plans:
        assert plan.flops == pytest.approx(1e12, rel=0.01)
    assert plans[0].samples > plans[1].samples


@pytest.mark.parametrize(
    ("budget", "epochs"), [(None, 7), ("3 epochs", 3), ("100 samples", 6), ("1 samples", 1), ("1600 tokens", 6)]
)
def test_a_budget_is_as_many_epochs_as_come_nearest_to_it(budget, epochs):
    sampler = GlobalBatchSampler(8, 2, 2)
    assert epochs_for(budget, 7, sampler, small_mae(), RandomResizedCrop((32, 32)), (40, 40)) == epochs


@pytest.mark.parametrize(("budget", "said"), [("4 samples", "is 0.25 epochs of 16 samples, and the run has 1, 4 times"),
    ("40 samples", "is 2.5 epochs of 16 samples, and the run has 2, 0.8 times"), ("33 samples", None)])  # fmt: skip
def test_a_budget_that_whole_epochs_do_not_come_near_is_told(caplog, budget, said):
    epochs_for(budget, 7, GlobalBatchSampler(8, 2), small_mae(), RandomResizedCrop((32, 32)), (40, 40))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [said in warning for warning in warnings] == ([True] if said else [])


def test_a_budget_of_operations_is_that_of_the_methods_own():
    method, views = small_mae(), RandomResizedCrop((32, 32))
    one = cost_of(imagined(method), blank_batch(imagined(method), views, (40, 40), 4), 4).flops
    assert epochs_for(f"{80 * one} flops", 7, GlobalBatchSampler(8, 2, 2), method, views, (40, 40)) == 5


@pytest.mark.parametrize("budget", ["2e15", "-1 flops", "many tokens", "3 hours", "nan flops", 5])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(InputError, match=r"must be a number above 0 and one of epochs, samples, tokens, flops"):
        epochs_for(budget, 7, GlobalBatchSampler(8, 2), small_mae(), RandomResizedCrop((32, 32)), (40, 40))


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ({"bach_size": 3}, {}, "has no key 'bach_size' to change"),
        ({"decoder#depth": 3}, {}, "has no key 'decoder' to change"),
        ({"encoder#dep": 3}, {}, "method of the configuration cannot be made: .*unexpected keyword argument 'dep'"),
        ({"batch_size": 9}, {"processes": 2}, r"batch_size 9 cannot be shared out over 2 process\(es\)"),
        ({"sharding": "hybrid"}, {"processes": 2}, "a plan knows of no machines. Plan one of them: --sharding full"),
        ({"precision": "fp8"}, {}, "precision 'fp8' is unknown"),
        ({}, {"memory": 0}, "memory 0 must be above 0"),
        ({}, {"rate": "fast"}, "rate 'fast' must be a number"),
        ({}, {"price": 2}, "price needs a rate"),
        ({}, {"grid": {"batch_size": 8}}, "must have a list of values"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(overrides, options, message):
    with pytest.raises(InputError, match=message):
        report_plans([TRAIN], overrides, **options)


def test_a_configuration_that_is_not_there_or_trains_nothing_is_refused():
    with pytest.raises(InputError, match=r"nothing\.json: is not there"):
        cli.plan("nothing.json")
    with pytest.raises(InputError, match="no key 'method'"):
        cli.plan(str(BUNDLE / "configs/inference.json"))
    with pytest.raises(InputError, match=r"name a bundle's train\.json"):
        cli.plan()


def test_a_plan_tells_time_and_cost_by_the_rate_that_a_run_has_logged(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in ({"step": 1}, {"flops_per_second_per_device": 2e9})))
    text = cli.plan(TRAIN, rate=str(log), price=3, memory=1, **SMALL)
    for part in ("parameters", "tokens", "FLOPs forward", "GiB at most (fp32, cpu)", "fits", "2e+09 FLOP/s a device, "):
        assert part in text


def test_a_grid_has_a_line_for_each_run():
    text = report_plans([TRAIN], SMALL, grid={"encoder#depth": [1, 2], "batch_size": [8, 16]}, rate=1e12)
    head, *lines = [line.split("  ") for line in text.splitlines()]
    assert [cell.strip() for cell in head if cell.strip()][:3] == ["encoder#depth", "batch_size", "parameters"]
    assert len(lines) == 4


@pytest.mark.parametrize(("rule", "rate"), [("linear", 0.4), ("root", 0.2)])
def test_a_learning_rate_grows_with_the_batch_by_its_rule(rule, rate):
    assert scaled_rate(0.1, 256, 64, rule) == pytest.approx(rate)


def test_an_unknown_rule_of_learning_rates_is_refused():
    with pytest.raises(InputError, match="rule 'cubic' must be 'linear' or 'root'"):
        scaled_rate(0.1, 256, 64, "cubic")


def test_every_shipped_training_can_be_planned_but_for_what_needs_an_earlier_one():
    for bundle in Path(ROOT / "bundles").glob("*_pretraining"):
        if bundle.name != "spad_mim_pretraining":
            plan = make_plan([str(bundle / "configs/train.json")], {"batch_size": 2, "device": "cpu"})
            assert plan.cost.flops > plan.cost.forward > 0
