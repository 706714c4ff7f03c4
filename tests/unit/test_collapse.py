"""Watching for collapse: the effective rank against numpy, what is a sign and what is none; nothing is touched."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.handlers import TensorBoardStatsHandler
from monai.metrics import EmbeddingCollapseMetric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from biovfm_monai.checkpoints.state import about_state, newest_state
from biovfm_monai.data import GlobalBatchSampler, MultiCrop, RandomCropDataset, RandomResizedCrop
from biovfm_monai.engines import (
    BadStepHandler,
    CollapseHandler,
    PretrainingTrainer,
    ProgressHandler,
    StateHandler,
    WarmupCosine,
)
from biovfm_monai.engines.collapse import effective_rank
from biovfm_monai.errors import CollapseError, InputError, reason_of
from biovfm_monai.evaluation import KNNAccuracy
from biovfm_monai.methods import MAE, SSLMethod
from biovfm_monai.networks import SoftTokenizer, ViT

VIEWS = RandomResizedCrop((16, 16))
SMALL = RandomResizedCrop((8, 8))


class Regression(SSLMethod):
    """Learns each view's mean, and says what it is told to of its teacher."""

    def __init__(self, constant=False, entropy=None, falls=False, breaks=False, said=()):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = ViT(1, (16, 16), 8, embed_dim=24, depth=1, num_heads=3, drop_path_rate=0.2)
        self.head = torch.nn.Linear(24, 1)
        self.entropy, self.falls, self.breaks = entropy, falls, breaks
        self.said, self.steps, self.weight = dict(said), 0, 1.0
        torch.nn.init.normal_(self.encoder.norm.bias)
        if constant:
            self.encoder.norm.weight.requires_grad_(False).zero_()

    def after_step(self, progress):
        if self.falls and progress > 0.7:
            self.encoder.norm.weight.data.mul_(0.5)
        if self.breaks and progress > 0.7:
            self.encoder.norm.weight.data[0] = torch.nan

    def forward(self, batch):
        image = batch["image"] if "image" in batch else batch["global_crops"].flatten(0, 1)
        mean = image.flatten(1).mean(1, keepdim=True)
        loss = (self.head(self.encoder(image).mean(1)) - mean).square().mean() * self.weight
        output = {"loss": loss, "brightness": mean.mean()}
        output |= {name: torch.tensor(values[self.steps]) for name, values in self.said.items()}
        self.steps += 1
        return output if self.entropy is None else {**output, "teacher_entropy": torch.tensor(self.entropy)}


class Attraction(SSLMethod):
    """Draws all images to one point, and the faster the higher the learning rate is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = ViT(1, (16, 16), 8, embed_dim=24, depth=1, num_heads=3)

    def forward(self, batch):
        return {"loss": (self.encoder(batch["image"]).mean(1) - torch.linspace(-2, 2, 24)).square().sum(1).mean()}


class Tokenizer(SSLMethod):
    def __init__(self):
        super().__init__()
        self.encoder = SoftTokenizer(1, widths=(8, 16), strides=(4, 2), num_codes=16, norm_groups=4)

    def forward(self, batch):
        return {"loss": self.encoder.logits.weight.square().mean()}


def dataset(crop_size=(20, 20), depths=(1,)):
    generator = torch.Generator().manual_seed(0)
    items = [
        {"image": torch.rand(1, depth, 24, 24, generator=generator), "modality": "ct"} for depth in depths * 5
    ]  # fmt: skip
    return RandomCropDataset(items, lambda item: item, crop_size, batch_size=4)


def run(method, *handlers, views=VIEWS, epochs=2, images=None, **options):
    images = images or dataset()
    loader = DataLoader(images, batch_sampler=GlobalBatchSampler(4, 3))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1e-3)
    engine = PretrainingTrainer(
        "cpu", epochs, loader, method, optimizer, prepare_batch=views, train_handlers=handlers, **options
    )
    engine.run()
    return engine


def watch(views=VIEWS, **options):
    return CollapseHandler(dataset(), views, **{"num_images": 40, "warmup": 0.0, **options})


def lines_of(path):
    return [json.loads(line) for line in path.open()]


# The effective rank


def slow_rank(rows):
    values = np.sqrt(np.clip(np.linalg.eigvalsh(rows.T @ rows), 0, None))
    share = values[values > 0] / values.sum()
    return np.exp(-sum(p * np.log(p) for p in share))


@pytest.mark.parametrize(("n", "c"), [(7, 7), (30, 5), (5, 30)])
def test_the_effective_rank_is_the_formula_of_the_paper(n, c):
    rows = np.random.default_rng(0).normal(1, 1, (n, c))
    assert effective_rank(torch.tensor(rows)) == pytest.approx(slow_rank(rows), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (torch.eye(6), 6),
        (torch.eye(6).repeat(5, 1) * 3, 6),
        (torch.eye(6)[:4], 4),
        (torch.arange(1.0, 9)[:, None] * torch.tensor([1.0, -2.0, 3.0]), 1),
        (torch.zeros(4, 3), 0),
    ],
)
def test_rows_along_as_many_directions_have_that_rank(rows, rank):
    assert effective_rank(rows) == pytest.approx(rank, abs=1e-5)


def test_rounding_errors_around_one_vector_are_no_directions_which_they_are_to_monais_metric():
    torch.manual_seed(0)
    monais = EmbeddingCollapseMetric(include_indicators=["effective_rank"])
    collapsed, spread = torch.randn(64) + 1e-6 * torch.randn(256, 64), torch.randn(256, 64)
    assert effective_rank(collapsed) == pytest.approx(1, abs=0.01)
    assert monais(collapsed)["effective_rank_score"] < 0.1  # 1 is a collapse there
    # Of rows around zero both say the same.
    centred = spread - spread.mean(0)
    assert 1 - effective_rank(centred) / 64 == pytest.approx(float(monais(centred)["effective_rank_score"]), abs=1e-4)


def test_embeddings_that_are_not_finite_have_no_rank_and_leave_the_end_of_the_run_to_its_loss():
    assert np.isnan(effective_rank(torch.tensor([[1.0, torch.inf], [0.0, 1.0]])))


# Signs of collapse


def test_a_constant_encoder_is_said_once_with_what_to_try(caplog):
    engine = run(Regression(constant=True), watch(), epochs=3)
    (record,) = [record for record in caplog.records if "collapse" in record.message]
    assert record.levelno == logging.WARNING
    assert "epoch 1: the effective rank of embeddings is 1.00 of at most 24. Lower --learning_rate" in record.message
    assert engine.state.metrics["effective_rank"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("last", "sign"), [(0.04, "fell from 0.5000 to 0.0400"), (0.06, None)])
def test_prototypes_that_fall_out_of_use_are_a_sign(caplog, last, sign):
    usage = [0.1, 0.1, 0.5, 0.1, 0.1, last]
    engine = run(Regression(said={"prototype_usage": usage}), watch())
    assert engine.state.best_usage == 0.5
    found = [record.message for record in caplog.records if "collapse" in record.message]
    assert [f"share of prototypes in use {sign}" in message for message in found] == [True] * bool(sign)


def test_a_loss_that_no_gradient_comes_from_is_a_sign(caplog):
    method = Regression()
    run(method, watch(), epochs=1)
    assert "collapse" not in caplog.text
    method.weight = 0.0
    run(method, watch(), epochs=1)
    assert "no gradient reaches the weights." in caplog.text


def test_a_collapse_can_stop_the_run_with_one_line_before_its_state_is_written(tmp_path):
    handlers = StateHandler(tmp_path), watch(on_collapse="stop", warmup=0.5)
    with pytest.raises(CollapseError, match="collapse at epoch 2") as caught:
        run(Regression(constant=True), *handlers, epochs=4)
    assert reason_of(caught.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    assert about_state(newest_state(tmp_path))["epoch"] == 1


@pytest.mark.parametrize("on_collapse", ["warn", "stop", "rewind"])
def test_numbers_that_are_not_finite_never_reach_a_state(tmp_path, on_collapse):
    states = StateHandler(tmp_path)
    options = {"warmup": 0.9, "on_collapse": on_collapse, "states": states}
    with pytest.raises(CollapseError, match="collapse at epoch 3: embeddings are not finite"):
        run(Regression(breaks=True), states, watch(**options), epochs=4)
    assert about_state(newest_state(tmp_path))["epoch"] == 2


def test_a_healthy_encoder_goes_on_without_a_word(caplog):
    engine = run(Regression(entropy=0.5), watch(on_collapse="stop"), epochs=3)
    assert "collapse" not in caplog.text
    assert engine.state.metrics["effective_rank"] > 1.5


def test_a_rank_that_falls_below_a_share_of_its_best_is_a_sign(caplog):
    run(Regression(falls=True), watch(least_rank=0.0, least_of_best=0.9), epochs=3)
    assert caplog.text.count("collapse at epoch") == 1
    assert "collapse at epoch 3: the effective rank of embeddings fell from " in caplog.text


@pytest.mark.parametrize(("entropy", "remedy"), [(0.001, "Raise teacher_temp"), (0.999, "Lower teacher_temp")])
def test_a_teacher_that_shares_out_nothing_or_everything_is_a_sign(caplog, entropy, remedy):
    run(Regression(entropy=entropy), watch(), epochs=3)
    assert caplog.text.count("collapse at epoch 1: the teacher's entropy") == 1
    assert remedy in caplog.text


def test_a_tokenizer_is_left_out_and_that_is_said_once(caplog):
    caplog.set_level(logging.INFO)
    engine = run(Tokenizer(), watch())
    assert caplog.text.count("a tokenizer has no embedding") == 1
    assert "effective_rank" not in engine.state.metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_collapse": "repeat"}, r"'repeat' must be 'warn', 'stop' or 'rewind'\. Give"),
        ({"on_collapse": "rewind"}, r"'rewind' must have the StateHandler as states, and interval 1.* Give them"),
        ({"on_collapse": "rewind", "states": StateHandler("."), "interval": 2}, "interval 1"),
        ({"lr_factor": 1.0}, r"lr_factor 1\.0 must be between 0 and 1.* Give"),
        ({"num_images": 1}, "num_images 1 must be 2 or more"),
    ],
)
def test_what_cannot_be_watched_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        watch(**options)


def test_the_probe_of_a_labelled_handful_tells_an_encoder_that_sees_from_one_that_does_not(tmp_path):
    torch.manual_seed(0)
    images = [
        {"image": 0.1 * torch.randn(1, 16, 16) + torch.linspace(-1, 1, 16) * (-1) ** label, "label": label}
        for label in (0, 0, 0, 1, 1) * 4
    ]
    probe = KNNAccuracy(images, images[::2], lambda item: item, k=7)
    seeing, blind = (run(Regression(constant), watch(probe=probe), epochs=1) for constant in (False, True))
    assert seeing.state.metrics["probe"] == 1
    assert blind.state.metrics["probe"] < 0.8


# Going back


def attracted(folder, until=lambda engine: False, resume=False, schedule=True, **options):
    """Train with a learning rate that is too high; returns the trainer, and the images that each iteration saw."""
    method, seen = Attraction(), []
    loader = DataLoader(dataset(), batch_sampler=GlobalBatchSampler(4, 3))
    optimizer = torch.optim.SGD(method.parameters(), 0.005, momentum=0.9)
    states = StateHandler(folder, resume=resume)
    engine = PretrainingTrainer(
        "cpu", 6, loader, method, optimizer, prepare_batch=VIEWS,
        train_handlers=[
            states, ProgressHandler(folder / "log.jsonl", 1),
            watch(**{"on_collapse": "rewind", "states": states, "least_of_best": 0.54, **options}),
        ],
        schedules={"lr": WarmupCosine(0.005, warmup=0.0)} if schedule else None,
    )  # fmt: skip
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append((e.step, e.samples_seen)))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: until(e) and e.terminate())
    engine.run()
    return engine, seen


def weights(engine):
    return [p.tolist() for p in engine.method.parameters()]


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewound")
    return (*attracted(folder), lines_of(folder / "log.jsonl"))


def test_a_collapse_takes_a_run_back_to_the_state_before_and_on_from_there_with_lower_rates(rewound):
    engine, seen, lines = rewound
    assert [step for step, _ in seen] == [*range(1, 10), *range(7, 10), *range(7, 19)]
    assert all(samples == 4 * step for step, samples in seen)
    assert [line["step"] for line in lines] == [*range(1, 19)]
    rate = WarmupCosine(0.005, warmup=0.0)
    expected = [rate((n + 0.5) / 18) * (1 if n < 6 else 0.25) for n in range(18)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)
    assert (lines[5]["rewinds"], lines[-1]["rewinds"]) == (0, 2)
    assert "effective_rank" not in lines[6]
    assert engine.state.epoch == 6


def test_each_way_back_is_said_with_its_reason(tmp_path, caplog):
    attracted(tmp_path)
    said = [record.message for record in caplog.records if record.message.startswith("collapse")]
    assert len(said) == 2
    assert all("collapse at epoch 3: the effective rank" in message for message in said)
    assert all(message.endswith("Going back to the newest state, with learning rates times 0.5.") for message in said)


@pytest.mark.parametrize("end", [(0, 5), (0, 7), (1, 8), (2, 8), (2, 9), (2, 10)])
def test_a_run_killed_and_resumed_goes_back_as_one_that_was_not(rewound, tmp_path, end):
    attracted(tmp_path, lambda e: (e.state.rewinds, e.state.iteration) == end)
    resumed, _ = attracted(tmp_path, resume=True)
    assert weights(resumed) == weights(rewound[0])
    assert lines_of(tmp_path / "log.jsonl")[-1]["learning_rate"] == rewound[2][-1]["learning_rate"]


def test_without_a_schedule_the_learning_rate_is_lowered_too(tmp_path):
    engine, _ = attracted(tmp_path, schedule=False, least_of_best=0.4, lr_factor=0.1)
    assert engine.state.rewinds == 1
    assert [line["learning_rate"] for line in lines_of(tmp_path / "log.jsonl")][-1] == pytest.approx(0.0005)


def test_after_as_many_ways_back_as_were_asked_for_the_run_is_stopped(tmp_path, caplog):
    with pytest.raises(CollapseError, match=r"collapse at epoch 3: .*The run went back 1 time\(s\) already"):
        attracted(tmp_path, most_rewinds=1)
    assert caplog.text.count("Going back") == 1
    assert about_state(newest_state(tmp_path))["epoch"] == 2


@pytest.mark.parametrize(("epoch", "warmup"), [(1, 0.0), (6, 0.99)])
def test_without_an_epoch_that_was_found_good_there_is_no_way_back(tmp_path, epoch, warmup):
    with pytest.raises(CollapseError, match=rf"collapse at epoch {epoch}: .*There is no state to go back to"):
        attracted(tmp_path, least_rank=0.9, warmup=warmup)


# What is logged, and that nothing is touched


@pytest.mark.parametrize("first", [True, False])
def test_what_is_found_and_all_scalars_are_in_the_log_and_in_tensorboard(tmp_path, first):
    handler = watch(probe=lambda encoder: 0.25 if not encoder.training else 0.0)
    log = [
        ProgressHandler(tmp_path / "log.jsonl", 100),
        TensorBoardStatsHandler(SummaryWriter(tmp_path), iteration_log=1),
    ]
    engine = run(Regression(entropy=0.5), *([handler, *log] if first else [*log, handler]), clip_norm=1.0)
    begun, last = lines_of(tmp_path / "log.jsonl")
    assert {"loss", "brightness", "teacher_entropy", "gradient_norm"} <= set(begun)
    assert "effective_rank" not in begun
    assert last["effective_rank"] == engine.state.metrics["effective_rank"]
    assert (last["probe"], last["teacher_entropy"]) == (0.25, 0.5)
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in shown.Scalars("effective_rank")] == [1, 2]
    assert shown.Scalars("effective_rank")[-1].value == pytest.approx(last["effective_rank"])
    for name in ("brightness", "teacher_entropy", "gradient_norm"):
        assert [event.step for event in shown.Scalars(name)] == [1, 2, 3, 4, 5, 6]


def test_the_norm_of_gradients_is_that_before_they_are_clipped():
    found, expected = [], []

    class Noted(SSLMethod):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))

        def forward(self, batch):
            expected.append(2 * self.weight.detach().norm().item())
            return {"loss": self.weight.square().sum()}

    loader = DataLoader(dataset(), batch_sampler=GlobalBatchSampler(4, 3))
    method = Noted()
    engine = PretrainingTrainer(
        "cpu", 1, loader, method, torch.optim.SGD(method.parameters(), 0.1), prepare_batch=VIEWS, clip_norm=1.0
    )
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: found.append(e.state.output[0]["gradient_norm"].item())
    )
    engine.run()
    assert found == pytest.approx(expected)
    assert found[0] == pytest.approx(10)


@pytest.mark.parametrize("views", [VIEWS, MultiCrop([VIEWS, VIEWS], SMALL, 2)], ids=["one view", "views"])
def test_training_with_the_handler_is_the_same_as_without(tmp_path, views):
    ends = []
    for name, handlers in (("with", [watch(views, probe=lambda _: torch.rand(()).item())]), ("without", [])):
        method, path = Regression(), tmp_path / name
        run(method, ProgressHandler(path, 1), *handlers, views=views, epochs=3)
        ends.append(
            (
                [line["loss"] for line in lines_of(path)],
                torch.get_rng_state().tolist(),
                method.encoder.training,
                [p.tolist() for p in method.parameters()],
            )
        )
    assert ends[0] == ends[1]


def test_the_embeddings_are_those_of_the_first_crops_one_after_the_other():
    images, method = dataset(), Regression().eval()
    found = watch(MultiCrop([VIEWS]))._embed(method.encoder, torch.device("cpu"))
    for number in range(40):
        crop = images[number]["image"][None]
        tokens = method.encoder(VIEWS.apply(crop, VIEWS.still(crop)))
        torch.testing.assert_close(found[number], tokens[0, 1:].mean(0))


def test_volumes_of_several_degrees_and_2d_images_are_embedded():
    images = dataset((8, 16, 16), depths=(1, 12))
    views = RandomResizedCrop((8, 16, 16))
    encoder = ViT(1, (8, 16, 16), 8, embed_dim=24, depth=1, num_heads=3)
    method = MAE(encoder, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=3)
    handler = CollapseHandler(images, views, num_images=16)
    engine = run(method, handler, views=views, images=images)
    assert 1 < engine.state.metrics["effective_rank"] <= 16
    assert len({degree for _, degree in handler._batches}) == 2


def test_it_looks_at_the_interval_and_after_the_last_epoch():
    method, seen = Regression(), []
    run(method, watch(interval=2, probe=lambda _: seen.append(1) or float(len(seen))), epochs=5)
    assert len(seen) == 3


def test_bad_steps_in_a_row_go_back_as_a_collapse_does(tmp_path, caplog):
    states = StateHandler(tmp_path)
    handler = watch(on_collapse="rewind", states=states)
    method, calls = Regression(), []

    def weigh(engine):
        calls.append(engine.state.iteration)
        method.weight = float("nan") if len(calls) in (5, 6) else 1.0

    begins = SimpleNamespace(attach=lambda engine: engine.add_event_handler(Events.ITERATION_STARTED, weigh))
    engine = run(method, states, handler, begins, BadStepHandler(tmp_path / "bad.jsonl", most=2, watch=handler))
    assert calls == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert (engine.state.rewinds, engine.state.bad_steps) == (1, 0)
    assert engine.optimizer.param_groups[0]["lr"] == 0.5e-3
    assert "2 steps in a row were bad, the last one, step 6, for a loss of nan." in caplog.text
    assert [line["step"] for line in lines_of(tmp_path / "bad.jsonl")] == [5, 6]
