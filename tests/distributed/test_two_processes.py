"""Two Gloo processes under torchrun are the same as one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import all_methods
import pytest
import torch
import two_processes
from programs import run_together

from biovfm_monai import distributed
from biovfm_monai.checkpoints import load_encoder
from biovfm_monai.checkpoints.state import about_state, newest_state, read_state, state_name
from biovfm_monai.shipped import shipped_folder

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("two_processes.py"))
LOSSES = str(Path(__file__).with_name("losses_in_halves.py"))
ALL_METHODS = str(Path(__file__).with_name("all_methods.py"))

SAMPLES = """
import sys
from biovfm_monai import data, distributed
distributed.initialize()
folder = data.write_samples(sys.argv[1])
sys.stdout.write(f"{len(data.load_datalist(folder))} items\\n")  # in one piece: both processes write
distributed.finalize()
"""
WATCHED = """
import json, sys
from pathlib import Path
import torch
from biovfm_monai import data, distributed, engines
from biovfm_monai.losses.dino import prototype_usage
from biovfm_monai.networks import ViT
distributed.initialize()
torch.manual_seed(0)
encoder = ViT(1, (16, 16), 8, embed_dim=24, depth=1, num_heads=3).eval()
images = [{"image": torch.rand(1, 1, 16, 16), "modality": "ct"} for _ in range(8)]
dataset = data.RandomCropDataset(images, lambda item: item, (16, 16))
count = 9 - distributed.world_size()  # two processes round 7 up
handler = engines.CollapseHandler(dataset, data.RandomResizedCrop((16, 16)), num_images=count)
with torch.no_grad():
    rows = handler._embed(encoder, torch.device("cpu"))
usage = prototype_usage(torch.randn(8, 5).chunk(distributed.world_size())[distributed.rank()])
found = {"rows": sorted(rows.tolist()), "usage": usage.item(), "read": sum(len(x) for x, _ in handler._batches)}
Path(sys.argv[1], f"rank{distributed.rank()}.json").write_text(json.dumps(found))
distributed.finalize()
"""
SHARDED = """
import sys, torch
from biovfm_monai import distributed, parallelism
from biovfm_monai.networks import ViT
distributed.initialize()
torch.manual_seed(distributed.rank())
network = ViT(1, (16, 16), 8, embed_dim=24, depth=1, num_heads=3)
first = {name: x.clone() for name, x in network.state_dict().items()}
weights = parallelism.whole(parallelism.parallel(network, "cpu", sharding="full").module.state_dict())
same = all(torch.equal(weights[name], x) for name, x in first.items())
assert same == (distributed.rank() == 0)
distributed.finalize()
"""
REWOUND = """
import json, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from biovfm_monai import data, distributed, engines, parallelism
from biovfm_monai.errors import InputError
from biovfm_monai.methods import SSLMethod
from biovfm_monai.networks import ViT

class Attraction(SSLMethod):
    def __init__(self):
        super().__init__()
        self.encoder = ViT(1, (16, 16), 8, embed_dim=24, depth=1, num_heads=3)

    def forward(self, batch):
        return {"loss": (self.encoder(batch["image"]).mean(1) - torch.linspace(-2, 2, 24)).square().sum(1).mean()}

distributed.initialize()
torch.manual_seed(0)
images = [{"image": torch.rand(1, 1, 24, 24), "modality": "ct"} for _ in range(5)]
dataset = data.RandomCropDataset(images, lambda item: item, (20, 20))
method, views, out = Attraction(), data.RandomResizedCrop((16, 16)), sys.argv[1]
network = parallelism.parallel(method, "cpu")
states = engines.StateHandler(out + "/state")
trainer = engines.PretrainingTrainer(
    "cpu", 4, DataLoader(dataset, batch_sampler=data.GlobalBatchSampler(4, 3)), network,
    torch.optim.SGD(method.parameters(), 0.005, momentum=0.9), prepare_batch=views,
    train_handlers=[
        states, engines.ProgressHandler(out + "/log.jsonl", 1),
        engines.CollapseHandler(
            dataset, views, num_images=40, on_collapse="rewind", least_of_best=0.6, warmup=0, states=states,
            lr_factor=0.1,
        ),
    ],
)
trainer.run()
trainer.seed, refused = distributed.rank(), ""
if distributed.world_size() > 1:
    try:
        trainer.run()
    except InputError as error:
        refused = str(error)
weights = torch.cat([p.flatten() for p in method.parameters()]).tolist()
found = {"refused": refused, "rewinds": trainer.state.rewinds, "weights": weights}
Path(out, f"rank{distributed.rank()}.json").write_text(json.dumps(found))
distributed.finalize()
"""


def launch(processes, out, accumulation=1, epochs=2, resume="anew"):
    out.mkdir(exist_ok=True)
    if processes > 1:
        run_together(processes, [SCRIPT, out, accumulation, epochs, resume], out)
    else:
        two_processes.main(str(out), str(accumulation), str(epochs), resume)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return {**launch(1, out)[0], "losses": losses(out)}


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_end_with_the_weights_of_one_and_share_out_its_images(alone, tmp_path, accumulation):
    first, second = launch(2, tmp_path, accumulation)
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    assert first["weights"] == second["weights"]
    assert sorted(first["numbers"] + second["numbers"]) == alone["numbers"] == list(range(80))
    assert losses(tmp_path) == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.xdist_group("distributed")
def test_losses_of_half_of_the_rows_by_each_of_two_processes_and_their_gradients_are_those_of_all_rows(tmp_path):
    run_together(2, [LOSSES, tmp_path], tmp_path)
    for rank in (0, 1):
        gaps = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert all(gap < 1e-12 for gap in gaps.values()), gaps  # which NaN is not


@pytest.mark.xdist_group("distributed")
def test_a_run_stopped_on_one_process_goes_on_with_two(alone, tmp_path):
    begun = launch(1, tmp_path, epochs=1)[0]
    first, second = launch(2, tmp_path, resume="resume")
    assert begun["numbers"] + sorted(first["numbers"] + second["numbers"]) == list(range(80))
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    assert len(losses(tmp_path)) == 10


@pytest.mark.xdist_group("distributed")
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(alone, tmp_path):
    run_together(2, [SCRIPT, tmp_path, 1, 2, "signalled"], tmp_path, status=distributed.RESTART)
    begun = [json.loads((tmp_path / f"rank{rank}.json").read_text())["numbers"] for rank in (0, 1)]
    assert sorted([*begun[0], *begun[1]]) == list(range(7 * 8))
    goes_on = launch(1, tmp_path, resume="resume")[0]
    assert goes_on["numbers"] == list(range(7 * 8, 80))
    torch.testing.assert_close(torch.tensor(goes_on["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)


@pytest.mark.xdist_group("distributed")
def test_sharded_weights_are_those_of_the_first_process(tmp_path):
    run_together(2, ["-c", SHARDED], tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_torchrun_starts_a_killed_process_and_its_fellow_again_and_they_go_on(alone, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    subprocess.run([sys.executable, *torchrun, SCRIPT, tmp_path, "1", "2", "killed"], check=True, timeout=240)
    ends = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(ends[0]["numbers"] + ends[1]["numbers"]) == list(range(5 * 8, 80))
    torch.testing.assert_close(torch.tensor(ends[0]["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    assert losses(tmp_path) == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.slow
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_is_not(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/resume.py", "--out", tmp_path]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3000).stdout
    assert printed.count("| equal | equal |") == 12, printed
    assert "each image once, in order: True" in printed


@pytest.mark.xdist_group("distributed")
def test_the_log_tells_from_a_trace_what_share_of_the_time_two_processes_talk(tmp_path):
    launch(2, tmp_path, resume="profiled")
    # The line of the fourth step, the last one that is traced, is written before the trace is read.
    shares = [json.loads(line).get("communication") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert shares[:4] == [None] * 4
    assert all(0 < share < 1 for share in shares[4:])
    for rank in (0, 1):
        names = {
            event.get("name")
            for event in json.loads((tmp_path / f"profile/trace_rank{rank}.json").read_text())["traceEvents"]
        }
        assert "gloo:all_reduce" in names


@pytest.mark.xdist_group("distributed")
def test_two_processes_find_the_samples_that_the_first_one_writes(tmp_path):
    printed = run_together(2, ["-c", SAMPLES, tmp_path / "samples"], tmp_path)
    assert printed.count("17 items") == 2, printed
    assert not list(tmp_path.glob(".samples*"))


@pytest.fixture(scope="module")
def methods_alone(tmp_path_factory):
    """A folder of runs of one process, a name each, which are there when it is called with names."""
    out = tmp_path_factory.mktemp("methods")

    def of(names):
        missing = [name for name in names if not (out / name).exists()]
        if missing:
            all_methods.main(out, "{}", *missing)
        return out

    return of


def assert_equal_runs(alone, out, names):
    for name in names:
        expected, found = alone / name.rstrip("+"), out / name
        # Batch norm over eight images makes more of the order of sums.
        normed = name in ("BarlowTwins", "MoCoV3")
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5 if normed else 1e-6), name
        newest = [newest_state(folder / "state") for folder in (expected, found)]
        abouts = [about_state(path) for path in newest]
        assert abouts[0]["samples_seen"] == abouts[1]["samples_seen"] == 160
        assert abouts[0]["optimizer"] == abouts[1]["optimizer"]
        states = [read_state(path) for path in newest]
        for tensors in states:
            tensors.pop("method.queue", None)  # whose rows are in another order
        torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
        if name != "SPADTokenizer":
            encoders = [load_encoder(folder / "encoder.safetensors") for folder in (expected, found)]
            torch.testing.assert_close(*(encoder.state_dict() for encoder in encoders), rtol=1e-5, atol=1e-6)


@pytest.mark.xdist_group("distributed")
def test_a_network_in_parts_learns_what_a_whole_one_does(methods_alone, tmp_path):
    """Photos, thick slices and volumes in turn; a teacher in parts and a queue; a run that one process has begun."""
    names = ["all kinds", "DINOv2, queue"]
    alone = methods_alone(names)
    name = state_name(10)
    shutil.copytree(alone / "all kinds/state" / name, tmp_path / "all kinds+/state" / name)
    shutil.copy(alone / "all kinds/log.jsonl", tmp_path / "all kinds+")
    options = json.dumps({"sharding": "full", "checkpointing": "selective"})
    run_together(2, [ALL_METHODS, tmp_path, options, "DINOv2, queue", "all kinds+"], tmp_path)
    assert_equal_runs(alone, tmp_path, ["DINOv2, queue", "all kinds+"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"sharding": "full"}, {"sharding": "hybrid", "reshard": False},
     {"checkpointing": "full"}],
    ids=str,
)  # fmt: skip
def test_every_method_learns_the_same_by_one_process_and_by_two(methods_alone, tmp_path, options):
    # Which images leave out a branch is drawn by each process, as dropout always is.
    names = [*(name for name in all_methods.METHODS if "drop-path" not in name), "all kinds"]
    run_together(2, [ALL_METHODS, tmp_path, json.dumps(options), *names], tmp_path, timeout=600)
    assert_equal_runs(methods_alone(names), tmp_path, names)


@pytest.mark.slow
def test_parts_within_two_machines_and_copies_between_them_learn_what_a_whole_network_does(methods_alone, tmp_path):
    names = ["all kinds", "DINOv2, queue"]
    run_together(4, [ALL_METHODS, tmp_path, '{"sharding": "hybrid"}', *names], tmp_path, machines=2)
    assert_equal_runs(methods_alone(names), tmp_path, names)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_overlay_for_large_models_changes_what_is_learnt_by_rounding_alone(methods_alone, tmp_path, precision):
    names, overlay = ["MAE", "DINOv2, queue"], json.loads((shipped_folder("configs") / "large_model.json").read_text())
    options = json.dumps({**overlay, "precision": precision})
    run_together(2, [ALL_METHODS, tmp_path, options, *names], tmp_path, timeout=900)
    if precision == "fp32":
        assert_equal_runs(methods_alone(names), tmp_path, names)
    else:
        all_methods.main(tmp_path / "alone", '{"precision": "bf16"}', *names)
        for name in names:
            # A loss that falls by a tenth in a step makes more of where it is rounded.
            assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone" / name), rel=0.05), name


def by_one_and_by_two(code, out):
    """What one process found, this one, and each of two."""
    for folder in (out / "1", out / "2"):
        folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(out / "1")])
        exec(code, {"__name__": "alone"})  # noqa: S102 - our own
    run_together(2, ["-c", code, out / "2"], out / "2")
    files = (out / "1/rank0.json", out / "2/rank0.json", out / "2/rank1.json")
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.xdist_group("distributed")
def test_two_processes_share_out_the_images_watched_for_collapse_and_find_what_one_finds(tmp_path):
    alone, first, second = by_one_and_by_two(WATCHED, tmp_path)
    assert first == second
    assert (alone["read"], first["read"]) == (8, 4)
    torch.testing.assert_close(torch.tensor(first["rows"]), torch.tensor(alone["rows"]), rtol=1e-4, atol=1e-5)
    assert first["usage"] == pytest.approx(alone["usage"], rel=1e-5)


@pytest.mark.xdist_group("distributed")
def test_two_processes_go_back_together_from_a_collapse_as_one_does(tmp_path):
    alone, first, second = by_one_and_by_two(REWOUND, tmp_path)
    assert alone["rewinds"] == first["rewinds"] == second["rewinds"] == 1
    assert first["weights"] == second["weights"]
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    assert len(losses(tmp_path / "2")) == 12
    refused = "processes 1 have another seed than process 0. Start all with the same configuration."
    assert (first["refused"], second["refused"]) == (refused, refused)
