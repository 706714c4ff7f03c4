"""The engine: what happens once per optimizer step, what ends a run, and that a killed run goes on exactly."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from ignite.engine import Events
from limits import files_of_at_most
from monai.engines import SupervisedTrainer
from PIL import Image
from programs import kill_when_it_prints
from torch.utils.data import DataLoader

from biovfm_monai import distributed
from biovfm_monai.checkpoints import state
from biovfm_monai.checkpoints.state import about_state, read_state, states_in, step_of
from biovfm_monai.data import GlobalBatchSampler, Policy, RandomCropDataset, RandomResizedCrop
from biovfm_monai.engines import (
    BadStepHandler,
    PretrainingTrainer,
    ProgressHandler,
    ReconstructionHandler,
    StateHandler,
    WarmupCosine,
    fast_precision,
    parameter_groups,
)
from biovfm_monai.engines.settings import differences
from biovfm_monai.errors import InputError, NonFiniteLossError, reason_of
from biovfm_monai.methods import MAE, SSLMethod
from biovfm_monai.networks import ViT, vit_tiny


class Numbers(torch.utils.data.Dataset):
    """Image number n, endlessly."""

    def __getitem__(self, number):
        image = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(number))
        return {"image": image, "number": number, "key": number}


class Line(SSLMethod):
    """A parameter that follows the batch's mean, and a diary of what the engine calls."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.encoder = torch.nn.Identity()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scale, self.progress = scale, []

    def forward(self, batch):
        return {"loss": self.scale * (self.weight - batch["image"].mean()).square().mean(), "extra": self.weight * 2}

    def after_step(self, progress):
        self.progress.append(progress)


def mae(**options):
    torch.manual_seed(0)
    return MAE(
        ViT(1, (16, 16), 8, embed_dim=24, depth=1, num_heads=3),
        decoder_embed_dim=24,
        decoder_depth=1,
        decoder_num_heads=3,
        **options,
    )


def trainer(method, epochs=2, steps=3, accumulation=1, batch=4, lr=0.1, **options):
    sampler = GlobalBatchSampler(batch, steps, accumulation)
    loader = DataLoader(Numbers(), batch_sampler=sampler, **options.pop("loading", None) or {})
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(method.parameters(), lr)
    options.setdefault("prepare_batch", RandomResizedCrop((16, 16)))
    return PretrainingTrainer("cpu", epochs, loader, method, optimizer, accumulation_steps=accumulation, **options)


def test_monai_sees_a_supervised_trainer():
    assert isinstance(trainer(Line()), SupervisedTrainer)


def test_the_output_is_the_methods_own_dict_and_the_norm_of_the_gradients_without_their_graph():
    engine = trainer(Line())
    engine.run()
    (output,) = engine.state.output
    assert set(output) == {"loss", "extra", "gradient_norm"}
    assert output["gradient_norm"] == engine.method.weight.grad.abs()
    assert not any(value.requires_grad for value in output.values())


def test_after_step_is_called_once_per_optimizer_step_with_progress_up_to_one():
    method = Line()
    trainer(method, epochs=2, steps=3, accumulation=2).run()
    assert method.progress == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])


def test_accumulated_steps_equal_steps_on_the_whole_batch():
    weights = []
    for accumulation in (1, 2, 4):
        method = Line()
        # Views off: they draw from the micro-batch's own seed.
        trainer(method, accumulation=accumulation, prepare_batch=lambda batch, *_, **__: batch).run()
        weights.append(method.weight.item())
    assert weights[1:] == pytest.approx(weights[:1] * 2, rel=1e-5)


def test_schedules_move_once_per_optimizer_step_and_respect_a_groups_scale():
    method, seen = mae(), []
    optimizer = torch.optim.AdamW(parameter_groups(method), lr=1.0, weight_decay=1.0)
    rate, decay = WarmupCosine(2.0, warmup=0.5), WarmupCosine(0.4, end=0.1, warmup=0.0)
    engine = trainer(
        method, epochs=1, steps=4, accumulation=2, optimizer=optimizer, schedules={"lr": rate, "weight_decay": decay}
    )
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: seen.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
    )
    engine.run()
    for number, progress in [(1, 0.125), (3, 0.375), (5, 0.625), (7, 0.875)]:
        assert seen[number] == [(rate(progress), decay(progress)), (rate(progress), 0.0)]
    assert seen[1] == seen[2]


@pytest.mark.parametrize(("progress", "value"), [(0.0, 0.0), (0.05, 1.0), (0.1, 2.0), (0.55, 1.25), (1.0, 0.5)])
def test_warmup_is_linear_and_the_rest_a_cosine(progress, value):
    assert WarmupCosine(2.0, end=0.5, warmup=0.1)(progress) == pytest.approx(value)


def test_vectors_and_tokens_do_not_decay():
    method = mae()
    decaying, free = parameter_groups(method)
    names = {id(p): name for name, p in method.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {
        name for name, p in method.named_parameters() if name.endswith("weight") and p.ndim == 2
    }
    assert {"mask_token", "encoder.cls_token", "encoder.norm.weight"} <= {names[id(p)] for p in free["params"]}
    assert free["weight_decay"] == 0.0


def test_nothing_that_an_encoder_learns_about_places_and_tokens_decays():
    encoder = vit_tiny(
        img_size=(32, 32), depth=1, pos_embed="learn", no_embed_class=False, reg_tokens=2, init_values=0.1, k_bias=False
    )
    free = {id(p) for p in parameter_groups(encoder)[1]["params"]}
    names = {name for name, p in encoder.named_parameters() if id(p) in free}
    assert {"cls_token", "cls_pos", "reg_token", "pos_embed", "blocks.0.ls1.gamma", "blocks.0.attn.qv_bias"} <= names


def test_gradients_are_clipped_to_the_given_norm():
    method, norms = Line(scale=1e4), []
    engine = trainer(method, epochs=1, clip_norm=0.5)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: norms.append(method.weight.grad.norm().item()))
    engine.run()
    assert max(norms) <= 0.5 + 1e-6


@pytest.mark.parametrize("epochs", [0, -1, 1.5, "abc"])
def test_a_run_of_no_epochs_is_refused(epochs):
    with pytest.raises(InputError, match=r"max_epochs .* must be a whole number above 0\. Correct --max_epochs"):
        trainer(Line(), epochs=epochs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(bad):
    method = Line(scale=bad)
    with pytest.raises(NonFiniteLossError, match=r"at iteration 1.*learning_rate"):
        trainer(method).run()
    assert method.weight.item() == 0


def test_bf16_runs_under_autocast_and_keeps_weights_in_fp32():
    method, dtypes = mae(), []
    method.encoder.blocks[0].mlp.fc1.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    trainer(method, precision="bf16").run()
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in method.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "message"), [("fp16", "needs a CUDA GPU"), ("half", "Give one of")])
def test_a_precision_that_cannot_be_had_is_refused(precision, message):
    with pytest.raises(InputError, match=message):
        trainer(Line(), precision=precision)


class Breaks(Line):
    """A loss that is not finite, or gradients a hundred times as large, at some calls."""

    def __init__(self, at, factor=torch.nan):
        super().__init__()
        self.at, self.factor, self.calls = at, factor, 0

    def forward(self, batch):
        self.calls += 1
        output = super().forward(batch)
        return {**output, "loss": output["loss"] * (self.factor if self.calls in self.at else 1)}


@pytest.mark.parametrize(("factor", "spike"), [(torch.nan, None), (torch.inf, None), (1000.0, 20.0)])
def test_a_bad_step_is_left_out_counted_and_its_images_written_down(tmp_path, factor, spike):
    method = Breaks({5}, factor)
    handlers = [BadStepHandler(tmp_path / "bad.jsonl", spike), ProgressHandler(tmp_path / "log.jsonl", 1)]
    weights = []
    engine = trainer(method, accumulation=2, train_handlers=handlers, prepare_batch=lambda batch, *_, **__: batch)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda _: weights.append(method.weight.item()))
    engine.run()
    assert weights[1] == weights[2]
    assert len(set(weights)) == 5
    assert len(method.progress) == 5
    (line,) = map(json.loads, (tmp_path / "bad.jsonl").open())
    assert (line["step"], line["numbers"]) == (3, [8, 9, 10, 11])
    assert [entry.get("bad_steps") for entry in map(json.loads, (tmp_path / "log.jsonl").open())][2:] == [1] * 4


def test_gradients_that_overflow_before_the_scale_is_lowered_leave_the_usual_norm_as_it_was():
    method, weights = Line(), []
    engine = trainer(method, train_handlers=[BadStepHandler(spike=20.0)], prepare_batch=lambda batch, *_, **__: batch)
    engine.loss_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    factors = {2: torch.inf, 5: 1e4}
    method.weight.register_hook(lambda gradient: gradient * factors.get(engine.state.iteration, 1))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: weights.append(method.weight.item()))
    engine.run()
    assert weights[0] == weights[1]
    assert weights[3] == weights[4]
    assert engine.state.bad_steps == 1


def test_without_the_handler_a_bad_step_ends_the_run():
    with pytest.raises(NonFiniteLossError, match="at iteration 5"):
        trainer(Breaks({5}), accumulation=2).run()


def test_too_many_bad_steps_in_a_row_end_the_run_and_others_do_not(tmp_path):
    method = Breaks({1, 2, 4, 5, 6})
    with pytest.raises(NonFiniteLossError, match=r"3 steps in a row .* step 6, for a loss of nan\."):
        trainer(method, train_handlers=[BadStepHandler(most=3)]).run()
    trainer(Breaks({1, 2, 4, 5}), train_handlers=[BadStepHandler(most=3)]).run()


def test_a_run_resumed_between_bad_steps_counts_as_one_that_was_not_disturbed(tmp_path):
    def run(folder, until, resume):
        method = Breaks({2, 3, 4} if not resume else {1})
        handlers = [StateHandler(folder, resume=resume), BadStepHandler(folder / "bad.jsonl", spike=50.0)]
        engine = trainer(method, train_handlers=handlers)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.epoch == until and e.terminate())
        engine.run()
        return engine.state.bad_steps, engine.state.bad_in_a_row, engine.state.usual_norm, method.weight.item()

    expected = run(tmp_path / "whole", 2, False)
    run(tmp_path / "parts", 1, False)
    with (tmp_path / "parts/bad.jsonl").open("a") as file:
        file.write('{"step": 4}\n')  # of a run that was killed before it wrote a state
    assert run(tmp_path / "parts", 2, True) == expected
    logs = [(tmp_path / name / "bad.jsonl").read_text() for name in ("whole", "parts")]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [2, 3, 4]
    assert logs[0] == logs[1]
    assert expected[:2] == (3, 0)


@pytest.mark.parametrize("options", [{"spike": 1.0}, {"most": 0}])
def test_limits_of_bad_steps_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError, match="Give"):
        BadStepHandler(**options)


def states_of(folder):
    return [path.name for path in states_in(folder)]


def run_epochs(folder, epochs, total, resume, accumulation=1, events=(), loading=None):
    method = mae()
    optimizer = torch.optim.AdamW(parameter_groups(method), lr=1e-2)
    engine = trainer(
        method, total, accumulation=accumulation, optimizer=optimizer, schedules={"lr": WarmupCosine(1e-2)}, seed=7,
        train_handlers=[StateHandler(folder, resume=resume), ProgressHandler(folder / "log.jsonl", interval=1)],
        loading=loading,
    )  # fmt: skip
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.epoch == epochs and e.terminate())
    for event, handler in events:
        engine.add_event_handler(event, handler)
    engine.run()
    return method


def of_log(folder):
    return [(line["step"], line["loss"]) for line in map(json.loads, (folder / "log.jsonl").open())]


@pytest.mark.parametrize(
    ("iteration", "number", "accumulation", "stops"),
    [(1, signal.SIGTERM, 1, 1), (5, signal.SIGUSR1, 1, 5), (6, signal.SIGTERM, 1, 7), (3, signal.SIGTERM, 2, 2),
     (12, signal.SIGUSR1, 2, 7)],
)  # fmt: skip
def test_a_run_that_a_signal_stops_goes_on_bit_for_bit(tmp_path, iteration, number, accumulation, stops):
    sends = Events.ITERATION_STARTED(once=iteration), lambda _: os.kill(os.getpid(), number)
    expected = run_epochs(tmp_path / "whole", 4, 4, False, accumulation)
    before = signal.getsignal(number)
    run_epochs(tmp_path / "parts", 4, 4, False, accumulation, [sends])
    assert signal.getsignal(number) == before
    about = about_state(tmp_path / f"parts/step-{stops:08d}-stopped")
    assert (about["step"], about["epoch"]) == (stops, stops // 3)
    with pytest.raises(SystemExit, match=str(distributed.RESTART)):
        distributed.finalize()
    resumed = run_epochs(tmp_path / "parts", 4, 4, True, accumulation)
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert of_log(tmp_path / "whole") == of_log(tmp_path / "parts")
    assert states_of(tmp_path / "parts") == ["step-00000012", "step-00000009"]
    distributed.finalize()


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    sends = Events.ITERATION_STARTED(once=3), lambda _: os.kill(os.getpid(), signal.SIGTERM)
    run_epochs(tmp_path, 1, 1, False, 1, [sends])
    assert states_of(tmp_path) == ["step-00000003"]
    distributed.finalize()


def test_signals_to_every_process_of_a_job_stop_it_once(tmp_path):
    """A scheduler signals the launcher, which passes it on, the training process and the loader's workers."""

    def signals(engine):
        workers = [process.pid for process in psutil.Process().children()]
        assert len(workers) >= 2
        # By another process: torch's workers know a signal of their parent.
        subprocess.run(["/bin/kill", "-TERM", *map(str, [*workers, os.getpid()])], check=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # for workers to die of it

    expected = run_epochs(tmp_path / "whole", 2, 2, False)
    loading = {"num_workers": 2, "worker_init_fn": distributed.worker_init_fn}
    run_epochs(tmp_path / "parts", 2, 2, False, 1, [(Events.ITERATION_STARTED(once=2), signals)], loading)
    assert states_of(tmp_path / "parts") == ["step-00000002-stopped"]
    resumed = run_epochs(tmp_path / "parts", 2, 2, True)
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    distributed.finalize()


def test_a_later_signal_does_what_it_always_does(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distributed, "_ONE_REQUEST", 0.0)
    sends = Events.ITERATION_STARTED(once=2), lambda _: [os.kill(os.getpid(), signal.SIGUSR1) for _ in range(2)]
    before = signal.signal(signal.SIGUSR1, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_epochs(tmp_path, 1, 1, False, 1, [sends])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_damaged_state_of_a_stopped_run_falls_back_to_the_end_of_the_epoch_before(tmp_path, caplog):
    sends = Events.ITERATION_STARTED(once=5), lambda _: os.kill(os.getpid(), signal.SIGTERM)
    expected = run_epochs(tmp_path / "whole", 4, 4, False)
    run_epochs(tmp_path / "parts", 4, 4, False, 1, [sends])
    (stopped,) = (tmp_path / "parts").glob("*-stopped/*.safetensors")
    stopped.write_bytes(stopped.read_bytes()[:1000])
    resumed = run_epochs(tmp_path / "parts", 4, 4, True)
    assert "step-00000005-stopped is damaged" in caplog.text
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path):
    expected = run_epochs(tmp_path / "whole", 4, 4, False)
    run_epochs(tmp_path / "parts", 2, 4, False)
    resumed = run_epochs(tmp_path / "parts", 4, 4, True)
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


def cut_short(state):
    (file,) = state.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(state):
    next(state.glob("*.safetensors")).write_bytes(b"")


def without_a_file(state):
    next(state.glob("*.safetensors")).unlink()


def without_json(state):
    (state / "state.json").unlink()


def with_half_of_the_json(state):
    (state / "state.json").write_text((state / "state.json").read_text()[:100])


@pytest.mark.parametrize("spoilt", [cut_short, emptied, without_a_file, without_json, with_half_of_the_json])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, caplog, spoilt):
    run_epochs(tmp_path, 3, 4, False)
    spoilt(tmp_path / "step-00000009")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    run_epochs(tmp_path, 4, 4, True)
    assert "step-00000009 is damaged" in caplog.text
    assert states_of(tmp_path) == ["step-00000012", "step-00000009"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert len(steps) > 4
    assert steps == sorted(set(steps))


def test_a_state_of_another_network_is_refused_in_one_line(tmp_path):
    run_epochs(tmp_path, 1, 1, False)
    engine = trainer(Line(), train_handlers=[StateHandler(tmp_path, resume=True)])
    with pytest.raises(
        InputError,
        match=r"step-00000003: is the state of another configuration: method MAE instead of Line; .*seed 7 .*Resume",
    ) as caught:
        engine.run()
    assert "\n" not in str(caught.value)


def test_pixels_that_are_not_finite_end_the_run_at_the_first_step_and_are_thought_of():
    engine = trainer(mae(), prepare_batch=lambda batch, *_, **__: {"image": batch["image"][:, :, 0, :16, :16] / 0.0})
    with pytest.raises(NonFiniteLossError, match=r"at iteration 1\. .*look for images that are not finite"):
        engine.run()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_chosen_for_a_cpu_is_bf16_only_where_it_multiplies_it_itself(monkeypatch, precision):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: precision == "bf16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert fast_precision("cpu") == precision


def test_the_precision_planned_for_a_gpu_that_is_not_here_is_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_precision("cuda") == "bf16"


def test_resuming_from_an_empty_folder_starts_anew(tmp_path):
    run_epochs(tmp_path / "new", 1, 1, True)
    assert states_of(tmp_path / "new") == ["step-00000003"]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_trainer
from biovfm_monai.checkpoints import state
write = state.write_json
def slow(path, about):
    if about["epoch"] == 3:
        test_trainer.cut_short(Path(path).parent)
        print("half", flush=True)
        time.sleep(60)
    write(path, about)
state.write_json = slow
test_trainer.run_epochs(Path({folder!r}), 4, 4, False)
"""


def test_kill_9_while_a_state_is_written_leaves_the_one_before_usable(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    kill_when_it_prints("half", ["-c", code], tmp_path)
    assert states_of(tmp_path) == ["step-00000006", "step-00000003"]
    assert (tmp_path / ".step-00000009.draft").exists()
    resumed = run_epochs(tmp_path, 4, 4, True)
    expected = run_epochs(tmp_path / "whole", 4, 4, False)
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_progress_reports_loss_rate_speed_and_waiting(tmp_path):
    engine = trainer(
        Line(), epochs=1, steps=4, accumulation=2, train_handlers=[ProgressHandler(tmp_path / "log.jsonl", 2)]
    )
    engine.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [(line["step"], line["samples"]) for line in lines] == [(1, 4), (2, 8), (4, 16)]
    for line in lines:
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["learning_rate"] == 0.1
    assert engine.state.metrics["mean_loss"] == lines[-1]["loss"]


def test_resuming_with_another_batch_size_is_refused(tmp_path):
    run_epochs(tmp_path, 1, 2, False)
    method = mae()
    engine = trainer(
        method, 2, batch=8, optimizer=torch.optim.AdamW(parameter_groups(method)),
        train_handlers=[StateHandler(tmp_path, resume=True)],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"configuration: seed 7 instead of 0; batch_size 4 instead of 8\. Resume"):
        engine.run()


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    run_epochs(tmp_path, 1, 2, False)
    about = tmp_path / "step-00000003/state.json"
    found = json.loads(about.read_text())
    about.write_text(json.dumps({**found, "format": found["format"] + 1}))
    with pytest.raises(InputError, match=r"step-00000003: was written by a newer version"):
        run_epochs(tmp_path, 1, 2, True)


def test_a_state_of_the_version_before_is_refused(tmp_path):
    (tmp_path / "latest.pt").touch()
    with pytest.raises(InputError, match=r"latest\.pt: was written by an older version .* start anew"):
        run_epochs(tmp_path, 1, 2, True)


def test_resuming_with_other_accumulation_steps_keeps_its_place(tmp_path):
    run_epochs(tmp_path, 1, 2, False)
    method, steps = mae(), []
    engine = trainer(
        method, 2, accumulation=2, optimizer=torch.optim.AdamW(parameter_groups(method)), seed=7,
        train_handlers=[StateHandler(tmp_path, resume=True)],
    )  # fmt: skip
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: steps.append((e.step, e.samples_seen)))
    engine.run()
    assert steps[0] == (3, 12)
    assert steps[-1] == (6, 24)


def test_resuming_from_states_that_are_all_damaged_is_refused_and_nothing_is_lost(tmp_path):
    run_epochs(tmp_path, 2, 2, False)
    for path in states_in(tmp_path):
        cut_short(path)
    log = (tmp_path / "log.jsonl").read_text()
    for _ in range(2):  # as torchrun's agent would
        with pytest.raises(InputError, match="no state in it can be read"):
            run_epochs(tmp_path, 2, 2, True)
    assert len(states_of(tmp_path)) == 2
    assert (tmp_path / "log.jsonl").read_text() == log


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"mask_ratio": 0.5}, "method mask_ratio 0.75 instead of 0.5"),
        ({"weight_decay": 0.5}, "optimizer weight_decay 0.01 instead of 0.5"),
        ({"betas": (0.8, 0.9)}, r"optimizer betas \[0.9, 0.999\] instead of \[0.8, 0.9\]"),
        ({"views": {"scale": (0.5, 1.0)}}, r"views scale \[0.2, 1.0\] instead of \[0.5, 1.0\]"),
        ({"views": {"policy": Policy(flip=0.1)}}, "views policy flip 0.5 instead of 0.1"),
        ({"views": {"policy": {"ct": Policy()}}}, "views policy flip 0.5 instead of not set"),
        ({"kind": torch.optim.SGD}, "optimizer AdamW instead of SGD"),
        ({"lr": 1e-3}, None), ({"schedules": {"lr": WarmupCosine(1e-3)}}, None), ({"clip_norm": 1.0}, None),
        ({"precision": "bf16"}, None),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_change_what_is_learnt_are_refused_on_resuming_and_others_told(
    tmp_path, caplog, changed, difference
):
    def run(epochs, resume, mask_ratio=0.75, kind=torch.optim.AdamW, views=None, schedules=None, lr=1e-2, **options):
        method, engine = mae(mask_ratio=mask_ratio), {}
        for name in ("clip_norm", "precision"):
            if name in options:
                engine[name] = options.pop(name)
        trainer(
            method, epochs, optimizer=kind(parameter_groups(method), lr=lr, **options), **engine,
            schedules=schedules or {"lr": WarmupCosine(1e-2)},
            prepare_batch=RandomResizedCrop((16, 16), **views or {}),
            train_handlers=[StateHandler(tmp_path, resume=resume)],
        ).run()  # fmt: skip

    run(1, False)
    if difference is None:
        run(2, True, **changed)
        assert "max_epochs 1 instead of 2" in caplog.text
        assert [record.levelname for record in caplog.records if "it had" in record.message] == ["WARNING"]
    else:
        with pytest.raises(InputError, match=f"another configuration: .*{difference}"):
            run(2, True, **changed)


def test_settings_that_only_another_version_knows_do_not_count():
    found, expected = {"method": "MAE", "former": 1}, {"method": "DINOv2", "new": 2}
    assert differences(found, expected, of_one_version=False) == {"method": "method MAE instead of DINOv2"}
    assert list(differences(found, expected)) == ["method", "former", "new"]


def test_replaced_images_are_counted_over_the_whole_run(tmp_path):
    class Replaced(Numbers):
        def __getitem__(self, number):
            return {**super().__getitem__(number), "replaced": number in (1, 6, 7, 20)}

    def run(epochs, resume):
        loader = DataLoader(Replaced(), batch_sampler=GlobalBatchSampler(4, 3))
        handlers = [StateHandler(tmp_path, resume=resume), ProgressHandler(tmp_path / "log.jsonl", 1)]
        method, views = mae(), RandomResizedCrop((16, 16))
        optimizer = torch.optim.AdamW(method.parameters())
        PretrainingTrainer("cpu", epochs, loader, method, optimizer, views, train_handlers=handlers).run()

    run(1, False)
    run(2, True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["replaced_images"] for line in lines] == [1, 3, 3, 3, 3, 4]


def test_a_worker_that_is_killed_is_told_in_one_line():
    class Dies(Numbers):
        def __getitem__(self, number):
            if number == 6:
                os._exit(9)
            return super().__getitem__(number)

    loader = DataLoader(Dies(), batch_sampler=GlobalBatchSampler(4, 3), num_workers=1)
    method = mae()
    with pytest.raises(RuntimeError) as caught:
        PretrainingTrainer("cpu", 1, loader, method, torch.optim.AdamW(method.parameters())).run()
    assert re.match(r"a process that reads images died \(DataLoader worker .*\)\. If memory", reason_of(caught.value))


def test_an_old_state_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    removed = shutil.rmtree

    def busy(path, **options):
        if not options.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr("biovfm_monai.engines.resume.shutil.rmtree", busy)
    run_epochs(tmp_path, 4, 4, False)
    monkeypatch.setattr("biovfm_monai.engines.resume.shutil.rmtree", removed)
    assert len(states_of(tmp_path)) == 2
    run_epochs(tmp_path, 4, 5, True)
    assert not list(tmp_path.glob(".step*"))


def test_what_ended_a_run_is_told_though_its_last_state_cannot_be_written_either(tmp_path, caplog, monkeypatch):
    def full(*_):
        time.sleep(0.5)
        raise OSError(errno.ENOSPC, "No space left on device", "state")

    monkeypatch.setattr("biovfm_monai.engines.resume.states.write_state", full)
    method = Breaks({4})
    with pytest.raises(NonFiniteLossError, match="at iteration 4"):
        trainer(method, train_handlers=[StateHandler(tmp_path)]).run()
    assert "the last state was not written: state: No space left on device" in caplog.text


def test_starting_anew_sets_the_states_of_an_earlier_run_aside(tmp_path):
    run_epochs(tmp_path, 4, 4, False)
    run_epochs(tmp_path, 1, 4, False)
    assert states_of(tmp_path) == ["step-00000003"]
    assert about_state(tmp_path / "step-00000012.before")["epoch"] == 4


def test_the_newest_states_and_every_so_manieth_stay(tmp_path):
    trainer(Line(), 7, steps=3, train_handlers=[StateHandler(tmp_path, keep=1, keep_every=3)]).run()
    assert [step_of(path) // 3 for path in states_in(tmp_path)] == [7, 6, 3]


def test_training_goes_on_while_a_state_is_written_and_the_next_one_waits(tmp_path, monkeypatch):
    write, goes_on, expected = state.write_json, threading.Event(), []

    def held_up(path, about):
        assert goes_on.wait(60)
        write(path, about)

    monkeypatch.setattr(state, "write_json", held_up)
    engine = trainer(Line(), 2, steps=3, train_handlers=[StateHandler(tmp_path)])
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda _: goes_on.set())
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: expected.append(e.method.weight.item()))
    engine.run()
    assert states_of(tmp_path) == ["step-00000006", "step-00000003"]
    assert [read_state(path)["method.weight"].item() for path in states_in(tmp_path)] == expected[::-1]
    assert expected[0] != expected[1]


def test_a_disk_without_room_ends_the_run_at_its_next_step_in_one_line(tmp_path):
    engine = trainer(mae(), 50, steps=3, train_handlers=[StateHandler(tmp_path)])
    wanted = r"step-00000003: could not be written \(process 0: File too large\)\. Make room"
    with files_of_at_most(5000), pytest.raises(InputError, match=wanted) as caught:
        engine.run()
    assert "\n" not in str(caught.value)
    assert states_of(tmp_path) == []
    assert engine.step <= 6


@pytest.mark.parametrize("options", [{"interval": 0}, {"keep": 0}, {"keep_every": 0}])
def test_numbers_of_states_that_mean_nothing_are_refused(tmp_path, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} 0 must be"):
        StateHandler(tmp_path, **options)


def test_an_epoch_of_another_length_than_the_samplers_is_refused():
    with pytest.raises(InputError, match=r"epoch_length 3 .* 5 micro-batches"):
        trainer(Line(), steps=5, epoch_length=3)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from iter(int, 1)


def test_a_loader_without_length_needs_an_epoch_length():
    method = Line()
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    with pytest.raises(InputError, match="Give the trainer an epoch_length"):
        PretrainingTrainer("cpu", 1, torch.utils.data.DataLoader(Endless()), method, optimizer)


def test_the_picture_shows_image_mask_and_prediction_of_each_modality(tmp_path):
    images = [{"image": torch.rand(1, 1, 16, 16), "modality": name} for name in ("ct", "mri") for _ in range(3)]
    dataset, method = RandomCropDataset(images, lambda item: item, (16, 16)), mae()
    views = RandomResizedCrop((16, 16))
    engine = trainer(method, epochs=1, train_handlers=[ReconstructionHandler(method, dataset, views, tmp_path)])
    engine.run()
    sheet = np.asarray(Image.open(tmp_path / "reconstruction.png"))
    rows, side = 2, 192
    assert sheet.shape == (rows * (side + 20) + 4, 3 * (side + 4) + 4, 3)
    for row in range(rows):
        top = row * (side + 20) + 16
        image, masked, filled = (sheet[top : top + side, 4 + n * (side + 4) :][:, :side].astype(int) for n in range(3))
        assert image.std() > 40
        hidden = (masked == 128).all(-1)
        assert hidden.mean() == pytest.approx(0.75, abs=0.01)
        assert (masked[~hidden] == image[~hidden]).all()
        assert (filled[~hidden] == image[~hidden]).all()
        assert (filled[hidden] != 128).mean() > 0.9


def test_earlier_blocks_learn_more_slowly_by_the_stated_share():
    method = MAE(
        ViT(1, (16, 16), 8, embed_dim=24, depth=3, num_heads=3), decoder_embed_dim=24, decoder_depth=1,
        decoder_num_heads=3,
    )  # fmt: skip
    scales = {
        id(p): group.get("lr_scale", 1.0)
        for group in parameter_groups(method, layer_decay=0.5, lr_scales={"patch_embed": 0.2})
        for p in group["params"]
    }
    assert len(scales) == len([*method.parameters()])
    encoder = method.encoder
    expected = {
        encoder.patch_embed.weight: 0.2 * 0.5**4, encoder.cls_token: 0.5**4, encoder.blocks[0].norm1.weight: 0.5**3,
        encoder.blocks[1].mlp.fc1.weight: 0.25, encoder.blocks[2].attn.qkv.bias: 0.5, encoder.norm.weight: 1.0,
        method.decoder_pred.weight: 1.0, method.decoder_blocks[0].mlp.fc1.weight: 1.0,
    }  # fmt: skip
    assert {name: scales[id(p)] for name, p in enumerate(expected)} == dict(enumerate(expected.values()))
    free = [
        p
        for group in parameter_groups(method, layer_decay=0.5)
        if group.get("weight_decay") == 0
        for p in group["params"]
    ]
    assert {id(p) for p in free} >= {id(encoder.cls_token), id(encoder.norm.weight)}
    assert id(encoder.patch_embed.weight) not in {id(p) for p in free}


def test_a_learning_rate_for_a_part_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="no part decodr to give a learning rate"):
        parameter_groups(torch.nn.Linear(2, 2), lr_scales={"decodr": 2.0})
