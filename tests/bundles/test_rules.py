"""Rules that every folder under bundles/ keeps: MONAI's specification, its model zoo's, and our own."""

import importlib
import json
import re
from inspect import signature
from pathlib import Path

import jsonschema
import pytest
from conftest import BUNDLE, ROOT
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from biovfm_monai import data
from biovfm_monai.data import POLICIES
from biovfm_monai.networks import ViT

BUNDLES = sorted(p.parent for p in (ROOT / "bundles").glob("*/configs"))
PRETRAINING = [bundle for bundle in BUNDLES if bundle.name.endswith("_pretraining")]
SEGMENTATION = [bundle for bundle in BUNDLES if bundle.name.endswith("_segmentation")]
CLASSIFICATION = [bundle for bundle in BUNDLES if bundle.name.endswith("_classification")]
EMBEDDING = [bundle for bundle in BUNDLES if bundle.name.endswith("_embedding")]
TRAINED = [bundle for bundle in BUNDLES if bundle not in EMBEDDING]
CONFIGS = [path for bundle in BUNDLES for path in sorted((bundle / "configs").glob("*.json"))]
OVERLAYS = sorted((ROOT / "configs").glob("*.json"))
SCHEMA = json.loads((Path(__file__).parent / "meta_schema_20240725.json").read_text())


def walk(value, path=()):
    yield path, value
    if isinstance(value, dict):
        for key, child in value.items():
            yield from walk(child, (*path, key))
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from walk(child, (*path, number))


def name(path):
    return "/".join(path.parts[-3:])


@pytest.fixture(params=BUNDLES, ids=lambda p: p.name)
def bundle(request):
    return request.param


@pytest.fixture(params=TRAINED, ids=lambda p: p.name)
def trained(request):
    return request.param


@pytest.fixture(params=PRETRAINING, ids=lambda p: p.name)
def pretraining(request):
    return request.param


@pytest.fixture(params=SEGMENTATION, ids=lambda p: p.name)
def segmentation(request):
    return request.param


@pytest.fixture(params=CONFIGS + OVERLAYS, ids=name)
def config(request):
    return json.loads(request.param.read_text())


def test_every_bundles_name_ends_with_a_task_that_has_rules():
    assert sorted(PRETRAINING + SEGMENTATION + CLASSIFICATION + EMBEDDING) == BUNDLES


def test_a_bundle_has_every_file_that_the_model_zoo_asks_for(bundle):
    for file in ("LICENSE", "docs/README.md", "configs/logging.conf", "configs/metadata.json"):
        assert (bundle / file).is_file(), file
    verbs = {"inference.json", "evaluate.json", *(["train.json"] if bundle in TRAINED else [])}
    assert {p.name for p in (bundle / "configs").glob("*.json")} >= verbs
    assert not (bundle / "scripts").exists()


def test_metadata_satisfies_the_schema_and_its_version_has_a_changelog_entry(bundle):
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    jsonschema.validate(metadata, SCHEMA)
    assert metadata["schema"].endswith("meta_schema_20240725.json")
    assert metadata["version"] in metadata["changelog"]
    assert next(iter(metadata["network_data_format"]["inputs"])) == "image"
    assert next(iter(metadata["network_data_format"]["outputs"])) == "pred"


def test_metadata_states_the_versions_that_are_tested(bundle):
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    stated = {
        key: metadata[f"{name}_version"] for key, name in [("monai", "monai"), ("torch", "pytorch"), ("numpy", "numpy")]
    }
    stated |= {key: value for key, value in metadata["required_packages_version"].items() if key != "biovfm-monai"}
    assert stated == {key: pins[key] for key in stated}


def test_every_target_is_a_public_name(config):
    for path, value in walk(config):
        if (path and path[-1] == "_target_") or (path and str(path[-1]).endswith("#_target_")):
            module, _, attribute = value.rpartition(".")
            assert attribute in getattr(
                importlib.import_module(module), "__all__", dir(importlib.import_module(module))
            )


def test_no_macros_no_metadata_references_and_no_scripts(config):
    for path, value in walk(config):
        if isinstance(value, str):
            assert not value.startswith("%"), path
            assert "_meta_" not in value, path
            assert "scripts." not in value, path


def test_handlers_are_a_list_of_dicts_and_datasets_are_dicts_with_data(trained):
    train = json.loads((trained / "configs/train.json").read_text())["train"]
    assert all(isinstance(handler, dict) and "_target_" in handler for handler in train["handlers"])
    assert train["trainer"]["train_handlers"] == "@train::handlers"
    assert "data" in train["dataset"]
    assert train["dataset"]["transform"] == "@train::preprocessing"


def test_a_collapse_is_watched_for_and_takes_a_run_back_to_the_states_it_writes_where_that_is_asked(pretraining):
    train = json.loads((pretraining / "configs/train.json").read_text())
    handlers = train["train"]["handlers"]
    (watching,) = (handler for handler in handlers if handler["_target_"].endswith(".CollapseHandler"))
    assert (watching["on_collapse"], watching["states"]) == ("@on_collapse", "@train::handlers::0")
    assert handlers[0]["_target_"].endswith(".StateHandler")
    assert handlers.index(watching) == 4, "docs/methods.md names it by its number"


def test_outputs_lie_below_the_bundle_and_are_expressions(trained):
    train = json.loads((trained / "configs/train.json").read_text())
    for key in ("output_dir", "ckpt_dir"):
        assert train[key].startswith("$@bundle_root + '/")


def test_initialising_a_training_touches_no_file(trained):
    for expression in json.loads((trained / "configs/train.json").read_text())["initialize"]:
        assert not re.search(r"dataset_dir|datalist|output_dir|ckpt_dir|open\(", expression)


def test_overlays_change_leaves_that_every_pretraining_bundle_has():
    for overlay in OVERLAYS:
        for bundle in PRETRAINING:
            train = json.loads((bundle / "configs/train.json").read_text())
            if train["encoder"]["_target_"].endswith("SoftTokenizer") and overlay.stem != "smoke":
                continue
            for key in json.loads(overlay.read_text()):
                place = train
                if key.startswith("encoder#") and key.removeprefix("encoder#") in signature(ViT).parameters:
                    continue  # A bundle leaves to the encoder's defaults what it does not change.
                for part in key.removeprefix("+").split("#"):
                    assert part in place, f"{overlay.name}: {key} is not in {bundle.name}"
                    place = place[part]


def test_no_overlay_mirrors_what_has_a_left_and_a_right():
    assert POLICIES["xray"].flip == 0
    for overlay in OVERLAYS:
        for path, value in walk(json.loads(overlay.read_text())):
            if path and str(path[-1]).split("#")[-1] == "_target_" and value.endswith(".RandomResizedCrop"):
                view = json.loads(overlay.read_text())
                for key in path[:-1]:
                    view = view[key]
                policy = view["policy"]
                if isinstance(policy, str):
                    policies = eval(policy.removeprefix("$"), {"data": data})  # noqa: S307 - our own
                    assert policies["xray"].flip == 0, overlay.name
                else:
                    assert policy["flip"] == 0, overlay.name


def test_logging_conf_uses_only_what_monai_allows(bundle):
    text = (bundle / "configs/logging.conf").read_text()
    assert set(re.findall(r"class=(.*)", text)) == {"StreamHandler"}
    assert set(re.findall(r"args=(.*)", text)) <= {"(sys.stdout,)", "(sys.stderr,)"}


def test_mlflow_tracking_can_find_its_engine(trained):
    train = json.loads((trained / "configs/train.json").read_text())
    assert DEFAULT_MLFLOW_SETTINGS["handlers_id"]["trainer"] == {"id": "train#trainer", "handlers": "train#handlers"}
    assert train["output_dir"].startswith("$")


MAY_DIFFER = {
    "train.json": {
        "modality", "dataset_dir", "in_channels", "img_size", "crop_size", "patch_size", "encoder/_target_",
        "views/policy",
    },
    "inference.json": {"modality", "dataset_dir"},
    "evaluate.json": {"modality", "dataset_dir", "train_section", "test_section"},
    "metadata.json": {
        "name", "task", "description", "data_source", "image_classes", "references",
        "network_data_format/inputs/image/modality", "network_data_format/inputs/image/num_channels",
        "network_data_format/inputs/image/spatial_shape", "network_data_format/inputs/image/channel_def",
    },
}  # fmt: skip


# What a bundle of another method than MAE says differently, too.
METHOD = {
    "train.json": {
        "method", "views", "learning_rate", "weight_decay", "clip_norm", "optimizer/params", "optimizer/betas",
        "train/trainer/schedules",
    },
}  # fmt: skip
# What PUMIT's two stages say differently besides: they train on 2D and 3D at once, and the first trains no encoder.
STAGES = {
    "spad_tokenizer_pretraining": {
        "train.json": {"section", "batch_size", "encoder", "network_def", "train/dataset/zoom"},
        "inference.json": {
            "section", "tokenizer_path", "encoder_path", "img_size", "network_def", "preprocessing", "handlers",
        },
        "evaluate.json": {"section", "tokenizer_path", "encoder_path", "probe"},
        "metadata.json": {"intended_use", "pred_classes", "network_data_format/outputs/pred"},
    },
    "spad_mim_pretraining": {
        "train.json": {"section", "tokenizer_path", "batch_size", "train/dataset/zoom"},
        "inference.json": {"section"},
    },
}  # fmt: skip


def leaves(value, path=""):
    """Path -> value of what is no dict."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name, child in value.items() for key, leaf in leaves(child, f"{path}/{name}").items()}


def beyond(may_differ, file, first, other):
    """Keys of a file in which two bundles differ though they may not."""
    first, other = (leaves(json.loads((bundle / "configs" / file).read_text())) for bundle in (first, other))
    different = {key[1:] for key in first.keys() | other.keys() if first.get(key) != other.get(key)}
    return [key for key in different if not any(key == may or key.startswith(f"{may}/") for may in may_differ)]


@pytest.mark.parametrize("file", MAY_DIFFER)
def test_pretraining_bundles_are_equal_but_for_what_may_differ(pretraining, file):
    may_differ = MAY_DIFFER[file] | (set() if "_mae_" in pretraining.name else METHOD.get(file, set()))
    may_differ = may_differ | STAGES.get(pretraining.name, {}).get(file, set())
    assert beyond(may_differ, file, BUNDLE, pretraining) == []


def test_licence_and_logging_are_those_of_every_bundle(bundle):
    for same in ("LICENSE", "configs/logging.conf"):
        assert (bundle / same).read_bytes() == (BUNDLE / same).read_bytes()


NETWORK = {
    "modality", "dataset_dir", "in_channels", "out_channels", "img_size", "crop_size", "patch_size", "spacing",
    "presets", "spatial_dims", "label_values",
}  # fmt: skip
SEGMENTATION_MAY_DIFFER = {
    "train.json": NETWORK | {"max_epochs", "val_interval", "batch_size", "samples_per_volume", "rotations", "zooms"},
    "inference.json": NETWORK | {"output_ext"},
    "evaluate.json": NETWORK,
    "multi_gpu_train.json": set(),
    "metadata.json": {
        "name", "task", "description", "data_source", "data_type", "label_classes", "pred_classes", "references",
        "image_classes", "required_packages_version/nilearn", "network_data_format/inputs/image",
        "network_data_format/outputs/pred/num_channels", "network_data_format/outputs/pred/channel_def",
        "network_data_format/outputs/pred/spatial_shape",
    },
}  # fmt: skip


@pytest.mark.parametrize("file", SEGMENTATION_MAY_DIFFER)
def test_segmentation_bundles_are_equal_but_for_what_may_differ(segmentation, file):
    assert beyond(SEGMENTATION_MAY_DIFFER[file], file, SEGMENTATION[0], segmentation) == []


def test_the_network_that_is_trained_is_the_one_that_is_evaluated_and_used(segmentation):
    train, *others = (
        json.loads((segmentation / f"configs/{verb}.json").read_text()) for verb in ("train", "evaluate", "inference")
    )
    # Adapters are part of the training alone: weights have the names of a plain network.
    assert train["network_def"]["encoder"]["_target_"] == "biovfm_monai.networks.with_adapters"
    train["network_def"]["encoder"] = train["network_def"]["encoder"]["encoder"]
    same = (NETWORK | {"mean", "std", "flips", "encoder_path", "encoder", "network_def"}) & train.keys()
    for other in others:
        assert {key: other[key] for key in same} == {key: train[key] for key in same}
        assert other["inferer"] == train["validate"]["inferer"]
        prepare = other["preprocessing"]["transforms"]
        assert prepare == train["train"]["preprocessing"]["transforms"][: len(prepare)]


def test_metadata_names_the_classes_that_the_network_has(segmentation):
    train, metadata = (
        json.loads((segmentation / f"configs/{file}.json").read_text()) for file in ("train", "metadata")
    )
    image, found = (metadata["network_data_format"][key] for key in ("inputs", "outputs"))
    assert image["image"]["num_channels"] == train["in_channels"] == len(image["image"]["channel_def"])
    assert found["pred"]["num_channels"] == train["out_channels"]
    assert [*found["pred"]["channel_def"]] == [str(number) for number in range(train["out_channels"])]


def test_what_monai_label_overrides_is_there(segmentation):
    train = json.loads((segmentation / "configs/train.json").read_text())
    inference = json.loads((segmentation / "configs/inference.json").read_text())
    assert {"network_def", "preprocessing", "postprocessing", "inferer", "device", "dataset_dir"} <= inference.keys()
    assert {"max_epochs", "train_handlers"} <= train["train"]["trainer"].keys()
    assert isinstance(train["train"]["handlers"], list)
    assert "data" in train["validate"]["dataset"]
    (saver,) = (one for one in train["validate"]["handlers"] if one["_target_"].endswith(".CheckpointSaver"))
    assert saver["key_metric_filename"] == "model.pt"
    assert len(saver["save_dict"]) > 1, "of one object alone Ignite writes the weights without their key"


def test_a_bundle_tells_in_its_readme_the_commands_and_its_modality(bundle):
    text = (bundle / "docs/README.md").read_text()
    for verb in ("train", "inference", "evaluate") if bundle in TRAINED else ("inference", "evaluate"):
        assert f"python -m monai.bundle run --config_file configs/{verb}.json --bundle_root ." in text
    modality = json.loads((bundle / "configs/inference.json").read_text())["modality"]
    assert modality is None or f"docs/modalities/{modality}.md" in text
