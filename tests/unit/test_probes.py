"""Probes on frozen features against scikit-learn and training one by one; benchmarks and what they refuse."""

import contextlib
import hashlib
import json

import numpy as np
import pytest
import torch
from monai.data import Dataset
from PIL import Image
from programs import started
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from biovfm_monai import cli
from biovfm_monai.checkpoints import save_encoder
from biovfm_monai.data.datalist import write_datalist
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import KNNProbe, Probe, RawPixels, features, knn_accuracy, probe_features
from biovfm_monai.evaluation.attentive import attentive_probe, train_attentive
from biovfm_monai.evaluation.benchmarks import Benchmark, dataset, medmnist
from biovfm_monai.evaluation.embed import embed
from biovfm_monai.evaluation.features import PooledFeatures, Tokens, cached_features, describe_items
from biovfm_monai.evaluation.knn import knn_votes
from biovfm_monai.evaluation.linear import few_shot, linear_probe, logistic_probe, train_linear
from biovfm_monai.evaluation.metrics import TASKS, auc, bootstrap_means
from biovfm_monai.evaluation.report.scores import scores_of_json
from biovfm_monai.evaluation.retrieval import rank_scores, retrieval_probe
from biovfm_monai.networks import Embedder, ViT


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(ViT(1, (28, 28), 7, embed_dim=24, depth=2, num_heads=2), path, {"mean": 0.5, "std": 0.25})
    return path


def archive(folder, rng, name="bloodmnist_28.npz", classes=8, sizes=(64, 32, 40), labels=None):
    """An archive of MedMNIST's form, whose classes differ in brightness."""
    arrays = {}
    for part, count in zip(("train", "val", "test"), sizes, strict=True):
        label = np.arange(count)[:, None] % classes if labels is None else labels(count)
        grey = label[:, :1, None] * 20 + rng.integers(0, 60, (count, 28, 28))
        arrays |= {f"{part}_images": grey.astype(np.uint8), f"{part}_labels": label}
    np.savez(folder / name, **arrays)
    return folder / name


def blobs(rng, count, width=6, classes=3, apart=1.0):
    labels = np.arange(count) % classes
    centers = np.random.default_rng(7).standard_normal((classes, width))
    return apart * centers[labels] + rng.standard_normal((count, width)), labels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_votes_of_several_k_are_scikit_learns(dtype, rng):
    (train, labels), (test, truth) = blobs(rng, 300), blobs(rng, 90)
    train, test = (x.astype(dtype) for x in (train, test))
    votes = knn_votes(train, np.eye(3)[labels], test, [1, 7, 20])
    for k, found in votes.items():
        weigh = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        model = make_pipeline(StandardScaler(), Normalizer(), weigh).fit(train.astype(float), labels)
        assert found == pytest.approx(model.predict_proba(test.astype(float)), abs=1e-6)
        names = np.array(["b", "a", "c"])
        accuracy = knn_accuracy(train, names[labels], test, names[truth], k)
        assert accuracy == pytest.approx(model.score(test.astype(float), truth), abs=1e-9)


def test_votes_do_not_depend_on_the_blocks_that_bound_the_memory(rng, monkeypatch):
    train, labels = blobs(rng, 200)
    test = blobs(rng, 90)[0]
    whole = knn_votes(train, np.eye(3)[labels], test, [5])[5]
    monkeypatch.setattr("biovfm_monai.evaluation.knn._BLOCK", 7)
    assert knn_votes(train, np.eye(3)[labels], test, [5])[5] == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("several", [False, True])
def test_rates_and_poolings_trained_at_once_are_those_trained_one_by_one(several, rng):
    features = [torch.from_numpy(rng.standard_normal((50, width))).float() for width in (5, 9)]
    labels = torch.from_numpy(rng.integers(0, 2, (50, 3))).float() if several else torch.arange(50) % 3
    rates = [1e-2, 0.3]
    found = train_linear(features, labels, 3, rates, epochs=4, batch_size=16, seed=5)
    loss_of = torch.nn.BCEWithLogitsLoss() if several else torch.nn.CrossEntropyLoss()
    for x, (weights, biases) in zip(features, found, strict=True):
        for rate, weight, bias in zip(rates, weights, biases, strict=True):
            model = torch.nn.Linear(x.shape[1], 3)
            torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
            order = torch.Generator().manual_seed(5)
            for _ in range(4):
                for rows in torch.randperm(50, generator=order).split(16):
                    optimizer.zero_grad()
                    loss_of(model(x[rows]), labels[rows]).backward()
                    optimizer.step(), schedule.step()
            assert torch.allclose(weight.T, model.weight, atol=1e-6)
            assert torch.allclose(bias[0], model.bias, atol=1e-6)


def test_a_linear_probe_trained_to_the_end_is_scikit_learns_logistic_regression(rng):
    x, labels = blobs(rng, 60, width=2, apart=0.5)
    weight, bias = train_linear([torch.from_numpy(x).float()], torch.from_numpy(labels), 3, [1.0], 1500, 60)[0]
    likely = (torch.from_numpy(x).float() @ weight[0] + bias[0]).softmax(1)
    expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(x, labels).predict_proba(x)
    assert likely.numpy() == pytest.approx(expected, abs=1e-5)


def test_the_pooling_and_the_rate_are_chosen_on_the_validation_part_alone(rng):
    labels = [np.arange(n) % 3 for n in (120, 90, 90)]
    noise = [rng.standard_normal((len(of), 4)) for of in labels]
    good = [np.eye(3)[of] + 0.5 * rng.standard_normal((len(of), 3)) for of in labels]
    # What tells classes apart in the validation part does not in the test part, and must be taken all the same.
    trap = [good[0], np.eye(3)[labels[1]] * 9, rng.standard_normal((90, 3))]
    best = linear_probe({"noise": noise, "good": good}, labels, 3, TASKS[0], epochs=8)
    assert best.settings["pooling"] == "good"
    assert auc(labels[2], best.likely, TASKS[0]) > 0.8
    fooled = linear_probe({"good": good, "trap": trap}, labels, 3, TASKS[0], epochs=8)
    assert fooled.settings["pooling"] == "trap"
    assert logistic_probe({"noise": noise, "good": good}, labels, TASKS[0]).settings["pooling"] == "good"


@pytest.mark.parametrize("cells", [2**20, 300 * 7, 1])
def test_average_precision_of_each_query_is_scikit_learns_whatever_the_blocks(cells, rng, monkeypatch):
    monkeypatch.setattr("biovfm_monai.evaluation.retrieval._CELLS", cells)
    (train, labels), (test, truth) = blobs(rng, 300), blobs(rng, 20)
    found = rank_scores(train, labels, test, truth)
    scale = StandardScaler().fit(train)
    similarity = cosine_similarity(scale.transform(test), scale.transform(train))
    for query, likeness in enumerate(similarity):
        relevant = labels == truth[query]
        assert found["mean_average_precision"][query] == pytest.approx(
            average_precision_score(relevant, likeness), 1e-9
        )
        nearest = relevant[np.argsort(-likeness)]
        for at in (1, 5, 10):
            assert found[f"precision_at_{at}"][query] == nearest[:at].mean()


def test_retrieval_takes_the_pooling_of_the_validation_part_and_its_interval_is_over_patients(rng):
    labels = [np.arange(n) % 3 for n in (60, 30, 30)]
    good = [np.eye(3)[of] + 0.5 * rng.standard_normal((len(of), 3)) for of in labels]
    noise = [rng.standard_normal((len(of), 4)) for of in labels]
    best = probe_features({"noise": noise, "good": good}, labels, 3, TASKS[0], ["retrieval"])["retrieval"]
    alone = best.scored(labels[2], TASKS[0])
    assert alone["settings"] == {"pooling": "good"}
    assert alone["mean_average_precision"] > 0.6
    low, high = alone["intervals"]["mean_average_precision"]
    assert low < alone["mean_average_precision"] < high
    together = best.scored(labels[2], TASKS[0], subjects=["a patient"] * 30)["intervals"]
    assert np.isnan(together["precision_at_5"]).all()
    patients = bootstrap_means({"x": np.repeat([0.0, 1.0], 500)}, np.repeat(["a", "b"], 500))["x"]
    assert patients == [0, 1]


def test_retrieval_of_findings_or_few_images_and_an_attentive_probe_of_features_are_refused(rng):
    labels = [np.arange(n) % 2 for n in (9, 4, 4)]
    features = {"mean": [rng.standard_normal((len(of), 3)) for of in labels]}
    with pytest.raises(InputError, match="at least 10 training images, got 9"):
        retrieval_probe(features, labels, TASKS[1])
    with pytest.raises(InputError, match="the attentive probe takes tokens"):
        probe_features(features, labels, 2, TASKS[1], ["attentive"])
    findings = [np.stack([of, 1 - of], 1) for of in labels]
    with pytest.raises(InputError, match="retrieval needs one class per image"):
        probe_features(features, findings, 2, TASKS[3], ["retrieval"])


def hidden_in_one_token(rng, count, tokens=16, width=12, classes=3):
    """Tokens of noise, one of which, at a random place, tells the class and that it does."""
    labels = np.arange(count) % classes
    found = rng.standard_normal((count, tokens, width))
    place = rng.integers(tokens, size=count)
    found[np.arange(count), place, :classes] = 4 * np.eye(classes)[labels]
    found[np.arange(count), place, classes] = 6
    return found.astype(np.float16), labels


def test_an_attentive_probe_finds_the_one_token_that_tells_the_class_which_a_mean_hides(rng):
    tokens, labels = zip(*(hidden_in_one_token(rng, count) for count in (300, 150, 150)), strict=True)
    found = attentive_probe(tokens, labels, 3, TASKS[0], num_heads=2)
    means = {"mean": [of.astype(np.float32).mean(1) for of in tokens]}
    mean = linear_probe(means, labels, 3, TASKS[0])
    assert auc(labels[2], mean.likely, TASKS[0]) < 0.85
    assert auc(labels[2], found.likely, TASKS[0]) > 0.97
    again = attentive_probe(tokens, labels, 3, TASKS[0], num_heads=2)
    assert np.array_equal(again.likely, found.likely)
    assert again.settings == found.settings
    other = attentive_probe(tokens, labels, 3, TASKS[0], num_heads=2, seed=1)
    assert not np.array_equal(other.likely, found.likely)


def test_a_rate_at_which_an_attentive_probe_diverges_is_not_chosen(rng):
    labels = [np.arange(n) % 2 for n in (40, 20, 20)]
    tokens = [rng.standard_normal((len(of), 3, 8)).astype(np.float16) for of in labels]
    assert attentive_probe(tokens, labels, 2, TASKS[1], 2, (float("inf"), 1e-3), 1).settings == {"rate": 1e-3}
    with pytest.raises(InputError, match="diverged at all rates"):
        attentive_probe(tokens, labels, 2, TASKS[1], 2, (float("inf"),), 1)


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, r'a\.png: has no "label"'), ([0, 1], r"a\.png: has findings, and this probe needs one")],
)
def test_neighbours_of_images_without_one_class_are_refused(encoder_file, label, message):
    with pytest.raises(InputError, match=message):
        KNNProbe(encoder_file, [{"image": "a.png", "label": label}], [{"image": "b.png", "label": 1}])


def test_an_encoder_of_which_features_are_nan_has_no_neighbours(tmp_path, rng):
    encoder = ViT(1, (8, 8), 4, embed_dim=12, depth=1, num_heads=2)
    with torch.no_grad():
        encoder.norm.weight[0] = float("nan")
    save_encoder(encoder, tmp_path / "encoder.safetensors", {"mean": 0.5, "std": 0.5})
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    items = [{"image": str(tmp_path / f"{name}.png"), "modality": "xray", "label": name} for name in "abc"]
    with pytest.raises(InputError, match="features of 3 of 3 images are NaN"):
        KNNProbe(tmp_path / "encoder.safetensors", items, items, k=2).run()


def test_attentive_heads_trained_at_once_are_those_trained_one_by_one(rng):
    tokens, labels = hidden_in_one_token(rng, 50)
    findings = torch.from_numpy(np.eye(3)[labels]).float()
    for truth in (torch.from_numpy(labels), findings):
        both = train_attentive(tokens, truth, 3, 4, [1e-3, 1e-2], epochs=2, batch_size=16)
        for rate, head in zip([1e-3, 1e-2], both, strict=True):
            (alone,) = train_attentive(tokens, truth, 3, 4, [rate], epochs=2, batch_size=16)
            assert all(torch.equal(x, y) for x, y in zip(head.parameters(), alone.parameters(), strict=True))


def test_tokens_of_images_and_of_slices_are_the_encoders_and_raw_ones_its_patches():
    encoder = ViT(1, (28, 28), 7, embed_dim=24, depth=2, num_heads=2).eval()
    volume = torch.randn(2, 1, 3, 28, 28)
    tokens = Tokens(encoder)(volume)
    assert tokens.shape == (2, 3 * 17, 24)
    assert torch.equal(tokens[:, 17:34], encoder(volume[:, :, 1]).half())
    raw = Tokens(encoder, raw=True)(volume)
    assert raw.shape == (2, 3 * 16, 49)
    assert torch.equal(raw[:, 16], volume[:, 0, 1, :7, :7].flatten(1).half())


def test_tokens_that_would_not_fit_are_refused_before_any_are_made_with_what_they_need(
    tmp_path, rng, encoder_file, monkeypatch
):
    probe = Probe(encoder_file, medmnist(archive(tmp_path, rng)), ["attentive"])
    monkeypatch.setattr("biovfm_monai.evaluation.features.machine_memory", lambda: 136 * 17 * 24 * 2 * 2.4 / 2**30)
    monkeypatch.setattr(probe, "_scored", None)
    with pytest.raises(InputError, match=r"17 tokens of 136 images need 0\.000258 GiB .* Give a smaller --img_size"):
        probe.run()


def test_images_of_different_numbers_of_tokens_are_refused(rng):
    images = Dataset([{"image": torch.randn(1, depth, 28, 28)} for depth in (2, 3)])
    with pytest.raises(InputError, match=r"images have features of different shapes, \(34, 24\) and \(51, 24\)"):
        embed(Tokens(ViT(1, (28, 28), 7, embed_dim=24, depth=1, num_heads=2)), images)


def test_few_shots_grow_better_and_are_refused_beyond_the_rarest_class(rng):
    (train, labels), (test, truth) = blobs(rng, 300, apart=0.7), blobs(rng, 300, apart=0.7)
    few, more = (few_shot([train, test], [labels, truth], TASKS[0], shots) for shots in (1, 30))
    assert more["auc"] > few["auc"] + 0.03
    assert more["std"] < few["std"]
    with pytest.raises(InputError, match="101 shots are more than the 100 images"):
        few_shot([train, test], [labels, truth], TASKS[0], 101)
    with pytest.raises(InputError, match="few-shot needs one class per image"):
        few_shot([train, test], [labels, truth], TASKS[3], 1)


@pytest.mark.parametrize("class_token", [True, False])
def test_one_pass_gives_what_each_pooling_would_alone(class_token):
    encoder = ViT(1, (28, 28), 7, embed_dim=24, depth=6, num_heads=2, class_token=class_token).eval()
    image, network = torch.randn(3, 1, 28, 28), PooledFeatures(encoder)
    found = network(image)
    mean = Embedder(encoder)(image)
    assert torch.allclose(found[:, network.poolings["mean"]], mean, atol=1e-6)
    last = torch.cat([features.flatten(2).mean(2) for features in encoder.features(image, [-4, -3, -2, -1])], 1)
    assert torch.allclose(found[:, network.poolings["last"]], last, atol=1e-6)
    tokens = encoder(image)
    name, first = ("token", tokens[:, 0]) if class_token else ("max", tokens.amax(1))
    assert torch.allclose(found[:, network.poolings[name]], first, atol=1e-6)
    both = found[:, network.poolings["token+mean" if class_token else "mean+max"]]
    assert torch.allclose(both, torch.cat([first, mean], 1), atol=1e-6)
    volume = torch.stack([image, image.flip(0)], 2)
    assert torch.allclose(network(volume), (found + found.flip(0)) / 2, atol=1e-5)


def test_features_are_made_once_for_each_key_and_anew_for_another(tmp_path, rng):
    images = Dataset([{"image": torch.from_numpy(rng.random((1, 4, 4)))} for _ in range(3)])
    network, calls = RawPixels(2), []
    network.register_forward_hook(lambda *_: calls.append(1))
    first = cached_features(network, images, {"encoder": "a"}, tmp_path)
    assert np.array_equal(cached_features(network, images, {"encoder": "a"}, tmp_path), first)
    assert len(calls) == 3
    cached_features(network, images, {"encoder": "b"}, tmp_path)
    assert len(calls) == 6
    assert len(list(tmp_path.iterdir())) == 2


def test_processes_that_need_the_same_scores_make_them_once(tmp_path):
    program = """
import sys, time
from pathlib import Path
from biovfm_monai.evaluation.features import cached_scores
here = Path(sys.argv[1])
(here / sys.argv[2]).touch()
def compute():
    print("made")
    while len(list(here.glob("began*"))) < 3:
        time.sleep(0.01)
    time.sleep(0.5)
    return {"auc": 0.5}
print(cached_scores(compute, {"encoder": "a"}, here / "kept"))
"""
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(started(["-c", program, tmp_path, f"began{number}"], tmp_path)) for number in range(3)
        ]
        for process, _ in running:
            process.join(60)
        said = [printed.read_text().splitlines() for _, (printed, _) in running]
    assert sorted(said, key=len) == [["{'auc': 0.5}"], ["{'auc': 0.5}"], ["made", "{'auc': 0.5}"]]
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".json"]


def test_a_changed_file_or_label_is_another_key(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    items = [{"image": str(file), "label": 0}]
    before = describe_items(items)
    assert describe_items(items) == before
    assert describe_items([{"image": str(file), "label": 1}]) != before
    file.write_bytes(b"12")
    assert describe_items(items) != before


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "features of 1 of 3 images are NaN"), (None, "all images have the same features")]
)
def test_features_with_nan_and_constant_ones_are_refused(value, message, tmp_path):
    images = [{"image": torch.ones(1, 4, 4)} for _ in range(3)]
    if value is not None:
        images[1]["image"] = torch.full((1, 4, 4), value)
    with pytest.raises(InputError, match=message):
        cached_features(RawPixels(2), Dataset(images), {"encoder": "a"}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_scores_of_the_controls_serve_all_encoders_of_one_architecture(tmp_path, rng, encoder_file, monkeypatch):
    def encoder_of(seed, depth):
        torch.manual_seed(seed)
        path = tmp_path / f"{seed}_{depth}.safetensors"
        save_encoder(ViT(1, (28, 28), 7, embed_dim=24, depth=depth, num_heads=2), path, {"mean": 0.5, "std": 0.25})
        return path

    made = []
    monkeypatch.setattr(features, "embed", lambda network, *given: made.append(network) or embed(network, *given))
    task, cache = medmnist(archive(tmp_path, rng)), tmp_path / "cache"
    first = Probe(encoder_file, task, ["knn"], cache_dir=cache, keep_features=False).run()["scores"]
    assert (len(made), len(list(cache.iterdir()))) == (3 * 3, 3)
    assert Probe(encoder_file, task, ["knn"], cache_dir=cache, keep_features=False).run()["scores"] == first
    assert len(made) == 9
    other = Probe(encoder_of(1, 2), task, ["knn"], cache_dir=cache, keep_features=False).run()["scores"]
    assert len(made) == 9 + 3
    assert other["random_init"] == first["random_init"]
    assert other["raw_pixels"] == first["raw_pixels"]
    assert other["encoder"] != first["encoder"]
    Probe(encoder_of(1, 1), task, ["knn"], cache_dir=cache, keep_features=False).run()
    assert len(made) == 9 + 3 + 9
    changes = ({"seed": 1}, {"draws": 10}, {"img_size": (14, 14)}, {"probes": ["retrieval"]})
    for number, changed in enumerate(changes, 1):
        Probe(encoder_file, task, **{"probes": ["knn"], "cache_dir": cache, "keep_features": False, **changed}).run()
        assert len(made) == 9 + 3 + 9 + 9 * number


def test_raw_pixels_of_large_images_are_averages():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(RawPixels(2, 16)(image), torch.nn.functional.avg_pool2d(image, 2).flatten(1))
    assert torch.equal(RawPixels(2, 1024)(image), image.flatten(1))


def test_the_command_scores_an_archive_beside_its_controls_and_says_that_it_is_not_the_official_one(
    tmp_path, rng, encoder_file, monkeypatch, capsys
):
    path = archive(tmp_path, rng)
    monkeypatch.setattr("sys.excepthook", None)
    command = f"biovfm probe {path} --encoder {encoder_file} --out {tmp_path}/p.json --cache {tmp_path}/c"
    monkeypatch.setattr("sys.argv", command.split())
    cli.main()
    told, result = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "bloodmnist_28.npz is not an official file of bloodmnist" in told
    assert "bloodmnist has (11959, 1712, 3421)" in told
    assert set(result["scores"]) == {"encoder", "random_init", "raw_pixels"}
    for probes in result["scores"].values():
        assert set(probes) == {"knn", "linear", "logistic"}
        for of in probes.values():
            low, high = of["intervals"]["auc"]
            assert low <= of["auc"] <= high
            assert of["auc"] > 0.7
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 9
    assert f"AUC {result['scores']['encoder']['linear']['auc']:.4f}" in told


def test_the_command_tells_of_further_probes_and_refuses_wrong_ones_before_features_are_made(
    tmp_path, rng, encoder_file, monkeypatch, capsys
):
    path = archive(tmp_path, rng)
    command = ["biovfm", "probe", str(path), str(encoder_file), "--out", str(tmp_path / "p.json"), "--probes"]
    monkeypatch.setattr("sys.argv", [*command, "['attentive','retrieval']"])
    cli.main()
    result = json.loads((tmp_path / "p.json").read_text())
    found = result["scores"]["encoder"]["retrieval"]
    low, high = found["intervals"]["mean_average_precision"]
    said = f"encoder      retrieval mAP {found['mean_average_precision']:.4f} [{low:.4f}, {high:.4f}], precision at 1 "
    assert said in capsys.readouterr().out
    for probes in result["scores"].values():
        assert probes["attentive"]["auc"] > 0.7
        assert set(probes["attentive"]["settings"]) == {"rate"}
    reported = {of.name: of for of in scores_of_json("run", "p", result)}["scores, encoder, retrieval, precision_at_10"]
    assert (reported.task, reported.value) == ("bloodmnist", found["precision_at_10"])
    assert [reported.low, reported.high] == found["intervals"]["precision_at_10"]
    findings = [{"image": "none", "label": label} for label in ([0, 1], [1, 0])]
    several = Benchmark("x", TASKS[3], 2, dict.fromkeys(("training", "validation", "test"), findings), "", "")
    with pytest.raises(InputError, match="this task has findings"):
        Probe(encoder_file, several, ["retrieval"])
    with pytest.raises(InputError, match="there is no probe 'knm', but knn, linear, logistic, retrieval"):
        Probe(encoder_file, several, ["knm"])
    with pytest.raises(InputError, match="no probe is named"):
        Probe(encoder_file, several, [])


def test_an_official_file_brings_no_warning(tmp_path, rng, monkeypatch):
    path = archive(tmp_path, rng, sizes=(11959 // 99, 17, 34))
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    facts = (TASKS[0], 8, (11959 // 99, 17, 34), {28: digest})
    monkeypatch.setitem(medmnist.__globals__["_FACTS"], "bloodmnist", facts)
    assert medmnist(path).warnings == []


def test_findings_of_an_archive_are_probed_one_by_one(tmp_path, rng):
    def labels(count):
        return np.stack([(np.arange(count) >> bit) % 2 for bit in range(14)][:3] * 5, 1)[:, :14]

    path = archive(tmp_path, rng, "chestmnist.npz", labels=labels)
    labels = medmnist(path).labels()
    truth = [of.astype(float) + 0.3 * rng.standard_normal(of.shape) for of in labels]
    found = probe_features({"truth": truth}, labels, 14, TASKS[3])
    for probe, best in found.items():
        assert auc(labels[2], best.likely, TASKS[3]) > 0.9, probe


def test_a_dataset_folder_with_words_for_labels_is_a_benchmark_split_by_subject(tmp_path):
    items = [
        {
            "image": str(tmp_path / f"{split}{n}.png"), "modality": "mri", "label": label, "subject": f"{split}{n}",
            "split": split,
        }
        for split in ("training", "validation", "test") for n, label in enumerate(("healthy", "ill"))
    ]  # fmt: skip
    write_datalist(tmp_path / "datalist.json", [items])
    found = dataset(tmp_path)
    assert (found.task, found.num_classes) == (TASKS[1], 2)
    assert [list(part) for part in found.labels()] == [[0, 1]] * 3
    items[-1]["subject"] = "training0"
    write_datalist(tmp_path / "datalist.json", [items])
    with pytest.raises(InputError, match="a subject is in both the training and the test part"):
        dataset(tmp_path)
    del items[-1]["label"]
    items[-1]["subject"] = "x"
    write_datalist(tmp_path / "datalist.json", [items])
    with pytest.raises(InputError, match="1 of 6 items have no label"):
        dataset(tmp_path)


def labelled(folder, labels):
    """A datalist in which each section has an image of each label."""
    items = [
        {"image": str(folder / f"{split}{n}.png"), "modality": "mri", "label": label, "split": split}
        for split in ("training", "validation", "test") for n, label in enumerate(labels)
    ]  # fmt: skip
    write_datalist(folder / "datalist.json", [items])
    return items


def test_numbers_written_as_words_are_classes_in_their_order(tmp_path):
    labelled(tmp_path, ["10", "2", "1"])
    assert [list(part) for part in dataset(tmp_path, TASKS[2]).labels()] == [[2, 1, 0]] * 3
    labelled(tmp_path, ["severe", "mild", "none"])
    assert dataset(tmp_path).labels()[0].tolist() == [2, 0, 1]
    with pytest.raises(InputError, match="grades must be numbers"):
        dataset(tmp_path, TASKS[2])


@pytest.mark.parametrize("missing", ["", float("nan")])
def test_an_empty_label_is_none(tmp_path, missing):
    labelled(tmp_path, ["a", missing] if missing == "" else [0.0, missing])
    with pytest.raises(InputError, match="3 of 6 items have no label"):
        dataset(tmp_path)


def test_an_image_in_two_sections_is_refused(tmp_path):
    items = labelled(tmp_path, ["a", "b"])
    items[-1]["image"] = items[0]["image"]
    write_datalist(tmp_path / "datalist.json", [items])
    with pytest.raises(InputError, match="an image is in both the training and the test part"):
        dataset(tmp_path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": []}, "has no test part"),
        ({"test": [{"image": "a"}]}, "1 item.s. of the test part have no label"),
        ({"validation": [{"image": "a", "label": 0}]}, "one class only"),
        ({"test": [{"image": "a", "label": n} for n in (0, 1)]}, "has no image of class 2"),
        ({"training": [{"image": "a", "label": [0, 1]}, {"image": "b", "label": 1}]}, "benchmark: "),
    ],
)  # fmt: skip
def test_a_benchmark_that_cannot_be_scored_is_refused(parts, message):
    whole = [{"image": "a", "label": n} for n in (0, 1, 2)]
    given = {"training": whole, "validation": whole, "test": whole} | parts
    with pytest.raises(InputError, match=message):
        Benchmark("benchmark", TASKS[0], 3, given, "", "").labels()


def test_a_file_of_another_name_is_no_task_of_medmnist(tmp_path):
    with pytest.raises(InputError, match="is named after no task"):
        medmnist(tmp_path / "foodmnist.npz")
    with pytest.raises(InputError, match="no such file"):
        medmnist(tmp_path / "bloodmnist_224.npz")
