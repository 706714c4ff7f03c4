"""The literal commands of the bundle, run from another directory in a folder whose path has a space."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BUNDLE, ROOT
from monai.bundle import ConfigWorkflow, ckpt_export, load, verify_metadata, verify_net_in_out
from PIL import Image
from programs import run_python, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from biovfm_monai import cli, quickstart
from biovfm_monai.checkpoints import encoder_info, load_encoder
from biovfm_monai.checkpoints.state import states_in
from biovfm_monai.errors import InputError, reason_of
from biovfm_monai.networks import Embedder, vit_small
from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle")


def monai(*arguments, cwd):
    """Run `python -m monai.bundle ...` and return the finished process."""
    # torchrun leaves a folder in TMPDIR behind.
    return run_python(["-m", "monai.bundle", *arguments], cwd, TMPDIR=str(cwd))


def training(root):
    configs = f"['{root}/configs/train.json','{ROOT}/configs/smoke.json']"
    return ["run", "--config_file", configs, "--bundle_root", root]


def train(root, *overrides, cwd):
    return monai(*training(root), *overrides, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, samples):
    """A copy of the bundle after a short training with experiment tracking."""
    folder = tmp_path_factory.mktemp("a folder with a space")
    root = copy_bundle(BUNDLE.name, folder)
    shutil.copytree(samples, root / "samples")
    sections = json.loads((root / "samples/datalist.json").read_text())
    sections |= {name: items[::5] for name, items in sections.items() if name.startswith("place")}
    (root / "samples/datalist.json").write_text(json.dumps(sections))
    done = train(root, "--tracking", "mlflow", "--steps_per_epoch", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    return root


def test_training_leaves_every_file_that_it_promises(trained):
    for file in ("models/encoder.safetensors", "models/model.pt", "eval/log.jsonl"):
        assert (trained / file).is_file(), file
    assert states_in(trained / "models/state")
    assert Image.open(trained / "eval/reconstruction.png").height > 6 * 192
    assert not list((trained / "models").rglob(".*"))


def test_the_encoder_file_says_how_it_came_about(trained):
    info = encoder_info(trained / "models/encoder.safetensors")
    assert info["training"]["method"] == "MAE"
    assert info["training"]["samples_seen"] == 24
    assert {"mean", "std"} <= set(info["preprocessing"])


def test_model_pt_holds_the_encoders_weights_and_opens_without_unpickling(trained):
    state = torch.load(trained / "models/model.pt", weights_only=True)
    encoder = load_encoder(trained / "models/encoder.safetensors")
    Embedder(encoder).load_state_dict(state["model"])
    expected = load_encoder(trained / "models/encoder.safetensors").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())


def test_tensorboard_has_the_loss_and_the_reconstruction(trained):
    events = EventAccumulator(str(trained / "eval/tensorboard")).Reload()
    assert {"mean_loss", "images_per_second"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["reconstruction"]


def test_tracking_writes_to_mlflow(trained):
    assert (trained / "eval/mlruns.db").is_file()
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{trained / 'eval/mlruns.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert run.data.metrics["train_loss"] > 0
    assert run.data.metrics["images_per_second_per_device"] > 0


@pytest.mark.parametrize("kind", ["train", "inference"])
def test_no_required_property_is_missing(trained, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workflow = ConfigWorkflow(
        str(trained / f"configs/{kind}.json"), workflow_type=kind, logging_file=False, bundle_root=str(trained)
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert list(tmp_path.iterdir()) == []


def test_inference_writes_one_vector_per_image(trained, tmp_path):
    done = monai("run", "--config_file", trained / "configs/inference.json", "--bundle_root", trained, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.reader((trained / "eval/embeddings.csv").open()))
    items = json.loads((trained / "samples/datalist.json").read_text())["training"]
    assert [row[0] for row in rows] == [str(trained / "samples" / item["image"]) for item in items]
    vectors = np.array([[float(value) for value in row[1:]] for row in rows])
    assert vectors.shape[1] == load_encoder(trained / "models/encoder.safetensors").embed_dim
    assert np.isfinite(vectors).all()


def test_evaluation_scores_the_encoder_beside_its_controls(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(trained / "configs/evaluate.json")
    workflow = ConfigWorkflow(config, workflow_type="infer", logging_file=False, bundle_root=str(trained))
    workflow.initialize()
    workflow.run()
    scores = json.loads((trained / "eval/knn.json").read_text())
    assert {"encoder", "random_init", "raw_pixels", "chance"} <= set(scores)
    assert scores["classes"] == 9


def test_monais_own_checks_pass_offline(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta, inference = trained / "configs/metadata.json", trained / "configs/inference.json"
    schema = shutil.copy(Path(__file__).parent / "meta_schema_20240725.json", tmp_path / "schema.json")
    verify_metadata(str(meta), filepath=schema)
    checked = {"meta_file": str(meta), "config_file": str(inference), "bundle_root": str(trained)}
    verify_net_in_out("network_def", **checked)
    ckpt_export(
        "network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(trained / "models/model.pt"),
        key_in_ckpt="model", use_trace=True, input_shape=[1, 3, 64, 64], **checked,
    )  # fmt: skip
    image = torch.randn(1, 3, 64, 64)
    expected = Embedder(load_encoder(trained / "models/encoder.safetensors"))(image)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), expected, rtol=1e-4, atol=1e-4)


def test_monai_bundle_load_gives_the_trained_network(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    network = load(
        trained.name, bundle_dir=str(trained.parent), workflow_type="train", source="local", key_in_ckpt="model"
    )
    expected = load_encoder(trained / "models/encoder.safetensors")
    torch.testing.assert_close(network.state_dict()["encoder.norm.weight"], expected.norm.weight.detach())


def test_two_processes_train_with_the_same_file(trained, tmp_path):
    places = ["--output_dir", tmp_path / "eval", "--ckpt_dir", tmp_path / "models"]
    torchrun(2, ["-m", "monai.bundle", *training(trained), *places], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "eval/log.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [8, 16]
    assert encoder_info(tmp_path / "models/encoder.safetensors")["training"]["samples_seen"] == 16
    assert len(list((tmp_path / "eval/tensorboard").iterdir())) == 1


def test_volumes_are_trained_on_with_three_numbers(trained, tmp_path, samples):
    volumes = tmp_path / "mri"
    volumes.mkdir()
    for path in sorted((samples / "mri").glob("*.nii.gz"))[4:6]:
        shutil.copy(path, volumes)
    done = train(
        trained, "--dataset_dir", volumes, "--in_channels", "1", "--img_size", "[8,32,32]", "--crop_size", "[8,48,48]",
        "--output_dir", tmp_path / "eval", "--ckpt_dir", tmp_path / "models", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_encoder(tmp_path / "models/encoder.safetensors").spatial_dims == 3


def test_the_overlay_of_the_published_small_model_trains(trained, tmp_path):
    sizes = {"max_epochs": 1, "steps_per_epoch": 1, "batch_size": 2, "train::handlers::4::num_images": 2}
    places = {"output_dir": str(tmp_path / "eval"), "ckpt_dir": str(tmp_path / "models")}
    run_in_process(trained, "vit_small", **sizes, **places)
    encoder = load_encoder(tmp_path / "models/encoder.safetensors")
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in vit_small().parameters())


def run_in_process(root, overlay="smoke", **overrides):
    configs = [str(root / "configs/train.json"), f"{ROOT}/configs/{overlay}.json"]
    workflow = ConfigWorkflow(configs, workflow_type="train", logging_file=False, bundle_root=str(root), **overrides)
    workflow.initialize()
    workflow.run()


def test_the_loss_falls_on_real_images(trained, tmp_path):
    places = {"output_dir": str(tmp_path / "eval"), "ckpt_dir": str(tmp_path / "models")}
    run_in_process(trained, steps_per_epoch=60, batch_size=32, **places)
    lines = [json.loads(line) for line in (tmp_path / "eval/log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    first = (tmp_path / "models/encoder.safetensors").read_bytes()
    run_in_process(trained, steps_per_epoch=1, batch_size=2, **places)
    assert (tmp_path / "models/encoder.safetensors.before").read_bytes() == first


def cause(error):
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return str(error)


def rgba(folder):
    Image.new("RGBA", (128, 128)).save(folder / "rgba.png")


def small(folder):
    Image.new("L", (128, 40)).save(folder / "small.png")


def truncated(folder):
    Image.effect_noise((128, 128), 50).save(folder / "cut.png")
    data = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])


def text(folder):
    (folder / "words.nii.gz").write_text("no image")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (rgba, ["rgba.png", "4 channels", "--in_channels"]),
        (small, ["small.png", "1 x 40 x 128", "--crop_size"]),
        (truncated, ["cut.png", "cannot be read", "Repair or remove"]),
        (text, ["words.nii.gz", "cannot be read", "Repair or remove"]),
        (lambda folder: None, ["fundus", "no image found"]),
        (lambda folder: folder.rmdir(), ["fundus", "no such folder", "--dataset_dir"]),
    ],
)
def test_an_image_or_folder_that_cannot_be_used_is_named_with_a_remedy(trained, tmp_path, make, words):
    folder = tmp_path / "fundus"
    folder.mkdir()
    make(folder)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it
        run_in_process(trained, dataset_dir=str(folder), output_dir=str(tmp_path / "e"), ckpt_dir=str(tmp_path / "m"))
    message = cause(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("crop_size", [5000, 5000], "smaller than the crop"),
        ("ckpt_dir", "a file/models", "Not a directory. Give another folder"),
        ("output_dir", "a file/eval", "Not a directory. Give another folder"),
    ],
)
def test_a_setting_that_cannot_be_met_is_told_in_one_line(trained, tmp_path, option, value, words):
    (tmp_path / "a file").touch()
    places = {"output_dir": str(tmp_path / "eval"), "ckpt_dir": str(tmp_path / "models")}
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it
        run_in_process(trained, **places | {option: str(tmp_path / value) if isinstance(value, str) else value})
    message = reason_of(caught.value)
    assert words in message
    assert "\n" not in message


def test_a_users_mistake_ends_in_one_line_and_no_traceback(trained, tmp_path):
    places = ("--output_dir", tmp_path / "eval", "--ckpt_dir", tmp_path / "models")
    done = train(trained, "--dataset_dir", tmp_path / "nowhere", *places, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "nowhere: no such folder" in last


def test_a_copy_from_an_installed_wheel_runs_without_the_repository(tmp_path, samples):
    wheels, environment = tmp_path / "wheels", tmp_path / "empty environment"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    subprocess.run(build, check=True, timeout=240, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=240)
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=240)
    # Our dependencies from this environment; its own .pth files, and with them the repository, are not followed.
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = str(environment / "bin/python")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import biovfm_monai; print(biovfm_monai.__file__)"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    copy = [python, "-m", "biovfm_monai.cli", "bundle", BUNDLE.name, "my bundles"]
    subprocess.run(copy, cwd=tmp_path, env=env, check=True, timeout=240, capture_output=True)
    root = tmp_path / "my bundles" / BUNDLE.name
    shutil.copytree(samples, root / "samples")
    configs = f"['{root}/configs/train.json','{root.parent}/configs/smoke.json']"
    command = [python, "-m", "monai.bundle", "run", "--config_file", configs, "--bundle_root", str(root)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert (root / "models/encoder.safetensors").is_file()


def biovfm(*arguments, cwd):
    return run_python(["-m", "biovfm_monai.cli", *arguments], cwd)


def command_line(monkeypatch, folder, *arguments):
    """As `biovfm ...` in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["biovfm", *map(str, arguments)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    cli.main()


def test_the_info_and_embed_commands_use_an_encoder_file(trained, tmp_path, monkeypatch, capsys):
    encoder = trained / "models/encoder.safetensors"
    command_line(monkeypatch, tmp_path, "info", encoder)
    assert json.loads(capsys.readouterr().out) == encoder_info(encoder)
    images = trained / "samples/fundus", trained / "samples/ct"
    command_line(monkeypatch, tmp_path, "embed", *images, "--encoder", encoder)
    assert capsys.readouterr().out.strip() == "embeddings.npz: ready, 3 image(s)."
    with np.load(tmp_path / "embeddings.npz") as result:
        assert [Path(file).name for file in result["files"]] == ["microaneurysms.png", "retina.jpg", "CT_small.dcm"]
        assert result["embeddings"].shape == (3, 192)
        assert np.isfinite(result["embeddings"]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("bundle", "unknown", "."),
            "there is no bundle 'unknown', but biovfm_dinov2_pretraining, biovfm_mae_pretraining",
        ),
        (("embed", "--encoder", "x"), "name at least one image"),
        (("embed", "scan.nii.gz", "--encoder", "x"), "x: no such encoder file"),
    ],
)
def test_a_mistake_on_the_command_line_says_what_to_give(tmp_path, monkeypatch, arguments, words):
    with pytest.raises(InputError, match=words):
        command_line(monkeypatch, tmp_path, *arguments)


def test_a_mistake_on_the_command_line_is_answered_in_one_line(tmp_path):
    done = biovfm("info", "nowhere.safetensors", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere.safetensors: no such encoder file" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["quickstart", "convert", "embed"])
def test_asking_a_verb_for_help_shows_it_and_does_nothing_else(tmp_path, verb):
    done = biovfm(verb, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "SYNOPSIS" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_ends_with_scores_places_and_next_commands(trained, tmp_path, monkeypatch):
    root = copy_bundle(BUNDLE.name, tmp_path / "quick start")
    shutil.copytree(trained / "samples", root / "samples")
    monkeypatch.setattr(quickstart, "is_checkout", lambda: False)
    monkeypatch.chdir(tmp_path)
    options = {"max_epochs": 1, "steps_per_epoch": 2, "batch_size": 8}
    summary = quickstart.quickstart("quick start", options)
    for word in ("pretrained encoder", "untrained encoder", "raw pixels", "images/s", "the loss fell from"):
        assert word in summary
    for place in (
        "models/encoder.safetensors",
        "models/state",
        "eval/reconstruction.png",
        "eval/tensorboard",
    ):
        assert f"{root.relative_to(tmp_path)}/{place}" in summary
        assert (root / place).exists()
