"""A real MONAI Label server, in the environment that `make label-env` builds, asked over REST (`make test-label`)."""

import io
import json
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
import torch
from monai.bundle import ConfigParser
from PIL import Image

from biovfm_monai.checkpoints import save_encoder
from biovfm_monai.data import write_brain
from biovfm_monai.evaluation.bundle import open_bundle
from biovfm_monai.label import init_app
from biovfm_monai.networks import spad_vit_tiny

ENV = Path(os.environ.get("LABEL_ENV", Path(__file__).parents[2] / ".venv-label")).resolve()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not (ENV / "bin/monailabel").exists(), reason=f"no MONAI Label in {ENV}: make label-env"),
]
SEGMENT, CLASSIFY, EMBED, PRETRAIN = (
    "brain_mri_segmentation", "medmnist_classification", "image_embedding", "mri_mae_pretraining",
)  # fmt: skip
SEGMENT_2D = "nuclei_pathology_segmentation"
WAIT = 600
SMALL = {"steps_per_epoch": 2, "batch_size": 2, "img_size": [16, 16, 16], "crop_size": [16, 16, 16]}


def save_random_weights(bundle):
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/inference.json"))
    parser["bundle_root"] = str(bundle)
    network = parser.get_parsed_content("network_def")
    (bundle / "models").mkdir(exist_ok=True)
    torch.save({"model": network.state_dict()}, bundle / "models/model.pt")


def save_random_encoder(bundle):
    (bundle / "models").mkdir()
    encoder = spad_vit_tiny(in_channels=1, img_size=(32, 32, 32), patch_size=8, depth=2)
    about = {"mean": 0.5, "std": 0.5, "spacing": None, "presets": None}
    save_encoder(encoder, bundle / "models/encoder.safetensors", preprocessing=about)


class Server:
    def __init__(self, url):
        self.url = url

    def ask(self, verb, path, **options):
        return requests.request(verb, self.url + path, timeout=WAIT, **options)

    def get(self, verb, path, **options):
        answer = self.ask(verb, path, **options)
        assert answer.status_code == 200, answer.text
        return answer

    def segment(self, image, folder):
        answer = self.get("post", f"/infer/{SEGMENT}?image={image}&output=image")
        path = folder / "answer.nii.gz"
        path.write_bytes(answer.content)
        return nib.load(path)


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    folder = Path(write_brain(tmp_path_factory.mktemp("data") / "brain"))
    items = json.loads((folder / "datalist.json").read_text())
    return [(folder / item["image"], folder / item["label"]) for part in items.values() for item in part]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    app = init_app(tmp_path_factory.mktemp("label") / "app", [SEGMENT, CLASSIFY, EMBED, PRETRAIN])
    save_random_weights(app / "model" / CLASSIFY)
    save_random_encoder(app / "model" / EMBED)
    return app


@contextmanager
def serving(app, folder, modality):
    """A server of an app for the images in a folder, until the end."""
    studies = folder / "studies"
    studies.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PATH": f"{ENV / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]), "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    }  # fmt: skip
    arguments = ["start_server", "--app", app, "--studies", studies, "--host", "127.0.0.1", "--port", port]
    command = [ENV / "bin/python", "-m", "monailabel.main", *arguments, "--conf", "modality", modality]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
    try:
        server = Server(f"http://127.0.0.1:{port}")
        wait_for(server, process, Path(log.name))
        server.studies = studies
        yield server
    finally:
        process.terminate()
        process.wait(60)
        print(Path(log.name).read_text()[-8000:])  # noqa: T201


@pytest.fixture(scope="module")
def server(app, tmp_path_factory):
    with serving(app, tmp_path_factory.mktemp("server"), "mri") as server:
        yield server


def wait_for(server, process, log):
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if requests.get(server.url + "/info/", timeout=60).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def names(server, brain):
    """Three uploaded volumes."""
    parts = [{"file": (image.name, image.read_bytes())} for image, _ in brain[:3]]
    return [server.get("put", "/datastore/", files=part).json()["image"] for part in parts]


@pytest.fixture(scope="module")
def labelled(server, brain, names):
    """The first of them, with its corrected label saved."""
    label = brain[0][1]
    part = {"label": (label.name, label.read_bytes())}
    answer = server.get("put", f"/datastore/label?image={names[0]}&tag=final", files=part)
    assert answer.json()["image"] == names[0]
    return names[0]


def test_the_server_offers_what_its_bundles_can_do(server):
    about = server.get("get", "/info/").json()
    assert set(about["models"]) == {SEGMENT, CLASSIFY, EMBED}
    assert set(about["trainers"]) == {SEGMENT, PRETRAIN}
    assert set(about["strategies"]) == {"random", "farthest_first", "uncertainty"}


@pytest.mark.parametrize(
    ("state", "told"),
    [(None, "no such file. Put the weights there, or train them"), ({"other.weight": 0}, "other.weight")],
)
def test_missing_weights_and_those_of_another_network_are_an_error(server, app, names, state, told):
    weights = app / "model" / SEGMENT / "models/model.pt"
    weights.parent.mkdir(exist_ok=True)
    weights.unlink(missing_ok=True)
    if state:
        torch.save({"model": {name: torch.zeros(3) for name in state}}, weights)
    answer = server.ask("post", f"/infer/{SEGMENT}?image={names[0]}&output=image")
    assert answer.status_code == 500
    assert told in answer.text


def test_segmentation_is_on_the_files_grid_and_better_after_training_on_a_corrected_label(
    server, app, brain, labelled, tmp_path
):
    image, true = (nib.load(path) for path in brain[0])
    true = np.asarray(true.dataobj)
    save_random_weights(app / "model" / SEGMENT)
    weights = app / "model" / SEGMENT / "models/model.pt"
    before, was = server.segment(labelled, tmp_path), weights.read_bytes()
    np.testing.assert_allclose(before.affine, image.affine, atol=1e-4)
    assert before.shape == image.shape
    first = np.asarray(before.dataobj).copy()
    assert set(np.unique(first)) <= {0, 1, 2}
    server.get("post", f"/train/{SEGMENT}?run_sync=true", json={"max_epochs": 1, "device": "cpu"})
    assert weights.read_bytes() != was
    after = np.asarray(server.segment(labelled, tmp_path).dataobj)
    assert (after != first).any()
    assert (after == true).mean() > (first == true).mean()


def test_the_next_sample_is_the_farthest_by_embedding_or_the_least_sure(server, app, names, labelled):
    answer = server.get("post", "/activelearning/farthest_first", json={})
    chosen = answer.json()
    assert chosen["weight"] > 0
    assert "embedding" not in answer.text
    with np.load(server.studies / f"biovfm_label/{EMBED}.npz") as cached:
        vectors = dict(zip(cached["names"].tolist(), cached["vectors"], strict=True))
    assert sorted(vectors) == sorted(names)
    distances = {name: np.linalg.norm(vectors[name] - vectors[labelled]) for name in names if name != labelled}
    assert chosen["id"] == max(distances, key=distances.get)
    assert server.get("post", "/activelearning/farthest_first", json={}).json()["id"] not in (labelled, chosen["id"])
    embedding = server.get("post", f"/infer/{EMBED}?image={names[1]}&output=json").json()["embedding"]
    np.testing.assert_allclose(embedding, vectors[names[1]], rtol=1e-4, atol=1e-5)

    save_random_weights(app / "model" / SEGMENT)
    unsure = server.get("post", "/activelearning/uncertainty", json={}).json()
    assert unsure["id"] in names[1:]
    assert 0 < unsure["weight"] <= 1


def test_pictures_are_segmented_on_their_own_pixels_and_trained_on(tmp_path):
    app = init_app(tmp_path / "app", [SEGMENT_2D])
    weights = app / "model" / SEGMENT_2D / "models/model.pt"
    save_random_weights(app / "model" / SEGMENT_2D)
    rng = np.random.default_rng(0)
    true = np.zeros((120, 150), np.uint8)
    true[30:90, 20:70] = 255
    with serving(app, tmp_path, "pathology") as server:
        for number in range(2):
            picture = rng.integers(150, 255, (120, 150, 3), np.uint8)
            picture[true > 0] //= 2
            image = server.get("put", "/datastore/", files={"file": (f"cells{number}.png", png(picture))}).json()[
                "image"
            ]
            part = {"label": (f"cells{number}.png", png(true))}
            server.get("put", f"/datastore/label?image={image}&tag=final", files=part)
        first = segmented(server, image)
        assert first.shape == true.shape
        was = weights.read_bytes()
        server.get("post", f"/train/{SEGMENT_2D}?run_sync=true", json={"max_epochs": 2, "device": "cpu"})
        assert weights.read_bytes() != was
        after = segmented(server, image)
        assert (after != first).any()
        (path,) = server.studies.glob(f"{image}.*")
        here = open_bundle(app / "model" / SEGMENT_2D)({"image": str(path), "modality": "pathology"})["pred"]
        # MONAI's axes of a picture are its columns and rows.
        np.testing.assert_array_equal(after, here[0].numpy().squeeze().T)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def segmented(server, image):
    answer = server.get("post", f"/infer/{SEGMENT_2D}?image={image}&output=image")
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_an_uploaded_picture_is_classified(server):
    picture = png(np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8))
    answer = server.get(
        "post", f"/infer/{CLASSIFY}?output=json", files={"file": ("cell.png", picture)},
        data={"params": json.dumps({"modality": "microscopy"})},
    )  # fmt: skip
    prediction = answer.json()["prediction"]
    assert [entry["idx"] for entry in prediction] == list(range(8))
    assert sum(entry["score"] for entry in prediction) == pytest.approx(1, abs=1e-4)
    assert prediction[0]["label"] == "basophil"


def test_pretraining_on_images_without_labels_gives_other_embeddings(server, names, labelled):
    def embedding():
        return server.get("post", f"/infer/{EMBED}?image={names[1]}&output=json").json()["embedding"]

    before = embedding()
    request = {"max_epochs": 1, "give_to": EMBED, "overrides": SMALL}
    done = server.get("post", f"/train/{PRETRAIN}?run_sync=true", json=request).json()
    assert done["images"] == len(names) - 1
    assert embedding() != before


def test_a_label_map_of_a_tilted_gantry_keeps_its_sheared_affine():
    script = """
import os, types
import nibabel, numpy, torch
from monai.data import MetaTensor
from biovfm_monai.label.infer import SegmentationInfer
affine = numpy.array([[1, 0, 0.3, 5], [0, -1.2, 0, 6], [0, 0.4, 3, 7], [0, 0, 0, 1]])
label = MetaTensor(torch.arange(210).reshape(6, 7, 5) % 3, affine=torch.tensor(affine))
task = types.SimpleNamespace(labels={"tissue": 1})
path, _ = SegmentationInfer.writer(task, {"pred": label, "image_path": "a.nii.gz"}, dtype=numpy.uint8)
written = nibabel.load(path)
numpy.testing.assert_allclose(written.affine, affine, atol=1e-6)
numpy.testing.assert_array_equal(numpy.asarray(written.dataobj), label.array)
os.remove(path)
"""
    root = str(Path(__file__).parents[2])
    subprocess.run([ENV / "bin/python", "-c", script], check=True, timeout=300, env={**os.environ, "PYTHONPATH": root})
