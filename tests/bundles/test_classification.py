"""The classification bundles and the encoder's own: training, evaluation, inference, labels of all kinds, bad input."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import load
from PIL import Image
from programs import run_python
from workflows import KINDS, refusal, run, workflow

from biovfm_monai.checkpoints import load_encoder, save_encoder
from biovfm_monai.errors import reason_of
from biovfm_monai.networks import vit_tiny
from biovfm_monai.shipped import copy_bundle

pytestmark = pytest.mark.xdist_group("bundle_classification")
MEDMNIST, CHEST, EMBEDDING = "medmnist_classification", "chest_xray_classification", "image_embedding"
NAMES = (MEDMNIST, CHEST)
FEW = {"encoder#depth": 1, "encoder#embed_dim": 32, "encoder#num_heads": 2, "device": "cpu"}
TWO = {"classes": ["dark", "bright"], "in_channels": 1, **FEW}


def read(root, verb):
    return json.loads((root / f"configs/{verb}.json").read_text())


@pytest.fixture(params=NAMES)
def bundle(request):
    return ROOT / "bundles" / request.param


def test_the_network_that_is_trained_is_the_one_that_is_evaluated_and_used(bundle):
    train, *others = (read(bundle, verb) for verb in KINDS)
    train["network_def"]["encoder"] = train["network_def"]["encoder"]["encoder"]
    same = {
        "modality", "in_channels", "img_size", "patch_size", "classes", "task", "spacing", "presets", "mean", "std",
        "encoder_path", "encoder", "network_def", "label_column", "subject_column",
    }  # fmt: skip
    for other in others:
        assert {key: other[key] for key in same} == {key: train[key] for key in same}
        assert other["postprocessing"] == train["validate"]["postprocessing"]
        prepared = other["preprocessing"]["transforms"][0]
        assert prepared == train["validate"]["preprocessing"]["transforms"][0]
        shown = train["train"]["preprocessing"]["transforms"][0]
        assert {**shown, "mean": "@mean", "std": "@std"} == prepared


def test_the_two_bundles_are_equal_but_for_what_may_differ():
    choices = {
        "modality", "in_channels", "img_size", "patch_size", "classes", "task", "label_column", "subject_column",
        "batch_size",
    }  # fmt: skip
    for verb in KINDS:
        first, other = (read(ROOT / "bundles" / name, verb) for name in NAMES)
        assert {key for key in first.keys() | other.keys() if first.get(key) != other.get(key)} <= choices


def test_metadata_names_the_classes_that_the_network_has(bundle):
    train, metadata = (read(bundle, file) for file in ("train", "metadata"))
    image, found = (metadata["network_data_format"][key] for key in ("inputs", "outputs"))
    assert image["image"]["num_channels"] == train["in_channels"] == len(image["image"]["channel_def"])
    assert found["pred"]["num_channels"] == len(train["classes"])
    assert [*found["pred"]["channel_def"].values()] == train["classes"]


def test_what_monai_label_overrides_is_there(bundle):
    train, inference = (read(bundle, verb) for verb in ("train", "inference"))
    assert {"network_def", "preprocessing", "postprocessing", "inferer", "device", "dataset_dir"} <= inference.keys()
    assert isinstance(train["train"]["handlers"], list)
    assert "data" in train["validate"]["dataset"]
    (saver,) = (one for one in train["validate"]["handlers"] if one["_target_"].endswith(".CheckpointSaver"))
    assert saver["key_metric_filename"] == "model.pt"
    assert len(saver["save_dict"]) > 1, "of one object alone Ignite writes the weights without their key"


def pixels(label, rng, size=(28, 28), several=1):
    return rng.integers(0, 100, (several, *size), dtype=np.uint8) + np.uint8(150 * label)


def write_archive(path, size=(28, 28), counts=(24, 12, 12), labels=(0, 1)):
    """Of MedMNIST's form; an image of label 1 is bright."""
    rng, arrays = np.random.default_rng(0), {}
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        truth = np.resize(labels, count)
        arrays[f"{part}_labels"] = truth[:, None].astype(np.uint8)
        arrays[f"{part}_images"] = np.concatenate([pixels(label > 0, rng, size) for label in truth])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def write_table(folder, header, rows):
    """A folder of radiographs with a table; rows of a finding are bright."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for number, (bright, *row) in enumerate(rows):
            Image.fromarray(pixels(bright, rng, (40, 36))[0]).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", *row])
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "a folder/breastmnist_28.npz")


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_set_of_medmnist_trains_and_is_told_apart_and_its_probabilities_have_the_classes_names(archive, tmp_path):
    root = copy_bundle(MEDMNIST, tmp_path / "bundles")
    run(root, "train", dataset_dir=str(archive.parent), max_epochs=6, batch_size=8, learning_rate=0.01, **TWO)
    state = torch.load(root / "models/model.pt", weights_only=True)
    assert state["model"]["head.weight"].shape == (2, 32)
    run(root, "evaluate", dataset_dir=str(archive), **TWO)
    rows = table(root / "eval/probabilities.csv")
    assert [*rows[0]] == ["image", "dark", "bright", "label"]
    assert len(rows) == 12
    assert rows[1]["image"].endswith("breastmnist_28.npz::test_images::1")
    assert all(abs(float(row["dark"]) + float(row["bright"]) - 1) < 1e-4 for row in rows)
    right = [row["label"] == max(("dark", "bright"), key=lambda name, row=row: float(row[name])) for row in rows]
    metrics = dict(line.split(",") for line in (root / "eval/metrics.csv").read_text().splitlines())
    assert float(metrics["val_accuracy"]) == pytest.approx(np.mean(right))
    assert float(metrics["val_auc"]) == 1
    run(root, "inference", dataset_dir=str(archive), **TWO)
    again = table(root / "eval/probabilities.csv")
    assert [*again[0]] == ["image", "dark", "bright"]
    assert [row["dark"] for row in again] == [row["dark"] for row in rows]


@pytest.mark.parametrize("task", ["multiclass", "ordinal"])
def test_volumes_train_too_and_so_do_grades(task, tmp_path):
    root = copy_bundle(MEDMNIST, tmp_path / "bundles")
    path = write_archive(tmp_path / "nodulemnist3d.npz", (16, 16, 16), (6, 3, 3), (0, 1, 2))
    options = {"classes": ["low", "middle", "high"], "img_size": [16, 16, 16], "patch_size": [8, 8, 8], "task": task}
    options |= {"in_channels": 1, **FEW}
    run(root, "train", dataset_dir=str(path), max_epochs=1, batch_size=3, **options)
    run(root, "evaluate", dataset_dir=str(path), **options)
    rows = table(root / "eval/probabilities.csv")
    assert [row["label"] for row in rows] == ["low", "middle", "high"]
    assert all(sum(float(row[name]) for name in options["classes"]) == pytest.approx(1, abs=1e-4) for row in rows)


def test_findings_in_a_table_train_by_patient_and_overrides_as_monai_label_makes_them_work(tmp_path):
    rows = [(n % 2, ["No Finding", "Mass|Nodule", "Mass", "Nodule"][n % 4], f"P{n}") for n in range(24)]
    folder = write_table(tmp_path / "radiographs", ["Image Index", "Finding Labels", "Patient ID"], rows)
    root = copy_bundle(CHEST, tmp_path / "bundles")
    options = {"classes": ["Mass", "Nodule"], **FEW}
    run(root, "train", dataset_dir=str(folder), max_epochs=1, **options)
    run(root, "evaluate", dataset_dir=str(folder), **options)
    assert {row["label"] for row in table(root / "eval/probabilities.csv")} == {"", "Mass|Nodule", "Mass", "Nodule"}
    items = [{"image": str(folder / f"{n}.png"), "label": rows[n][1].split("|") if n % 4 else []} for n in range(8)]
    before = torch.load(root / "models/model.pt", weights_only=True)["model"]["head.weight"]
    handlers = read(root, "train")["train"]["handlers"]
    loader = {
        "_target_": "monai.handlers.CheckpointLoader", "load_path": str(root / "models/model.pt"),
        "load_dict": {"model": "$@network"},
    }  # fmt: skip
    overrides = {
        "train#trainer#max_epochs": 1, "train#dataset#data": items, "validate#dataset#data": items,
        "train#handlers": [loader, *handlers],
    }  # fmt: skip
    run(root, "train", learning_rate=1e-9, **overrides, **options)
    after = torch.load(root / "models/model.pt", weights_only=True)["model"]["head.weight"]
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    assert not torch.equal(after, before)


def test_one_finding_alone_trains_by_a_column_of_zeros_and_ones(tmp_path):
    folder = write_table(tmp_path / "radiographs", ["image", "target"], [(n % 2, n % 2) for n in range(24)])
    root = copy_bundle(CHEST, tmp_path / "bundles")
    options = {"dataset_dir": str(folder), "classes": ["pneumonia"], "label_column": "target", **FEW}
    run(root, "train", max_epochs=1, **options)
    run(root, "evaluate", **options)
    rows = table(root / "eval/probabilities.csv")
    assert {row["label"] for row in rows} == {"", "pneumonia"}
    right = [(float(row["pneumonia"]) > 0.5) == (row["label"] == "pneumonia") for row in rows]
    found = dict(line.split(",") for line in (root / "eval/metrics.csv").read_text().splitlines())
    assert float(found["val_accuracy"]) == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("verb", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_property_is_missing_before_there_are_weights(name, verb, archive, tmp_path, monkeypatch):
    root = copy_bundle(name, tmp_path / "bundles")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = {"dataset_dir": str(archive), "task": "multiclass", "modality": "ultrasound", **TWO}
    assert workflow(root, verb, **options).check_properties() == []
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("verb", ["evaluate", "inference"])
@pytest.mark.parametrize(
    ("state", "words"),
    [(None, "no such file. Train first"), ({"other": torch.ones(1)}, "weights do not fit the network")],
)
def test_weights_that_are_missing_or_of_another_network_are_an_error_and_no_random_network(
    verb, state, words, archive, tmp_path
):
    root = copy_bundle(MEDMNIST, tmp_path)
    if state is not None:
        (root / "models").mkdir()
        torch.save({"model": state}, root / "models/model.pt")
    assert words in refusal(root, verb, dataset_dir=str(archive), **TWO)


def test_monai_bundle_load_gives_the_trained_network(tmp_path, monkeypatch):
    root = copy_bundle(CHEST, tmp_path)
    made = workflow(root, "train").parser.get_parsed_content("network_def")
    (root / "models").mkdir()
    torch.save({"model": made.state_dict()}, root / "models/model.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for kind in ("train", "inference"):
        network = load(CHEST, bundle_dir=str(tmp_path), workflow_type=kind, source="local", key_in_ckpt="model")
        assert all(torch.equal(value, made.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_pretrained_encoder_is_what_training_begins_with_and_stays_so_while_frozen(archive, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(vit_tiny(1, (16, 16), 4, depth=2, embed_dim=48, num_heads=3), path, {"mean": 0.5, "std": 0.5})
    root = copy_bundle(MEDMNIST, tmp_path)
    options = {"dataset_dir": str(archive), "encoder_path": str(path), "max_epochs": 1, "fraction": 0.5, **TWO}
    run(root, "train", frozen_epochs=1, **options)
    state = torch.load(root / "models/model.pt", weights_only=True)["model"]
    encoder = load_encoder(path).state_dict()
    assert all(torch.equal(state[f"encoder.{name}"], value) for name, value in encoder.items())
    made = run(root, "train", **options)
    rates = {group.get("lr_scale", 1.0) for group in made.parser.get_parsed_content("optimizer").param_groups}
    assert rates >= {1.0, 0.75, 0.75**2}
    state = torch.load(root / "models/model.pt", weights_only=True)["model"]
    assert any(not torch.equal(state[f"encoder.{name}"], value) for name, value in encoder.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": (0, 1, 2)}, "labels 2 (such as of"),
        ({"labels": (1,)}, "'training' is of class dark"),
        ({"counts": (24, 1, 12)}, "'validation' is of class bright"),
    ],
)
def test_classes_that_are_missing_or_unknown_are_named(options, words, tmp_path):
    path = write_archive(tmp_path / "breastmnist.npz", **options)
    root = copy_bundle(MEDMNIST, tmp_path)
    assert words in refusal(root, "train", dataset_dir=str(path), **TWO)


def test_a_section_without_images_is_named(archive, tmp_path):
    root = copy_bundle(MEDMNIST, tmp_path)
    made = workflow(root, "evaluate", dataset_dir=str(archive), section="tset", **TWO)
    with pytest.raises(RuntimeError) as caught:
        made.parser.get_parsed_content("dataset")
    assert "has no images for 'tset', but training, validation, test" in reason_of(caught.value)


def test_images_of_other_channels_are_named(tmp_path):
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name in ("dark", "bright"):
        (folder / name).mkdir(parents=True)
        for n in range(5):
            Image.fromarray(rng.integers(0, 200, (9, 9, 4), dtype=np.uint8), "RGBA").save(folder / name / f"{n}.png")
    root = copy_bundle(MEDMNIST, tmp_path)
    message = refusal(root, "train", dataset_dir=str(folder), modality="microscopy", **TWO)
    assert ".png: has 4 channels, the encoder takes 1" in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"classes": ["one"]}, "must be 2 or more different names"),
        ({"task": "regression"}, "task 'regression' is unknown"),
        ({"dataset_dir": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_choices_that_mean_nothing_are_named(given, words, archive, tmp_path):
    root = copy_bundle(MEDMNIST, tmp_path)
    assert words in refusal(root, "train", **{"dataset_dir": str(archive), **TWO, **given})


def test_the_readmes_own_command_says_what_to_put_where(tmp_path):
    root = copy_bundle(CHEST, tmp_path)
    text = (root / "docs/README.md").read_text().splitlines()
    command = next(line.split()[1:] for line in text if "configs/train.json" in line)
    places = {"configs/train.json": f"{root}/configs/train.json", ".": str(root)}
    done = run_python([places.get(word, word) for word in command], tmp_path)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{Path(root) / 'data'}: no such folder" in line
    assert "--dataset_dir" in line


def test_the_embedding_bundle_writes_a_vector_per_image(tmp_path):
    root = copy_bundle(EMBEDDING, tmp_path)
    save_encoder(vit_tiny(1, (16, 16), 8, depth=1), root / "models/encoder.safetensors", {"mean": 0.5, "std": 0.5})
    rng = np.random.default_rng(0)
    (tmp_path / "xray").mkdir()
    for n in range(2):
        Image.fromarray(rng.integers(0, 255, (20, 16), dtype=np.uint8)).save(tmp_path / f"xray/{n}.png")
    made = workflow(root, "inference", dataset_dir=str(tmp_path / "xray"))
    assert made.check_properties() == []
    made.run()
    rows = [line.split(",") for line in (root / "eval/embeddings.csv").read_text().splitlines()]
    assert [Path(row[0]).name for row in rows] == ["0.png", "1.png"]
    assert all(len(row) == 1 + 192 for row in rows)
    (root / "models/encoder.safetensors").unlink()
    assert "no such encoder file" in refusal(root, "inference", dataset_dir=str(tmp_path / "xray"))
