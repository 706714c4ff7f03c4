"""Laws of scores over size: published ones come back, planted ones are covered, noise is none."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy.optimize import curve_fit
from scipy.stats import linregress, t

from biovfm_monai import cli, networks
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.scaling import LogLinear, PowerLaw, fit_law, fit_runs, fit_table

PUBLISHED = ROOT / "docs/results/biovfm_published.csv"
PRINTED = {
    "DINOv2": {
        "derma": 0.0223, "pneumonia": 0.0031, "breast": 0.0124, "chest": 0.0224, "oct": 0.0141, "retina": 0.0025,
        "blood": 0.0016, "tissue": 0.0224, "organa": 0.0020, "organc": 0.0024, "organs": 0.0038, "path": 0.0017,
    },
    "MAE": {
        "derma": 0.0269, "pneumonia": 0.0134, "breast": 0.0318, "chest": 0.0452, "oct": 0.0692, "retina": 0.0094,
        "blood": 0.0037, "tissue": 0.0240, "organa": 0.0044, "organc": 0.0063, "organs": 0.0040, "path": 0.0015,
    },
}  # fmt: skip


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def slopes(x):
    fits = fit_table(PUBLISHED, x, "auc", ["method", "task"], law="log-linear", draws=1)["fits"]
    return {name: fit["parameters"]["slope"]["value"] for name, fit in fits.items()}


def test_the_published_slopes_come_back_out_of_the_published_table():
    found = slopes("published_parameters")
    assert round(found["DINOv2, mean"], 4) == 0.0088
    assert round(found["MAE, mean"], 4) == 0.0191
    printed = {f"{method}, {task}": k for method, tasks in PRINTED.items() for task, k in tasks.items()}
    assert {name: found[name] for name in printed} == pytest.approx(printed, abs=3e-4)


def test_over_the_encoders_own_parameters_the_published_means_grow_by_a_third_less():
    found = slopes("encoder_parameters")
    assert (round(found["DINOv2, mean"], 4), round(found["MAE, mean"], 4)) == (0.0058, 0.0124)


def test_the_published_table_has_the_parameters_of_the_encoders_and_the_mean_of_the_tasks():
    table = pd.read_csv(PUBLISHED)
    for size, rows in table.groupby("size"):
        with torch.device("meta"):
            encoder = getattr(networks, f"vit_{size}")()
        # Theirs learn the positions of 196 patches and the class token, which ours compute.
        count = sum(p.numel() for p in encoder.parameters()) + 197 * encoder.embed_dim
        assert set(rows.encoder_parameters) == {round(count / 1e6, 2)}
    for _, rows in table.groupby(["method", "size"]):
        mean = rows[rows.task == "mean"].auc.item()
        assert rows[rows.task != "mean"].auc.mean() == pytest.approx(mean, abs=0.02)


def test_a_power_law_is_that_of_scipys_curve_fit(rng):
    x = np.repeat(np.geomspace(5, 300, 6), 3)
    y = 100 - (20 * (x / 5) ** -0.4 + 4) + 0.2 * rng.standard_normal(18)
    expected, _ = curve_fit(
        lambda x, a, b, c: 100 - b * (x / 5) ** -a - c, x, y, p0=[0.5, 10, 1], bounds=(0, np.inf), xtol=1e-13
    )
    assert fit_law(PowerLaw(100, 5), x, y, draws=1).found == pytest.approx(expected, rel=1e-4)


def test_many_series_fitted_at_once_are_those_fitted_one_by_one_by_scipy(rng):
    x, law = np.repeat(np.geomspace(5, 300, 5), 2), PowerLaw(100, 5)
    errors = 15 * (x[:, None] / 5) ** -0.5 + 2 + 0.3 * rng.standard_normal((10, 20))
    one_by_one = np.concatenate([law.fit(x, errors[:, [i]]) for i in range(20)], 1)
    squares = [((law.curve(x, p) - errors) ** 2).sum(0) for p in (law.fit(x, errors), one_by_one)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-3)


def test_intervals_of_the_log_linear_law_are_students(rng):
    x = np.geomspace(5, 300, 6)
    y = 80 * x**0.02 * np.exp(0.01 * rng.standard_normal(6))
    line = linregress(np.log(x), np.log(y))
    half = t.ppf(0.975, 4) * line.stderr
    low, high = fit_law(LogLinear(), x, y, draws=40_000).intervals()["slope"]["interval"]
    assert (low, high) == pytest.approx((line.slope - half, line.slope + half), abs=0.05 * half)


def test_the_band_of_the_log_linear_law_is_students(rng):
    x = np.geomspace(5, 300, 6)
    y = 80 * x**0.02 * np.exp(0.01 * rng.standard_normal(6))
    line, middle = linregress(np.log(x), np.log(y)), np.log(x).mean()
    curve = {name: np.array(of) for name, of in fit_runs(x, y, "log-linear", draws=40_000)[1]["curve"].items()}
    away = np.log(curve["x"]) - middle
    at_middle = np.std(np.log(y) - line.intercept - line.slope * np.log(x), ddof=0) / 2  # sqrt(squares / 4 / 6)
    half = t.ppf(0.975, 4) * np.hypot(at_middle, line.stderr * away)
    assert np.log(curve["y"]) == pytest.approx(line.intercept + line.slope * np.log(curve["x"]))
    for name, sign in (("low", -1), ("high", 1)):
        assert np.log(curve[name] / curve["y"]) == pytest.approx(sign * half, rel=0.05)
    assert curve["x"][[0, -1]] == pytest.approx([5, 300])


def test_a_loss_is_fitted_as_its_mirror_image(rng):
    x = np.geomspace(5, 300, 6)
    loss = 10 * (x / 5) ** -0.5 + 3 + 0.3 * rng.standard_normal(6)
    as_loss, as_score = (fit_runs(x, y, "power", best, 99)[0] for y, best in ((loss, 0), (100 - loss, 100)))
    assert np.allclose(as_loss.draws, as_score.draws)
    assert as_loss.at([5])[0] == pytest.approx(100 - as_score.at([5])[0])


def test_intervals_cover_a_planted_power_law_in_90_to_99_of_200_repetitions(rng):
    x = np.repeat(np.geomspace(5, 300, 6), 3)
    truth, law = np.array([0.5, 10, 3]), PowerLaw(100, 5)
    covered = np.zeros(3)
    for number in range(200):
        y = 97 - 10 * (x / 5) ** -0.5 + 0.3 * rng.standard_normal(18)
        low, high = np.array([of["interval"] for of in fit_law(law, x, y, 300, number).intervals().values()]).T
        covered += (low <= truth) & (truth <= high)
    assert ((covered >= 0.90 * 200) & (covered <= 0.99 * 200)).all(), covered


def test_a_grid_of_pure_noise_is_no_trend_in_nine_of_ten_and_a_planted_slope_is_one(tmp_path):
    rng, x, found = np.random.default_rng(0), np.repeat([1, 4, 16, 64], 3), {0.0: 0, 0.02: 0}
    for slope in found:
        for _ in range(200):
            y = 80 * x**slope + 0.8 * rng.standard_normal(12)
            pd.DataFrame({"x": x, "y": y}).to_csv(tmp_path / "runs.csv")
            fits = fit_table(tmp_path / "runs.csv", "x", "y", law="log-linear", draws=1)["fits"]
            found[slope] += fits["all"]["trend"]
    assert found[0.0] <= 20
    assert found[0.02] >= 190


def test_cross_validation_takes_the_law_that_runs_follow(rng):
    x = np.repeat(np.geomspace(1, 1000, 7), 3)
    noise = 1e-3 * rng.standard_normal(21)
    assert fit_runs(x, 0.7 * x**0.01 + noise, draws=1)[1]["law"] == "log-linear"
    fitted, told = fit_runs(x, 0.9 - 0.3 * x**-0.7 + noise, draws=1)
    assert told["law"] == "power"
    assert told["cross_validation"]["power"] < 0.2 * told["cross_validation"]["constant"]
    assert fitted.found[[0, 2]] == pytest.approx([0.7, 0.1], abs=0.02)


def test_a_fit_says_that_its_points_are_few_and_that_the_ceiling_is_reached(rng):
    few = fit_runs(np.array([1, 2, 4, 8]), np.array([70, 75, 77, 80.0]))[1]["warnings"]
    assert few[0].startswith("too few points: 4 sizes")
    assert few[1].startswith("too few sizes to choose a law")
    x = np.repeat(np.geomspace(1, 1000, 7), 3)
    flat = 90 - 20 * x**-1.5 + 0.2 * rng.standard_normal(21)
    assert "the ceiling is reached" in " ".join(fit_runs(x, flat, "power", draws=9)[1]["warnings"])
    falling = 90 - 20 * x**-0.2 + 0.2 * rng.standard_normal(21)
    assert fit_runs(x, falling, "power", draws=9)[1]["warnings"] == []
    near = fit_runs(x, 99.5 + 0.05 * np.log10(x), "log-linear", draws=9)[1]["warnings"]
    assert "the ceiling is near: 99.65" in near[0]


def test_the_command_fits_groups_of_a_parquet_table_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    pd.read_csv(PUBLISHED).to_parquet(tmp_path / "runs.parquet")
    command = "biovfm scale fit runs.parquet --x encoder_parameters --y auc --by method,task --law power --draws 99"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [*command.split(), "--out", "fit.json"])
    monkeypatch.setattr("sys.excepthook", None)
    cli.main()
    fit = json.loads((tmp_path / "fit.json").read_text())["fits"]["MAE, mean"]
    low, high = fit["parameters"]["exponent"]["interval"]
    assert low < fit["parameters"]["exponent"]["value"] < high
    assert f"MAE, mean: power, exponent {fit['parameters']['exponent']['value']:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, {}, "cannot be read"),
        ([[1, 2], [2, 3]], {"x": "size"}, "has no column size; its columns: x, y"),
        ([], {}, "has no row"),
        ([[1, 2], [2, "good"], [3, 3]], {}, "column 'y' holds no finite number in 1 row(s), first 'good' in row 2"),
        ([[1, 2], [2, None], [3, 3]], {}, "column 'y' holds no finite number in 1 row(s)"),
        ([[0, 2], [2, 2], [3, 3]], {}, "sizes must be finite and above 0"),
        ([[1, 2], [2, 3]], {}, "2 run(s) of 2 size(s) are too few for the log-linear law"),
        ([[1, 2], [2, 3], [3, 4]], {"law": "power"}, "3 run(s) of 3 size(s) are too few for the power law"),
        ([[1, 2], [2, 3], [3, 4]], {"law": "cubic"}, "law 'cubic' is neither"),
        ([[1, 2], [2, 3], [3, 400]], {"law": "power"}, "scores from 2 to 400 have no known best"),
        ([[1, 2], [2, 3], [3, 4]], {"law": "power", "perfect": 3}, "on both sides of the perfect one"),
        ([[1, -2], [2, 3], [3, 4]], {"law": "log-linear"}, "needs scores above 0, got -2"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_fitted_is_refused_in_one_line(tmp_path, rows, options, message):
    if rows is not None:
        with (tmp_path / "runs.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["x", "y"], *rows])
    with pytest.raises(InputError) as error:
        fit_table(tmp_path / "runs.csv", **{"x": "x", "y": "y", "draws": 1} | options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_groups_whose_values_read_alike_are_not_one(tmp_path):
    table = pd.DataFrame({"x": [1, 2, 3] * 2, "auc": 0.9, "a": ["p, q"] * 3 + ["p"] * 3, "b": ["r"] * 3 + ["q, r"] * 3})
    table.to_csv(tmp_path / "t.csv")
    with pytest.raises(InputError, match="two groups of runs are both called 'p, q, r'"):
        fit_table(tmp_path / "t.csv", "x", "auc", ["a", "b"])


def test_a_fit_says_what_it_pools_and_that_falling_scores_may_be_losses(tmp_path):
    table = pd.DataFrame({"x": [1, 2, 4, 8, 16] * 2, "loss": [0.9, 0.7, 0.5, 0.3, 0.2] * 2})
    table["fraction"], table["preset"] = [0.5] * 5 + [1] * 5, table["x"].astype(str)
    table.to_csv(tmp_path / "t.csv")
    (found,) = fit_table(tmp_path / "t.csv", "x", "loss", law="log-linear")["fits"].values()
    said = " ".join(found["warnings"])
    assert "differ in fraction are fitted together" in said
    assert "if they are losses, give --perfect 0" in said
    apart = fit_table(tmp_path / "t.csv", "x", "loss", ["fraction"], law="power", perfect=0)["fits"]
    said = " ".join(warning for of in apart.values() for warning in of["warnings"])
    assert "together" not in said
    assert "losses" not in said


def test_runs_that_disagree_in_protocol_are_not_mixed(tmp_path):
    table = pd.DataFrame({"x": [1, 2, 3, 4], "y": [1, 2, 3, 4], "protocol": ["linear", "linear", "knn", "linear"]})
    table.to_csv(tmp_path / "runs.csv")
    with pytest.raises(InputError, match=r"differ in protocol: knn, linear\. Add protocol to the columns"):
        fit_table(tmp_path / "runs.csv", "x", "y")
