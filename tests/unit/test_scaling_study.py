"""Studies: a grid of runs that is planned, run, stopped, gone on with and fitted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from programs import run_python, started

from biovfm_monai import cli
from biovfm_monai.checkpoints import encoder_info
from biovfm_monai.engines import measured_rate
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.scaling import execute, fit_table, launch, plan_study, run_study
from biovfm_monai.evaluation.scaling.study import read_study
from biovfm_monai.evaluation.scaling.table import groups_of

SMALL = {
    "in_channels": 1, "img_size": [16, 16], "crop_size": [16, 16], "batch_size": 4, "max_epochs": 2,
    "steps_per_epoch": 3, "precision": "fp32", "device": "cpu",
}  # fmt: skip
WIDTHS = {str(width): {"encoder#embed_dim": width, "encoder#depth": 1, "encoder#num_heads": 3} for width in (24, 48)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Dark and bright images, in parts of subjects of their own."""
    folder = tmp_path_factory.mktemp("images of two kinds")
    rng, sections = np.random.default_rng(0), {"training": [], "validation": [], "test": []}
    for number in range(30):
        bright = number % 2
        Image.fromarray(rng.integers(90 * bright, 90 * bright + 150, (16, 16), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
        section = ("training", "validation", "test")[number // 10]
        item = {"image": f"{number}.png", "modality": "xray", "subject": str(number), "label": bright}
        sections[section].append(item)
    (folder / "datalist.json").write_text(json.dumps(sections))
    return folder


@pytest.fixture
def study(tmp_path, images):
    """Writes a study's file."""

    def write(**changed):
        content = {
            "bundle": "biovfm_mae_pretraining", "settings": {**SMALL, "dataset_dir": str(images)}, "methods": ["mae"],
            "presets": WIDTHS, "seeds": [0, 1], "benchmarks": {"brightness": str(images)},
        } | changed  # fmt: skip
        path = tmp_path / "my study.json"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return path

    return write


@pytest.fixture
def calls(monkeypatch):
    """Runs start their programs faster, and are counted; those that a test puts a word of into `broken` fail."""

    class Calls(list):
        broken, threads = (), None

    made = Calls()

    def call(command, log, environment, locks):
        made.append(" ".join(map(str, command)))
        made.threads = environment.get("OMP_NUM_THREADS")
        if any(word in made[-1] for word in made.broken):
            log.write(b"Traceback\nerror: it is broken. Mend it.\n")
            return 1
        done = run_python(["-m", *command], Path.cwd())
        log.write((done.stdout + done.stderr).encode())
        return done.returncode

    monkeypatch.setattr(execute, "_call", call)
    return made


def test_each_combination_is_a_run_with_the_settings_of_its_choices(study, images):
    choices = {"methods": ["mae", "dinov2"], "presets": {"vit_small": {}, "flat": {"encoder#depth": 1}}}
    parts = {"fractions": [1, 0.5], "modalities": ["all", "xray"]}
    runs = read_study(study(**choices, **parts))
    assert len({run.name for run in runs}) == len(runs) == 2**5
    run = next(run for run in runs if run.name == "dinov2_vit_small_xray_0.5_1")
    assert run.settings["encoder"]["_target_"] == "biovfm_monai.networks.vit_small"
    assert run.settings["train#dataset#fraction"] == 0.5
    assert (run.settings["modality"], run.settings["seed"]) == ("xray", 1)
    assert [Path(file).name for file in run.files] == ["train.json", "dinov2.json"]
    flat = next(run for run in runs if run.name == "mae_flat_all_1_0")
    assert flat.settings["encoder#depth"] == 1
    assert not {"encoder", "modality"} & set(flat.settings)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bundle": "nothing"}, "there is no bundle 'nothing'"),
        (
            {"methods": ["mae", "knn_probe"]},
            "there is no method 'knn_probe', but barlow_twins, .*, simmim, vicreg",
        ),
        ({"presets": ["vit_giant"]}, "there is no preset 'vit_giant', but spad_vit_base"),
        ({"presets": None}, "has no 'presets'"),
        ({"modalities": [["ct", "mri"]]}, "modalities .* must be a list of names, or an object"),
        ({"modalities": {"radiology": ["ct", 3]}}, "modalities, radiology: .* must be an object of settings"),
        ({"presets": {"24": 3}}, "presets, 24: 3 must be an object"),
        ({"fractions": [0]}, "fractions 0 must be a number, above 0|fractions 0 must be above 0, and at most 1"),
        ({"fractions": 0.5}, "fractions 0.5 must be a list"),
        ({"seeds": [0.5]}, "seeds 0.5 must be a whole number"),
        ({"seed": [1]}, "seed mean.s. nothing; known are bundle, settings"),
        ({"benchmarks": {"a": "/nowhere"}}, "benchmarks, a: /nowhere: no such folder"),
        ({"benchmarks": {"a": {"task": "x"}}}, "benchmarks, a: .* must be a path, or an object with path"),
        ({"benchmarks": {"a": {"path": ".", "probes": "voxels"}}}, "a: .*with probes voxels, give path and modality"),
        (
            {"benchmarks": {"a": {"path": "/no", "probes": "voxels", "modality": "ct"}}},
            "benchmarks, a: /no: has neither",
        ),
        ({"settings": 3}, "settings must be an object"),
    ],
)
def test_what_means_nothing_in_a_study_is_named(study, changed, words):
    with pytest.raises(InputError, match=words):
        read_study(study(**changed))


def test_a_probe_that_is_none_is_named_before_a_run_begins(study, images):
    with pytest.raises(InputError, match="benchmarks, a: there is no probe 'knm', but knn, linear"):
        read_study(study(benchmarks={"a": {"path": str(images), "probes": "knm"}}))


@pytest.mark.parametrize("text", ["[]", "{", None])
def test_a_file_that_is_no_study_is_named(tmp_path, text):
    path = tmp_path / "study.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        read_study(path)


def test_a_plan_has_a_line_for_each_run_and_one_for_all(study):
    *lines, total = plan_study(study(), rate=1e12, price=2.0).splitlines()
    assert len(lines) == 1 + 4
    assert lines[0].split()[:5] == ["method", "preset", "modality", "fraction", "seed"]
    plans = [run.plan() for run in read_study(study())]
    assert f"4 runs, {sum(plan.samples for plan in plans):,} images, {sum(plan.flops for plan in plans):.4g}" in total
    with pytest.raises(InputError, match="price needs a rate"):
        plan_study(study(), price=2.0)


def test_a_study_runs_once_and_its_table_can_be_fitted(study, calls, images, tmp_path):
    several = {"path": str(images), "probes": ["knn", "linear", "retrieval"]}
    one = {
        "seeds": [0],
        "benchmarks": {"brightness": several, "linear only": {"path": str(images), "probes": "linear"}},
        "fractions": [0.5],
    }
    path, out = study(**one), tmp_path / "my results"
    calls.broken = ("mae_48",)
    table, failed = run_study(path, out)
    assert list(failed) == ["mae_48_all_0.5_0"]
    assert failed["mae_48_all_0.5_0"].endswith("log.txt: it is broken. Mend it.")
    assert len(calls) == 2 + 1
    assert set(pd.read_parquet(table)["run"]) == {"mae_24_all_0.5_0"}

    calls.broken = ()
    calls.clear()
    presets = WIDTHS | {"12": {"encoder#embed_dim": 12, "encoder#depth": 1, "encoder#num_heads": 3}}
    path = study(presets=presets, **one)
    assert run_study(path, out, workers=2) == (table, {})
    assert len(calls) == 2 * 2
    assert not any("mae_24" in call for call in calls)
    rows = pd.read_parquet(table)
    assert len(rows) == 3 * (3 + 1)
    assert not rows.duplicated(["run", "task", "protocol"]).any()
    found = rows[rows["protocol"] == "retrieval probe"].filter(regex="average_precision|precision_at")
    assert len(found) == 3
    assert len(found.columns) == 4 + 2
    assert found.stack().between(0, 1).all()
    probed = rows[rows["protocol"].isin(["knn probe", "linear probe"])]
    assert len(probed) == 3 * 3
    assert probed[["auc", "accuracy", "random_init_auc", "raw_pixels_auc"]].stack().between(0, 1).all()
    assert (rows["samples"] == 24).all()
    assert (rows["images"] == 5).all()
    for run, row in zip(read_study(path), rows[::4].to_dict("records"), strict=True):
        assert row["flops"] == pytest.approx(run.plan().flops)
        assert row["encoder_parameters"] == run.plan().encoder_parameters
        assert row["seconds"] > 0

    for by, missing in ((["method", "task"], "protocol"), (["method", "protocol"], "task")):
        with pytest.raises(InputError, match=f"differ in {missing}"):
            fit_table(table, "flops", "auc", by)
    by = ["protocol", "task"]
    assert [label for label, _ in groups_of(rows, by, ["auc"])] == [
        "knn probe, brightness", "linear probe, brightness", "linear probe, linear only",
    ]  # fmt: skip
    assert [label for label, _ in groups_of(rows, by, ["mean_average_precision"])] == ["retrieval probe, brightness"]
    fits = fit_table(table, "encoder_parameters", "loss", by)["fits"]
    assert set(fits) == {f"{row.protocol}, {row.task}" for row in rows.itertuples()}
    changed = {**SMALL, "batch_size": 8, "dataset_dir": str(images)}
    with pytest.raises(InputError, match=r"otherwise: settings batch_size: 4 before, 8 now\. Give another --out"):
        run_study(study(settings=changed, **one), out)


def test_a_study_that_is_killed_goes_on_where_it_was(study, images, calls, tmp_path):
    settings = {**SMALL, "dataset_dir": str(images), "steps_per_epoch": 15, "train#handlers#1#interval": 1}
    path, out = study(settings=settings, seeds=[0], benchmarks=None), tmp_path / "out"
    first, second = (out / "runs" / run.name for run in read_study(path))
    deadline = time.monotonic() + 200
    with started(["-m", "biovfm_monai.cli", "scale", "run", path, "--out", out], tmp_path) as (process, printed):
        while not (first / "eval/log.jsonl").exists():
            assert process.exitcode is None, printed[1].read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    # The training has outlived what started it.
    with launch.alone(first / ".lock"):
        assert (first / "models/encoder.safetensors").exists()
    assert not (out / "runs.parquet").exists()
    table, failed = run_study(path, out)
    assert failed == {}
    assert len(calls) == 2
    rows = pd.read_parquet(table)
    assert list(rows["run"]) == [first.name, second.name]
    for folder in (first, second):
        steps = [json.loads(line)["step"] for line in (folder / "eval/log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 31))
        assert encoder_info(folder / "models/encoder.safetensors")["training"]["samples_seen"] == 120
    assert list(rows["samples"]) == [120, 120]


@pytest.mark.parametrize(("given", "workers", "threads"), [(None, 2, "3"), (None, 8, "1"), ("5", 2, "5")])
def test_runs_beside_each_other_share_out_the_cores(study, calls, tmp_path, monkeypatch, given, workers, threads):
    monkeypatch.setattr(execute.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    calls.broken = ("run",)
    _, failed = run_study(study(presets={"24": WIDTHS["24"]}, seeds=[0]), tmp_path / "out", workers=workers)
    assert len(failed) == 1
    assert calls.threads == threads


def test_what_encoders_say_of_voxels_is_a_row_of_a_study(study, calls, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(10):
        mask = np.zeros((32, 32), np.uint8)
        row, column = rng.integers(0, 20, 2)
        mask[row : row + 12, column : column + 12] = 1
        for kind, of in (("images", 150 * mask + rng.integers(0, 90, mask.shape)), ("labels", mask)):
            (tmp_path / "squares" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(of.astype(np.uint8)).save(tmp_path / "squares" / kind / f"{number}.png")
    squares = {"path": str(tmp_path / "squares"), "probes": "voxels", "modality": "xray"}
    path = study(presets={"24": WIDTHS["24"]}, seeds=[0], benchmarks={"squares": squares})
    table, failed = run_study(path, tmp_path / "out")
    assert failed == {}
    (row,) = pd.read_parquet(table).to_dict("records")
    assert (row["task"], row["protocol"]) == ("squares", "voxels probe")
    assert row["dice"] > 0.7
    assert row["raw_pixels_dice"] > 0.7


def test_subsets_of_several_modalities_are_runs_with_the_images_of_each(study, calls, images, tmp_path):
    sections = json.loads((images / "datalist.json").read_text())
    kinds = ("xray", "ct", "mri", "ct", "xray")
    items = [
        {**item, "image": str(images / item["image"]), "modality": kind}
        for item, kind in zip(sections["training"], kinds, strict=False)
    ]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items}))
    subsets = {"radiology": ["ct", "mri"], "all": None, "absent": ["ct", "pet"]}
    path = study(
        settings={**SMALL, "dataset_dir": str(tmp_path), "max_epochs": 1}, presets={"24": WIDTHS["24"]}, seeds=[0],
        modalities=subsets, benchmarks=None,
    )  # fmt: skip
    table, failed = run_study(path, tmp_path / "out")
    rows = pd.read_parquet(table).set_index("modality")
    assert dict(rows["images"]) == {"radiology": 3, "all": 5}
    (reason,) = failed.values()
    assert "not of modality 'pet' but ct, mri, xray, as all" in reason


@pytest.mark.slow
def test_rates_of_short_runs_give_networks_budgets_that_take_them_the_same_time(study, calls, images, tmp_path):
    settings = {**SMALL, "dataset_dir": str(images), "max_epochs": 1, "train#handlers#1#interval": 1}
    short = study(settings=settings, seeds=[0], benchmarks=None)
    run_study(short, tmp_path / "short")
    presets, speeds = {}, {}
    for run in read_study(short):
        log = tmp_path / "short/runs" / run.name / "eval/log.jsonl"
        width, last = run.about["preset"], json.loads(log.read_text().splitlines()[-1])
        speeds[width] = last["images_per_second"]
        presets[width] = WIDTHS[width] | {"budget": f"{600 * measured_rate(str(log))} flops"}
    for run in read_study(study(settings=settings, presets=presets, seeds=[0], benchmarks=None)):
        plan, speed = run.plan(), speeds[run.about["preset"]]
        epoch = plan.batch_size * settings["steps_per_epoch"] / speed
        assert plan.samples / speed == pytest.approx(600, abs=epoch / 2 + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_cluster_does_what_processes_here_do(study, tmp_path, launcher, package):
    pytest.importorskip(package)
    broken = study(presets={"24": WIDTHS["24"]}, seeds=[0], benchmarks=None, settings={**SMALL, "dataset_dir": "none"})
    _, failed = run_study(broken, tmp_path / "out", launcher, options={"timeout_min": 5})
    (reason,) = failed.values()
    assert "none: no such folder" in reason
    whole = study(presets={"24": WIDTHS["24"]}, seeds=[0], benchmarks=None)
    table, failed = run_study(whole, tmp_path / "good", launcher, options={"timeout_min": 5})
    assert failed == {}
    assert len(pd.read_parquet(table)) == 1


@pytest.mark.parametrize(("launcher", "words"), [("k8s", "launcher 'k8s' is unknown"), ("ray", "needs ray. Install")])
def test_a_launcher_that_is_not_there_is_named(study, tmp_path, monkeypatch, launcher, words):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=words):
        run_study(study(), tmp_path / "out", launcher)


def test_a_run_that_goes_wrong_in_a_way_nobody_foresaw_does_not_end_the_others(study, calls, tmp_path, monkeypatch):
    def note(folder, run):
        if "mae_24" in folder.name:
            raise IndexError("list index out of range")
        original(folder, run)

    original = execute._note_training
    monkeypatch.setattr(execute, "_note_training", note)
    table, failed = run_study(study(seeds=[0], benchmarks=None), tmp_path / "out")
    assert failed == {"mae_24_all_1_0": "IndexError: list index out of range"}
    assert set(pd.read_parquet(table)["run"]) == {"mae_48_all_1_0"}


def test_a_gpu_is_kept_by_a_training_that_outlives_what_started_it(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with launch.gpu(tmp_path) as (device, locks):
        assert device == "2"
        held = [lock.fileno() for lock in locks]
        sleeping = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held)
    with launch.gpu(tmp_path) as (device, _):
        assert device == "5"
    sleeping.communicate(b"\n", timeout=60)
    with launch.gpu(tmp_path) as (device, _):
        assert device == "2"


def test_runs_on_one_machine_take_gpus_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with launch.gpu(tmp_path) as (first, _), launch.gpu(tmp_path) as (second, _), launch.gpu(tmp_path) as (third, _):
        assert (first, second, third) == ("2", "5", "2")
    with launch.gpu(tmp_path) as (again, _):
        assert again == "2"


def test_the_commands_plan_and_run(study, calls, tmp_path, monkeypatch, capsys):
    path = study(presets={"24": WIDTHS["24"]}, seeds=[0], benchmarks=None)
    for arguments in (["plan", path], ["run", path, "--out", tmp_path / "out"]):
        monkeypatch.setattr(cli.sys, "argv", ["biovfm", "scale", *map(str, arguments)])
        cli.main()
    printed = capsys.readouterr().out
    assert "1 runs, 24 images" in printed
    assert f"{tmp_path / 'out'}/runs.parquet: ready." in printed
    calls.broken = ("run",)
    monkeypatch.setattr(cli.sys, "argv", ["biovfm", "scale", "run", str(study(seeds=[3])), "--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"2 run\(s\) failed, and the same command tries them again\. mae_24_all_1_3"):
        cli.main()
