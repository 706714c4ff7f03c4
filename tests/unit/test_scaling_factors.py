"""What the benefit of scaling goes with, and methods at equal cost."""

import gzip
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from sklearn.datasets import make_blobs

from biovfm_monai import cli
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.scaling import (
    compare_at,
    compare_table,
    compressibility,
    correlate,
    factor_table,
    frontier,
    label_noise,
    optimal_size,
    separation,
)  # fmt: skip

RESULTS = ROOT / "docs/results"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_published_correlations_come_back_and_none_is_beyond_chance():
    found, without = factor_table(
        RESULTS / "biovfm_published.csv", RESULTS / "biovfm_tasks.csv", "published_parameters", "auc"
    )
    r = found.set_index(["factor", "method"]).r.round(2)
    assert (r["samples", "DINOv2"], r["samples", "MAE"]) == (0.51, 0.33)
    assert (r["classes", "DINOv2"], r["classes", "MAE"]) == (0.05, -0.24)
    assert found.p_value.min() > 0.05
    assert without == ["mean"]


def test_a_correlations_p_value_is_that_of_all_permutations(rng):
    tasks = list("abcdef")
    benefits = pd.DataFrame({"m": [1.0, 2, 3, 4, 5, 6]}, index=tasks)
    properties = pd.DataFrame({"same": [1.0, 2, 3, 4, 5, 6], "other": [3, 1.0, 6, 2, 5, 4]}, index=tasks)
    found = correlate(benefits, properties).set_index("factor")
    # Of 720 orders only the one and its mirror image correlate as much.
    assert found.p_value["same"] == pytest.approx(2 / 720)
    assert found.p_adjusted["same"] == pytest.approx(4 / 720)
    assert found.p_adjusted["other"] == pytest.approx(found.p_value["other"])


def test_properties_without_relation_are_rarely_taken_for_one(rng):
    found = 0
    for number in range(100):
        benefits = pd.DataFrame({"m": rng.standard_normal(12)})
        properties = pd.DataFrame(rng.standard_normal((12, 4)), columns=list("abcd"))
        found += (correlate(benefits, properties, 199, number).p_adjusted < 0.05).any()
    assert found <= 12


def test_compressibility_is_the_median_share_that_gzip_leaves(rng):
    noise, flat = rng.integers(0, 256, (28, 28), np.uint8), np.zeros((28, 28), np.uint8)
    share = len(gzip.compress(noise.tobytes(), 9)) / 784
    assert compressibility([noise]) == share
    assert compressibility([noise, flat, noise[:, ::-1]]) == pytest.approx(share, abs=0.02)
    assert compressibility([flat]) < 0.05
    assert share > 1


def test_separation_falls_when_classes_move_apart_and_heeds_no_units():
    near, labels = make_blobs(300, centers=[[0, 0], [1, 1]], random_state=0)
    far, _ = make_blobs(300, centers=[[0, 0], [8, 8]], random_state=0)
    assert separation(far, labels) < 0.3 * separation(near, labels)
    assert separation(near * [1000, 1], labels) == pytest.approx(separation(near, labels))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15])
def test_label_noise_is_nearly_the_share_of_labels_that_were_swapped(share, rng):
    features, labels = make_blobs(600, centers=[[0, 0], [12, 0], [0, 12]], random_state=0)
    wrong = rng.random(600) < share
    noise = label_noise(features, np.where(wrong, (labels + 1) % 3, labels))
    assert noise == pytest.approx(wrong.mean(), abs=0.025)


def test_the_frontier_has_the_runs_that_no_cheaper_one_beats():
    cost, score = np.array([4, 1, 2, 3, 1, 5.0]), np.array([9, 5, 4, 7, 6, 9.0])
    assert list(frontier(cost, score)) == [4, 3, 0]
    assert list(frontier(cost, -score, falling=True)) == [4, 3, 0]


def test_the_optimal_size_grows_as_it_was_planted():
    # Error of Chinchilla's form with equal exponents, of FLOPs = 6 N D: the best size is the square root of the cost.
    size, cost = (grid.ravel() for grid in np.meshgrid(np.geomspace(1, 100, 9), np.geomspace(1, 1e4, 9)))
    error = size**-0.3 + (cost / size) ** -0.3
    assert optimal_size(cost, error, size, falling=True).found == pytest.approx([0.5, 1], rel=1e-3)


def test_methods_are_compared_at_equal_cost_by_their_laws(rng):
    cost = np.repeat(np.geomspace(1, 100, 6), 3)
    found = {"a - b": 0, "b - c": 0, "a": 0}
    for _ in range(10):
        runs = {
            name: (cost, 100 - best - 20 * cost**-0.5 + 0.1 * rng.standard_normal(18))
            for name, best in (("a", 5), ("b", 6), ("c", 6))
        }
        (row,) = compare_at(runs, [10.0], "power")
        assert row["differences"]["a - b"]["value"] == pytest.approx(1, abs=0.2)
        for pair in ("a - b", "b - c"):
            found[pair] += row["differences"][pair]["beyond_chance"]
        low, high = row["scores"]["a"]["interval"]
        found["a"] += low < 95 - 20 * 10**-0.5 < high
    assert found["a - b"] == 10
    assert found["b - c"] <= 2
    assert found["a"] >= 8


def test_the_commands_print_and_write_what_they_find(tmp_path, monkeypatch, capsys):
    table = [f"{RESULTS}/biovfm_published.csv", *["--x", "encoder_parameters", "--y", "auc"]]
    monkeypatch.setattr("sys.excepthook", None)
    options = ["--properties", f"{RESULTS}/biovfm_tasks.csv", "--out", f"{tmp_path}/f.csv"]
    monkeypatch.setattr("sys.argv", ["biovfm", "scale", "factors", *table, *options])
    cli.main()
    assert "Left out, for want of properties: mean" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "f.csv")) == 4
    options = ["--at", "20,80", "--out", f"{tmp_path}/c.json"]
    monkeypatch.setattr("sys.argv", ["biovfm", "scale", "compare", *table, *options])
    cli.main()
    assert "DINOv2 - MAE: " in capsys.readouterr().out
    written = json.loads((tmp_path / "c.json").read_text())
    assert len(written) == 13
    assert [row["budget"] for row in written["blood"]["equal_cost"]] == [20, 80]
    assert {row["task"] for row in written["blood"]["frontier"]} == {"blood"}


def test_methods_are_compared_among_runs_of_one_task_protocol_and_fraction(tmp_path, monkeypatch):
    grid = itertools.product("ab", ("lung", "blood"), ("knn", "linear"), (0.5, 1), (1, 2, 4, 8))
    table = pd.DataFrame(grid, columns=["method", "task", "protocol", "fraction", "flops"])
    base = {"lung": 0.6, "blood": 0.9}
    table["auc"] = [base[row.task] + 0.01 * (row.method == "a") + 0.001 * row.flops for row in table.itertuples()]
    table.to_csv(tmp_path / "t.csv", index=False)
    found = compare_table(tmp_path / "t.csv", "flops", "auc")
    assert list(found) == [
        ", ".join(k) for k in itertools.product(("blood", "lung"), ("knn", "linear"), ("0.5", "1.0"))
    ]
    for of in found.values():
        assert of["equal_cost"][0]["differences"]["a - b"]["value"] == pytest.approx(0.01, abs=1e-4)
    with pytest.raises(InputError, match="runs of all differ in task: blood, lung"):
        compare_table(tmp_path / "t.csv", "flops", "auc", within=[])
    monkeypatch.setattr("sys.argv", ["biovfm", "scale", "compare", f"{tmp_path}/t.csv", "--x", "flops", "--y", "auc",
                                     "--within", "task,protocol"])  # fmt: skip
    cli.main()


def test_factors_need_numbers_and_methods_may_be_told_apart_by_several_columns(tmp_path):
    rows = itertools.product("ab", ("knn", "linear"), range(5), (1, 2, 4))
    table = pd.DataFrame(rows, columns=["method", "protocol", "task", "size"])
    table["auc"] = 0.5 + 0.01 * table["size"] * table["task"] + (0.1 * (table.protocol == "knn"))
    table.to_csv(tmp_path / "t.csv", index=False)
    tasks = pd.DataFrame({"task": range(5), "images": [1, 3, 4, 7, 9]})
    tasks.to_csv(tmp_path / "tasks.csv", index=False)
    found, _ = factor_table(tmp_path / "t.csv", tmp_path / "tasks.csv", "size", "auc", ["method", "protocol"])
    assert list(found.method) == ["a, knn", "a, linear", "b, knn", "b, linear"]
    tasks.astype({"images": str}).assign(images="many").to_csv(tmp_path / "tasks.csv", index=False)
    with pytest.raises(InputError, match=r"tasks.csv: has no column of numbers besides 'task'"):
        factor_table(tmp_path / "t.csv", tmp_path / "tasks.csv", "size", "auc", ["method", "protocol"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: correlate(pd.DataFrame({"m": [1, 2]}), pd.DataFrame({"f": [1, 2, 3]})), "2 task"),
        (lambda: correlate(pd.DataFrame({"m": [1, 2, 3, 4]}), pd.DataFrame({"f": [1] * 4})), "'f' must be finite"),
        (lambda: label_noise(np.eye(8), [0] * 8), "two classes with 5 images"),
        (lambda: compare_at({"a": (np.arange(1, 5.0), np.arange(4.0))}, [2]), "1 method"),
        (
            lambda: compare_at({name: (np.arange(1, 5.0), np.arange(1, 5.0)) for name in "ab"}, [9]),
            "9 lies outside the costs of a, 1 to 4, where its law is a guess",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_methods_without_a_cost_in_common_are_not_compared(tmp_path):
    pd.DataFrame({"x": [1, 2, 3, 7, 8, 9], "y": [1, 2, 3] * 2, "method": list("aaabbb")}).to_csv(tmp_path / "t.csv")
    with pytest.raises(InputError, match="no cost 'x' lies within the runs of all methods"):
        compare_table(tmp_path / "t.csv", "x", "y")
