"""`biovfm report`: what is on the page, in the tables beside it, and in MLflow; runs are written here, not trained."""

import csv
import html.parser
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from biovfm_monai.checkpoints import save_encoder
from biovfm_monai.cli import report
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import KNNProbe
from biovfm_monai.evaluation.report import collect_runs, find_runs, write_report
from biovfm_monai.evaluation.report.figures import encode_picture
from biovfm_monai.evaluation.report.scores import confusion_of, scores_of_table
from biovfm_monai.evaluation.scaling import fit_table
from biovfm_monai.networks import vit_tiny
from tests.conftest import BUNDLE

SECTIONS = [
    "runs", "curves", "scores", "scaling", "confusion", "map", "neighbours", "reconstruction", "overlay", "cost",
    "data", "environment", "files",
]  # fmt: skip


class Page(html.parser.HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    training = {"method": "MAE", "steps": 40, "samples_seen": 320, "loss": 0.625, "torch": "2.13.0"}
    encoder = vit_tiny(in_channels=3, img_size=(16, 16), patch_size=8, depth=1)
    save_encoder(encoder, path, {"mean": 0.5, "std": 0.25}, training)
    return path


def write_run(folder, encoder_file, classes=("cat", "dog", "owl")):
    """A run's folder as bundles leave it."""
    (folder / "eval").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs").mkdir()
    random = np.random.default_rng(0)
    shutil.copy(encoder_file, folder / "models")
    shutil.copy(BUNDLE / "configs/metadata.json", folder / "configs")
    lines = [
        {"step": step, "samples": 8 * step, "seconds": 90.0, "loss": 1 / step, "images_per_second": 12.5, "mfu": 0.25}
        for step in (1, 10, 20, 30, 40)
    ]
    (folder / "eval/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    knn = {"encoder": 0.8, "random_init": 0.5, "raw_pixels": 0.3, "chance": 0.3, "classes": 3, "train_images": 20}
    (folder / "eval/knn.json").write_text(json.dumps(knn | {"test_images": 10, "k": 5}))
    labels = np.array(classes)[[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]
    predicted = np.where(np.arange(10) < 8, labels, np.roll(labels, 1))
    arrays = {"embeddings": random.normal(size=(10, 6)), "labels": labels, "predicted": predicted}
    np.savez(folder / "eval/knn_images.npz", **arrays)
    for name in ("neighbours", "reconstruction", "overlay"):
        Image.fromarray(random.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / f"eval/{name}.png")
    (folder / "eval/metrics.csv").write_text("val_mean_dice,0.71875\n")
    (folder / "eval/val_mean_dice_raw.csv").write_text(
        "filename,class0,mean\n/data/JaneDoe/a.nii.gz,0.5000,0.5000\n/data/JaneDoe/b.nii.gz,0.9375,0.9375\n"
    )
    with (folder / "eval/probabilities.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *classes, "label"])
        for number in range(12):
            chances = np.roll([0.8, 0.15, 0.05], number % 3 if number < 9 else number % 3 + 1)
            writer.writerow([f"/data/JaneDoe/{number}.png", *chances, classes[number % 3]])
    probe = {"auc": 0.9375, "accuracy": 0.8125, "intervals": {"auc": [0.875, 0.96875]}, "settings": {"k": 5}}
    scores = {"benchmark": {"name": "bloodmnist"}, "encoder": "/data/x", "scores": {"encoder": {"linear": probe}}}
    (folder / "eval/probe.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture(scope="session")
def full(tmp_path_factory, encoder_file):
    """A run that has all there is, a table of runs with its fit, and the report of them."""
    folder = tmp_path_factory.mktemp("report") / "study"
    write_run(folder / "first", encoder_file)
    sizes = np.array([1e6, 3e6, 1e7, 3e7, 1e8, 3e8])
    table = pd.DataFrame({"method": "mae", "encoder_parameters": sizes, "auc": 0.5 * sizes**0.02})
    table.to_csv(folder / "runs.csv", index=False)
    fit_table(folder / "runs.csv", "encoder_parameters", "auc", ["method"], "log-linear", folder / "fit.json", draws=50)
    out = folder.parent / "out/report.html"
    runs = write_report([folder], out)
    return folder, out, runs


def test_each_thing_that_a_run_holds_has_its_section_and_number_on_the_page(full):
    _, out, _ = full
    page = Page(out.read_text())
    assert page.sections() == SECTIONS
    linked = [attributes["href"] for attributes in page.all("a")]
    assert linked == ["#content", *(f"#{name}" for name in SECTIONS)]
    cells = {text.strip() for text in page.texts}
    trained = {"MAE", "ViT", "0.625", "320", "12.5", "0.125", "0.25"}  # hours are 5 x 90 s
    scored = {"0.8", "0.7188", "0.9375", "0.875", "0.9688", "bloodmnist", "scores, encoder, linear, auc"}
    assert (
        not (trained | scored | {"0.02", "2.13.0", "Research on representation learning; not for clinical use"}) - cells
    )


def test_the_tables_beside_the_page_hold_the_same_numbers(full):
    _, out, runs = full
    scores = pd.read_csv(out.with_name("report_scores.csv"))
    assert len(scores) == len(runs[0].scores) > 15
    auc = scores[scores["name"] == "scores, encoder, linear, auc"].iloc[0]
    assert (auc["run"], auc["task"], auc["value"], auc["low"], auc["high"]) == (
        "study/first", "bloodmnist", 0.9375, 0.875, 0.96875,
    )  # fmt: skip
    curves = pd.read_csv(out.with_name("report_curves.csv"))
    assert curves[curves["name"] == "loss"]["value"].tolist() == [1, 0.1, 0.05, 1 / 30, 0.025]
    assert pd.read_csv(out.with_name("report_runs.csv"))["hours"].tolist() == [0.125]


def test_intervals_are_those_of_the_references(full):
    by_name = {(score.task, score.name): score for score in full[2][0].scores}
    knn = by_name["kNN", "accuracy, encoder"]
    # Wilson's interval of 8 of 10, by its formula.
    middle, half = (
        (0.8 + 1.96**2 / 20) / (1 + 1.96**2 / 10),
        1.96 * (0.16 / 10 + 1.96**2 / 400) ** 0.5 / (1 + 1.96**2 / 10),
    )
    assert [knn.low, knn.high] == pytest.approx([middle - half, middle + half], abs=1e-4)
    # The mean of two images, drawn with replacement, is one of three values, the ends a quarter of the time each.
    dice = by_name["evaluation", "val_mean_dice, mean"]
    assert (dice.value, dice.low, dice.high) == (0.71875, 0.5, 0.9375)
    accuracy = by_name["classification", "accuracy"]
    assert accuracy.value == 0.75
    assert accuracy.low < 0.75 < accuracy.high


def test_confusion_matrices_count_the_images(full):
    chances, knn = sorted(full[2][0].confusions, key=lambda confusion: confusion.task, reverse=True)
    assert chances.classes == ["cat", "dog", "owl"]
    assert chances.counts.tolist() == [[3, 1, 0], [0, 3, 1], [1, 0, 3]]
    assert knn.counts.sum() == 10
    assert knn.counts.trace() == 8


def test_nothing_on_the_page_asks_for_a_file_or_a_host_and_no_script_runs(full):
    page = Page(full[1].read_text())
    asked = [of.get("src", of.get("href", "")) for of in page.all("img", "link", "a")]
    assert asked
    assert all(uri.startswith(("data:", "#")) for uri in asked)
    assert not page.all("script", "iframe", "object", "embed", "form", "base")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    policy = next(of for of in page.all("meta") if of.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_every_picture_has_a_text_and_every_table_a_caption_and_headings(full):
    page = Page(full[1].read_text())
    assert all(of["alt"] for of in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(of["scope"] in ("col", "row") for of in page.all("th"))
    headings = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert headings == [1, *[2] * (len(headings) - 1)]


def test_no_file_of_a_patient_is_named(full):
    for path in full[1].parent.iterdir():
        assert "JaneDoe" not in path.read_text()


def test_a_page_has_no_section_for_what_no_run_holds_and_says_what_was_not_found(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/log.jsonl").write_text('{"step": 1, "seconds": 3600, "loss": 2.5}\n')
    write_report([tmp_path / "bare"], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.sections() == ["runs", "curves", "cost", "environment", "files"]
    missing = next(text for text in page.texts if "knn.json" in text)
    assert "reconstruction.png" in missing
    assert "log.jsonl" not in missing


def test_hostile_names_are_text(tmp_path, encoder_file):
    name = "<img src=x onerror=alert(1)>"
    write_run(tmp_path / name, encoder_file, ("<script>alert(2)<", '"><b>', "$\\frac{"))
    write_report([tmp_path / name], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert not page.all("script", "b")
    assert all(of["src"].startswith("data:") for of in page.all("img"))
    assert name in page.texts
    assert "<script>alert(2)<" in page.texts


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("eval/log.jsonl", lambda content: content[:-30], "damaged in line 5"),
        ("eval/reconstruction.png", lambda content: content[: len(content) // 2], "reconstruction.png: "),
        ("eval/knn.json", lambda content: content[:20], "knn.json: "),
        ("eval/knn.json", lambda _: b'{"encoder": 0.5}', "knn.json: lacks"),
        ("eval/knn_images.npz", lambda content: content[:100], "knn_images.npz: "),
        ("eval/probabilities.csv", lambda _: b"", "probabilities.csv: "),
        ("eval/metrics.csv", lambda _: b"dice,high\n", "metrics.csv: "),
        ("models/encoder.safetensors", lambda content: content[:50], "encoder.safetensors: "),
        ("configs/metadata.json", lambda _: b"[1]", "metadata.json: "),
        ("eval/log.jsonl", lambda content: content + b'{"step": Infinity, "loss": 1}\n', "damaged in line 6"),
        ("eval/probe.json", lambda _: b'{"auc": 0.5, "intervals": [1]}', "probe.json: "),
        ("eval/probe.json", lambda _: b'{"auc": 0.5, "intervals": {"auc": [1]}}', "probe.json: "),
    ],
)
def test_what_is_damaged_is_set_aside_by_name_and_the_rest_is_read(tmp_path, encoder_file, file, damage, reason):
    run = write_run(tmp_path / "run", encoder_file)
    whole = collect_runs(find_runs([run])[0])[0]
    (run / file).write_bytes(damage((run / file).read_bytes()))
    found = collect_runs(find_runs([run])[0])[0]
    assert not whole.problems()
    assert [problem for problem in found.problems() if problem.startswith(file.partition("/")[2]) and reason in problem]
    assert len(found.problems()) == 1
    assert str(tmp_path) not in found.problems()[0]
    others = {name for name, state in whole.files.items() if state == "read"} - {file.partition("/")[2]}
    assert all(found.files[name] == "read" for name in others)


def test_lines_before_and_after_a_damaged_one_are_kept(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "lo\n[]\n{"step": 3, "loss": NaN, "b": 1}\n'
    )
    run = collect_runs(find_runs([tmp_path])[0])[0]
    assert run.curves.to_numpy().tolist() == [["loss", 1, 3.0], ["b", 3, 1.0]]
    assert run.files["log.jsonl"] == "damaged in line 2, 3; its other lines are shown"


def test_the_command_says_what_was_set_aside(tmp_path, encoder_file):
    run = write_run(tmp_path / "run", encoder_file)
    (run / "eval/overlay.png").write_bytes(b"no picture")
    said = report(str(run), out=str(tmp_path / "page.html"))
    assert said.splitlines()[0] == f"{tmp_path}/page.html: 1 run(s)"
    assert said.splitlines()[1].startswith("run: set aside: overlay.png: cannot identify")
    assert "overlay.png: cannot identify" in (tmp_path / "page.html").read_text()


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run/log.jsonl").write_text('{"step": 1, "loss": 1}\n')
    named, _ = find_runs([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "a/run"])
    assert [name for name, _ in named] == ["run", "run (2)"]


@pytest.mark.parametrize("given", ["missing", "empty"])
def test_a_folder_without_runs_is_refused(tmp_path, given):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=given):
        write_report([tmp_path / given], tmp_path / "report.html")


def test_a_page_must_be_named_as_one(tmp_path):
    with pytest.raises(InputError, match=r"report\.pdf.*\.html"):
        write_report([tmp_path], tmp_path / "report.pdf")


def test_a_json_file_that_is_no_fit_is_refused_by_name(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json"):
        write_report([tmp_path, tmp_path / "other.json"], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("runs.csv", b"method,auc\n"),
        ("runs.parquet", b"no table"),
        ("fit.json", b'{"table": "", "x": "", "y": "", "by": ""'),
        ("fit.json", b'{"table": "", "x": "", "y": "", "by": "", "fits": [1]}'),
    ],
)
def test_a_damaged_table_that_nobody_named_is_set_aside(tmp_path, file, content):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (folder / file).write_bytes(content)
    (folder / "gone.json").symlink_to(tmp_path / "nowhere.json")
    write_report([folder], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert any(text.startswith(f"{file}: ") for text in page.texts)
    with pytest.raises(InputError, match=rf"{file}: no table of runs, nor a fit"):
        write_report([folder, folder / file], tmp_path / "report.html")


def test_a_law_is_drawn_over_the_table_it_was_fitted_to_and_no_other(tmp_path, monkeypatch):
    table = pd.DataFrame({"size": [1, 2, 4, 8, 16, 32], "auc": [0.6, 0.65, 0.7, 0.72, 0.75, 0.76]})
    (tmp_path / "study").mkdir()
    table.to_csv(tmp_path / "study/runs.csv", index=False)
    monkeypatch.chdir(tmp_path)
    fit_table("study/runs.csv", "size", "auc", law="log-linear", out="fit.json", draws=50)
    (tmp_path / "elsewhere/study").mkdir(parents=True)
    table.assign(auc=0.5).to_csv(tmp_path / "elsewhere/study/runs.csv", index=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_report([tmp_path / "fit.json"], tmp_path / "report.html")
    assert "6 runs, auc from 0.6 to 0.76" in (tmp_path / "report.html").read_text()
    table.iloc[:5].to_csv(tmp_path / "study/runs.csv", index=False)
    write_report([tmp_path / "fit.json"], tmp_path / "report.html")
    assert "its table runs.csv has changed since" in (tmp_path / "report.html").read_text()
    (tmp_path / "study/runs.csv").unlink()
    write_report([tmp_path / "fit.json"], tmp_path / "report.html")
    assert "its table runs.csv is not beside it" in (tmp_path / "report.html").read_text()


def test_findings_of_which_each_image_has_one_are_not_taken_for_classes():
    table = pd.DataFrame({"image": list("abcd"), "mass": [0.9, 0.8, 0.1, 0.4], "nodule": [0.7, 0.1, 0.9, 0.8]})
    labels = table.assign(label=["mass", "mass", "nodule", "nodule"])
    assert {score.name: score.value for score in scores_of_table("run", labels)}["accuracy"] == 0.875
    assert not list(confusion_of("findings", labels))
    classes = labels.assign(mass=1 - labels["nodule"])
    assert {score.name: score.value for score in scores_of_table("run", classes)}["accuracy"] == 0.75
    assert len(list(confusion_of("classes", classes))) == 1
    with pytest.raises(InputError, match="label '' in row 2 is not one of its classes"):
        list(scores_of_table("run", classes.assign(label=["mass", "", "mass", "nodule"])))


def test_a_picture_is_made_as_small_as_its_share_of_the_page():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))
    for budget in (20_000, 200_000):
        assert len(encode_picture(noise, budget)) < budget * 4 / 3 + 100
    assert encode_picture(noise, 100) is None


def test_scalars_of_a_run_without_our_log_come_from_its_tensorboard_files(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "eval/tensorboard") as writer:
        for step in (1, 2):
            writer.add_scalar("val_mean_dice", step / 4, step)
    (tmp_path / "eval/metrics.csv").write_text("val_mean_dice,0.5\n")
    run = collect_runs(find_runs([tmp_path])[0])[0]
    assert run.curves.to_numpy().tolist() == [["val_mean_dice", 1, 0.25], ["val_mean_dice", 2, 0.5]]


def test_a_probe_writes_what_a_report_shows_of_its_images(tmp_path, encoder_file):
    parts = []
    for part, count in (("train", 6), ("test", 4)):
        (tmp_path / part).mkdir()
        items = []
        for number in range(count):
            path = tmp_path / part / f"JaneDoe{number}.png"
            shade = np.full((16, 16, 3), 40 if number % 2 else 200, np.uint8)
            Image.fromarray(shade + np.uint8(number)).save(path)
            items.append({"image": str(path), "modality": "dermoscopy", "label": ("light", "dark")[number % 2]})
        parts.append(items)
    scores = KNNProbe(encoder_file, *parts, k=3, details_dir=tmp_path / "eval").run()
    with np.load(tmp_path / "eval/knn_images.npz") as content:
        assert content["labels"].tolist() == ["light", "dark", "light", "dark"]
        assert np.mean(content["labels"] == content["predicted"]) == scores["encoder"]
        assert content["embeddings"].shape == (4, 192)
    assert b"JaneDoe" not in (tmp_path / "eval/knn_images.npz").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "eval/neighbours.png").convert("L"))
    # Rows of a light and a dark image in turn: below its heading each begins with its own shade.
    firsts = [pixels[20 + 64 + row * 148, 4 + 64] for row in range(4)]
    assert [int(first) > 128 for first in firsts] == [True, False, True, False]
    assert pixels.shape[1] == 6 * 132 + 4


def test_mlflow_has_the_same_numbers_and_a_second_report_makes_no_duplicates(full, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    path = tmp_path / "runs.db"
    path.write_bytes(b"an earlier report")
    from biovfm_monai.evaluation.report.tracking import write_mlflow

    write_mlflow(full[2], path)
    client = mlflow.MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name("biovfm report")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "study/first"
    assert run.data.params["method"] == "MAE"
    assert run.data.metrics["bloodmnist_ scores_ encoder_ linear_ auc low"] == 0.875
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [
        (step, 1 / step) for step in (1, 10, 20, 30, 40)
    ]  # fmt: skip
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.slow
def test_the_page_of_a_hundred_runs_is_below_ten_megabytes(tmp_path, encoder_file):
    noise = np.random.default_rng(0).integers(0, 255, (800, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for number in range(100):
        run = write_run(tmp_path / f"runs/run{number:03}", encoder_file)
        with (run / "eval/log.jsonl").open("w") as file:
            for step in range(1, 2001):
                file.write(json.dumps({"step": step, "seconds": 1.5, "loss": 1 / step, "samples": 8 * step}) + "\n")
        for name in ("neighbours", "reconstruction", "overlay"):
            (run / f"eval/{name}.png").unlink()
            (run / f"eval/{name}.png").hardlink_to(tmp_path / "noise.png")
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    assert len([of for of in page.all("img") if of["src"].startswith("data:image/jpeg")]) == 300
