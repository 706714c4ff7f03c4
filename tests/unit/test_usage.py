"""What a run tells of itself while it goes on: rates, utilisation, memory, traces."""

import json

import pytest
import torch
from ignite.engine import Events
from test_trainer import Line, mae, trainer
from torch.profiler import record_function

from biovfm_monai import distributed
from biovfm_monai.engines import ProfileHandler, ProgressHandler, usage
from biovfm_monai.engines.cost import cost_of, imagined, outlined
from biovfm_monai.engines.profiling import _covered
from biovfm_monai.engines.usage import BatchCosts, peak_flops, peak_memory
from biovfm_monai.methods import SSLMethod

KEY = torch.arange(4)


def lines_of(folder, method, interval, **options):
    engine = trainer(method, train_handlers=[ProgressHandler(folder / "log.jsonl", interval)], **options)
    engine.run()
    return engine, [json.loads(line) for line in (folder / "log.jsonl").open()]


def test_the_log_has_rates_of_images_tokens_and_operations(tmp_path):
    method = mae()
    engine, lines = lines_of(tmp_path, method, 2, epochs=2, steps=2, accumulation=2)
    one = cost_of(imagined(method), {"image": torch.empty(2, 1, 16, 16, device="meta"), "key": KEY[:2]}, 2)
    assert [line["step"] for line in lines] == [1, 2, 4]
    for line in lines[1:]:
        rate = line["images_per_second"]
        assert line["images_per_second_per_device"] == rate
        assert line["tokens_per_second"] == line["tokens_per_second_per_device"] == pytest.approx(4 * rate)
        assert line["flops_per_second_per_device"] == pytest.approx(one.flops * rate)
        assert line["mfu"] == pytest.approx(line["flops_per_second_per_device"] / peak_flops(engine.state.device, None))
        assert 0 < line["peak_memory_gib"] < 100


def test_a_run_of_less_than_an_interval_does_not_wait_for_its_operations_to_be_counted(tmp_path):
    _, lines = lines_of(tmp_path, mae(), 50)
    assert all("images_per_second" in line and "mfu" not in line for line in lines)


class Peeking(SSLMethod):
    """A method whose work depends on what is in the images."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss": (self.weight * batch["image"][batch["image"] > 0.5]).mean()}


def test_a_method_whose_operations_cannot_be_counted_trains_all_the_same(tmp_path, caplog):
    _, lines = lines_of(tmp_path, Peeking(), 1)
    assert len(lines) == 6
    assert "operations cannot be counted" in caplog.text
    assert caplog.text.count("cannot be counted") == 1
    assert all("mfu" not in line for line in lines)


def test_batches_of_each_shape_are_counted_once_and_summed():
    method = mae()
    costs = BatchCosts(method)
    batches = [{"image": torch.randn(n, 1, 16, 16), "key": KEY[:n]} for n in (2, 4, 2)]
    for data in batches:
        method(data)
    assert costs.total(count=False) is None
    expected = [cost_of(imagined(method), outlined(data), 1) for data in batches]
    assert costs.total() == tuple(map(sum, zip(*expected, strict=True)))
    costs.reset()
    method(batches[1])
    assert costs.total(count=False) == expected[1]
    costs.close()
    assert not method._forward_pre_hooks


def test_a_method_is_left_without_hooks_when_a_run_ends():
    method = Line()
    trainer(method, train_handlers=[ProgressHandler()]).run()
    assert not method._forward_pre_hooks


def test_what_is_counted_is_sent_to_nobody_but_has_the_rows_of_all(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    x = torch.empty(2, 5, device="meta")
    assert distributed.gather(x).shape == (6, 5)
    for same in (distributed.total, distributed.most, distributed.mean):
        assert same(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12)]
)
def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak_flops.cache_clear()
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    peak_flops.cache_clear()


def test_the_peak_of_another_device_is_measured_once(monkeypatch):
    peak_flops.cache_clear()
    monkeypatch.setattr(usage, "_SIDE", {"cpu": 64, "cuda": 64})
    device = torch.device("cpu")
    assert peak_flops(device, None) == peak_flops(device, None) > 1e6
    peak_flops.cache_clear()


def test_the_most_memory_that_was_in_use_does_not_fall():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**24)
    assert held.sum() > 0
    assert peak_memory(torch.device("cpu")) >= before > 0.05


def test_a_trace_shows_the_iterations_that_it_was_asked_for(tmp_path):
    engine = trainer(mae(), train_handlers=[ProfileHandler(tmp_path / "profile", first=2, iterations=2)])
    engine.run()
    events = json.loads((tmp_path / "profile/trace_rank0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#SGD.step" for event in events) == 2
    assert engine.state.metrics["communication"] == 0


def talk():
    # The name that torch gives a collective of Gloo in a trace.
    with record_function("gloo:all_reduce"):
        torch.ones(300, 300) @ torch.ones(300, 300)


def test_a_trace_tells_the_share_of_communication(tmp_path):
    engine = trainer(mae(), train_handlers=[ProfileHandler(tmp_path, first=1, iterations=2)])
    engine.add_event_handler(Events.ITERATION_STARTED, talk)
    engine.run()
    assert 0 < engine.state.metrics["communication"] < 1


def test_a_run_that_is_too_short_for_its_trace_says_so(tmp_path, caplog):
    trainer(mae(), epochs=1, train_handlers=[ProfileHandler(tmp_path, first=3, iterations=2)]).run()
    assert "ended before the iterations that were to be traced" in caplog.text
    assert not list(tmp_path.iterdir())


def test_time_that_spans_share_counts_once():
    assert _covered([(5, 6), (0, 2), (1, 3)]) == 4
    assert _covered([]) == 0
