"""MONAI Label: the folder of an app, choosing what to label next, and what is remembered of images."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from biovfm_monai.checkpoints import save_encoder
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import open_bundle
from biovfm_monai.label import farthest_first, init_app, uncertainty
from biovfm_monai.label.folder import bundles_of
from biovfm_monai.label.opened import Opened
from biovfm_monai.label.remembered import Remembered
from biovfm_monai.networks import vit_tiny
from biovfm_monai.shipped import copy_bundle


def test_farthest_first_chooses_as_a_slow_loop_does():
    rng = np.random.default_rng(0)
    candidates, covered = rng.normal(size=(20, 5)), rng.normal(size=(4, 5))
    nearest = [min(math.dist(a, b) for b in covered) for a in candidates]
    row, distance = farthest_first(candidates, covered)
    assert row == max(range(20), key=nearest.__getitem__)
    assert distance == pytest.approx(nearest[row])


def test_with_nothing_covered_the_most_central_candidate_is_chosen():
    candidates = np.array([[0.0, 0], [10, 0], [0, 10], [3, 3]])
    means = [sum(math.dist(a, b) for b in candidates) / 4 for a in candidates]
    row, distance = farthest_first(candidates, np.empty((0, 2)))
    assert row == 3
    assert distance == pytest.approx(means[3]) == min(means)


def test_uncertainty_is_the_mean_entropy_of_a_slow_loop():
    logits = torch.randn(3, 2, 4, 5)
    entropies = []
    for z, y, x in itertools.product(range(2), range(4), range(5)):
        chances = torch.softmax(logits[:, z, y, x], 0).tolist()
        entropies.append(-sum(p * math.log(p) for p in chances) / math.log(3))
    assert uncertainty(logits) == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert uncertainty(torch.zeros(4, 3, 3)) == pytest.approx(1)
    assert uncertainty(torch.tensor([1e4, 0.0])[:, None]) == pytest.approx(0, abs=1e-6)


def test_only_new_images_and_new_weights_are_computed_again(tmp_path):
    weights, asked = tmp_path / "weights", []
    images = {name: str(tmp_path / name) for name in ("a", "b")}
    for path in (weights, *map(str, images.values())):
        (tmp_path / path).write_text("1")

    def of(names):
        asked.clear()
        compute = lambda path: asked.append(path) or np.array([len(path), 2.0])  # noqa: E731
        said = Remembered(tmp_path / "cache/said.npz", compute, weights).of({name: images[name] for name in names})
        assert {name: vector.tolist() for name, vector in said.items()} == {n: [len(images[n]), 2.0] for n in names}
        return len(asked)

    assert [of("a"), of("ab"), of("ba")] == [1, 1, 0]
    (tmp_path / "a").write_text("changed")
    assert of("ab") == 1
    weights.write_text("changed")
    assert of("ab") == 2


def write_encoder(root):
    save_encoder(vit_tiny(1, (16, 16), 8, depth=1), root / "models/encoder.safetensors", {"mean": 0.5, "std": 0.5})


def test_a_bundle_is_opened_once_and_again_when_its_weights_are_others(tmp_path):
    root = copy_bundle("image_embedding", tmp_path)
    opened = Opened(root)
    for _ in range(2):
        with pytest.raises(InputError, match="Put the weights there, or train them: POST /train/image_embedding"):
            opened.on("cpu")
    write_encoder(root)
    first = opened.on("cpu")
    assert opened.on("cpu") is first
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 16), dtype=np.uint8)).save(tmp_path / "a.png")
    item = {"image": str(tmp_path / "a.png"), "modality": "xray"}
    said = first(item)["pred"]
    assert torch.equal(opened.on("cpu")(item)["pred"], said)
    write_encoder(root)
    assert not torch.equal(opened.on("cpu")(item)["pred"], said)
    (root / "models/encoder.safetensors").write_bytes(b"no encoder")
    for _ in range(2):
        with pytest.raises(InputError, match="encoder"):
            opened.on("cpu")


def test_weights_of_another_network_are_an_error_at_every_request(tmp_path):
    root = copy_bundle("brain_mri_segmentation", tmp_path)
    opened = Opened(root)
    (root / "models").mkdir()
    torch.save({"model": {"other": torch.ones(1)}}, root / "models/model.pt")
    for _ in range(2):
        with pytest.raises(InputError, match="weights do not fit"):
            opened.on("cpu")


def test_a_bundle_that_names_no_weights_is_no_network_as_it_was_drawn(tmp_path):
    root = copy_bundle("brain_mri_segmentation", tmp_path)
    config = json.loads((root / "configs/inference.json").read_text())
    with pytest.raises(InputError, match=r"has no ckpt_path\. Give one"):
        open_bundle(root, {"ckpt_path": None})
    del config["ckpt_path"], config["encoder_path"]
    (root / "configs/inference.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no ckpt_path or encoder_path"):
        open_bundle(root)


def test_an_app_holds_the_bundles_with_the_models_of_ones_own(tmp_path):
    app = init_app(tmp_path / "app", ["brain_mri_segmentation", "mri_mae_pretraining"])
    own = app / "model/brain_mri_segmentation"
    (own / "models").mkdir()
    (own / "models/model.pt").write_bytes(b"weights")
    (own / "eval").mkdir()
    second = init_app(tmp_path / "second", [own])
    assert [path.name for path in bundles_of(app, "pretraining")] == ["mri_mae_pretraining"]
    (copy,) = bundles_of(second, "segmentation")
    assert (copy / "models/model.pt").read_bytes() == b"weights"
    assert not (copy / "eval").exists()
    compile((second / "main.py").read_text(), "main.py", "exec")


@pytest.mark.parametrize(
    ("bundles", "told"),
    [
        ([], "one or more"),
        (["brain_mri_segmentation", "x/brain_mri_segmentation"], "different"),
        (["brain"], "must end with _segmentation"),
        (["no_such_segmentation"], "there is no bundle 'no_such_segmentation'"),
        (["elsewhere/no_such_segmentation"], "has no configs/metadata.json"),
    ],
)
def test_an_app_of_bundles_that_are_none_is_refused(tmp_path, bundles, told):
    with pytest.raises(InputError, match=told):
        init_app(tmp_path / "app", bundles)


def test_a_folder_that_holds_something_is_no_place_for_an_app(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="is already there"):
        init_app(tmp_path, ["brain_mri_segmentation"])
