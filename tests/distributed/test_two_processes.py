"""Two Gloo processes under torchrun are the same as one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import TORCHRUN, call

from biovfm_monai import distributed

SCRIPT = str(Path(__file__).with_name("two_processes.py"))
ENCODER = str(Path(__file__).with_name("spatially_adaptive.py"))

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
usage = prototype_usage(torch.randn(8, 5).softmax(1).chunk(distributed.world_size())[distributed.rank()])
found = {"rows": sorted(rows.tolist()), "usage": usage.item(), "read": sum(len(x) for x, _ in handler._batches)}
Path(sys.argv[1], f"rank{distributed.rank()}.json").write_text(json.dumps(found))
distributed.finalize()
"""
REWOUND = """
import json, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from biovfm_monai import data, distributed, engines
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
network = distributed.parallel(method, "cpu")
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
found = {"rewinds": trainer.state.rewinds, "weights": torch.cat([p.flatten() for p in method.parameters()]).tolist()}
Path(out, f"rank{distributed.rank()}.json").write_text(json.dumps(found))
distributed.finalize()
"""


def launch(processes, out, accumulation=1, epochs=2, resume="anew"):
    out.mkdir(exist_ok=True)
    launcher = [*TORCHRUN, processes] if processes > 1 else [sys.executable]
    call([*launcher, SCRIPT, out, accumulation, epochs, resume], out)
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
def test_a_run_stopped_on_one_process_goes_on_with_two(alone, tmp_path):
    begun = launch(1, tmp_path, epochs=1)[0]
    first, second = launch(2, tmp_path, resume="resume")
    assert begun["numbers"] + sorted(first["numbers"] + second["numbers"]) == list(range(80))
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    assert len(losses(tmp_path)) == 10


@pytest.mark.xdist_group("distributed")
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(alone, tmp_path):
    with pytest.raises(AssertionError, match=f"exitcode  *: {distributed.RESTART}"):
        launch(2, tmp_path, resume="signalled")
    begun = [json.loads((tmp_path / f"rank{rank}.json").read_text())["numbers"] for rank in (0, 1)]
    assert sorted([*begun[0], *begun[1]]) == list(range(7 * 8))
    goes_on = launch(1, tmp_path, resume="resume")[0]
    assert goes_on["numbers"] == list(range(7 * 8, 80))
    torch.testing.assert_close(torch.tensor(goes_on["weights"]), torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)


@pytest.mark.xdist_group("distributed")
def test_two_processes_find_the_samples_that_the_first_one_writes(tmp_path):
    printed = call([*TORCHRUN, 2, "--no-python", sys.executable, "-c", SAMPLES, tmp_path / "samples"], tmp_path)
    assert printed.count("17 items") == 2, printed
    assert not list(tmp_path.glob(".samples*"))


@pytest.fixture(scope="module")
def encoder_alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("encoder") / "alone.pt"
    call([sys.executable, ENCODER, out, "alone"], out.parent)
    return torch.load(out, weights_only=True)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_an_encoder_of_images_of_all_kinds_learns_the_same_when_wrapped(encoder_alone, tmp_path, wrapping):
    call([*TORCHRUN, 2, ENCODER, tmp_path / "wrapped.pt", wrapping], tmp_path)
    weights = torch.load(tmp_path / "wrapped.pt", weights_only=True)
    assert weights.keys() == encoder_alone.keys()
    for name, expected in encoder_alone.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def by_one_and_by_two(code, out):
    """What one process found, and each of two."""
    found = []
    for processes in (1, 2):
        folder = out / str(processes)
        folder.mkdir()
        launcher = [*TORCHRUN, processes, "--no-python"] if processes > 1 else []
        call([*launcher, sys.executable, "-c", code, folder], folder)
        found += [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return found


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
