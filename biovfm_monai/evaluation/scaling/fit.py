"""Laws fitted to runs, with intervals, a choice between them and a word on what the runs cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import linregress

from biovfm_monai.errors import InputError, require_within
from biovfm_monai.evaluation.scaling.laws import Law, LogLinear, PowerLaw, perfect_score

__all__ = ["FittedLaw", "cross_validate", "fit_law", "fit_runs", "limits", "trend_p_value"]

LEVEL = 0.95
_FEW_SIZES = 5
_NEAR_PERFECT = 0.01
_POINTS = 40


@dataclass(frozen=True)
class FittedLaw:
    """A law with the parameters that fit, and those of bootstrap draws.

    The bootstrap is over runs: each draw gives every run the fitted score plus normal noise, whose standard deviation
    is that of the residuals times sqrt(df / chi2 of df), df runs less parameters. So it holds, too, for few runs, where
    resampling them would give intervals that are too narrow; of the log-linear law it is Student's interval. Noise is
    taken to be as large at all sizes.

    Args:
        law: what was fitted.
        found: its parameters.
        draws: parameters x draws.
        spread: standard deviation of the residuals, on the law's scale.
        r2: share of the variance explained, on the law's scale.
    """

    law: Law
    found: np.ndarray
    draws: np.ndarray
    spread: float
    r2: float

    def intervals(self) -> dict[str, dict[str, Any]]:
        """Name of a parameter -> "value" and 95 % "interval"."""
        return {
            name: {"value": float(value), "interval": interval}
            for name, value, interval in zip(self.law.parameters, self.found, limits(self.draws), strict=True)
        }

    def curve(self, x: np.ndarray) -> dict[str, list[float]]:
        """Scores from the smallest to the largest of sizes: "x", "y", and "low" and "high", ends of 95 % at each."""
        sizes = np.geomspace(x.min(), x.max(), _POINTS)
        scores, draws = self.at(sizes)
        low, high = zip(*limits(draws), strict=True)
        return {"x": sizes.tolist(), "y": scores.tolist(), "low": list(low), "high": list(high)}

    def at(self, x: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores at sizes, and sizes x draws of them."""
        x = np.asarray(x, float)
        return self.law.predict(x, self.found[:, None])[:, 0], self.law.predict(x, self.draws)


def limits(draws: np.ndarray) -> list[list[float]]:
    """Ends of the central 95 % of each row."""
    tail = 50 * (1 - LEVEL)
    return [[float(low), float(high)] for low, high in np.percentile(draws, [tail, 100 - tail], axis=1).T]


def fit_law(law: Law, x: np.ndarray, y: np.ndarray, draws: int = 2000, seed: int = 0) -> FittedLaw:
    """Fit a law to runs.

    Args:
        law: `LogLinear` or `PowerLaw`.
        x: size or cost of each run, above 0.
        y: its score.
        draws: of the bootstrap.
        seed: of it.

    Raises:
        InputError: when there are no more runs, or fewer sizes, than parameters, or scores are none of this law.
    """
    require_within(1, whole=True, draws=draws)
    parameters, sizes = len(law.parameters), len(np.unique(x))
    if len(x) <= parameters or sizes < max(parameters, 3):
        raise InputError(
            f"{len(x)} run(s) of {sizes} size(s) are too few for the {law.name} law with {parameters} parameters, "
            f"which needs {parameters + 1} runs of {max(parameters, 3)} sizes. Add runs."
        )
    scaled = law.scale(y)[:, None]
    found = law.fit(x, scaled)
    fitted = law.curve(x, found)
    freedom, left = len(x) - parameters, float(((scaled - fitted) ** 2).sum())
    spread = np.sqrt(left / freedom)
    random = np.random.default_rng(seed)
    noise = spread * random.standard_normal((len(x), draws)) * np.sqrt(freedom / random.chisquare(freedom, draws))
    total = float(((scaled - scaled.mean()) ** 2).sum())
    replicates = law.fit(x, np.concatenate([fitted + noise, fitted], 1))[:, :draws]
    return FittedLaw(law, found[:, 0], replicates, float(spread), 1 - left / total if total else 0.0)


def law_named(name: str, x: np.ndarray, y: np.ndarray, perfect: float | None = None) -> Law:
    """The law of a name, for given runs.

    Args:
        name: log-linear or power.
        x, y: the runs.
        perfect: score without error; None for what `perfect_score` says.

    Raises:
        InputError: when there is no such law, or scores lie on both sides of the perfect one.
    """
    if name == "log-linear":
        return LogLinear()
    if name != "power":
        raise InputError(f"law {name!r} is neither log-linear nor power. Correct --law.")
    perfect = perfect_score(y) if perfect is None else float(perfect)
    if y.min() < perfect < y.max():
        raise InputError(f"scores lie on both sides of the perfect one, {perfect:g}. Correct --perfect.")
    return PowerLaw(perfect, float(x.min()), falling=bool(y.max() > perfect or perfect == 0))


def cross_validate(law: Law | None, x: np.ndarray, y: np.ndarray) -> float | None:
    """Root mean square error of scores at each size, predicted from all other sizes; None where too few are left.

    Args:
        law: what predicts; None for the mean of the other scores.
        x, y: the runs.
    """
    sizes, parameters = np.unique(x), 0 if law is None else len(law.parameters)
    if len(sizes) - 1 <= parameters or len(sizes) < 3:
        return None
    errors = []
    for size in sizes:
        out = x == size
        if law is None:
            predicted = y[~out].mean()
        else:
            predicted = law.predict(x[out], law.fit(x[~out], law.scale(y)[~out, None]))[:, 0]
        errors.append(np.square(y[out] - predicted))
    return float(np.sqrt(np.concatenate(errors).mean()))


def trend_p_value(x: np.ndarray, y: np.ndarray) -> float:
    """Probability of a slope of scores over ln size as steep by chance alone, by the t test of least squares."""
    return 1.0 if np.ptp(y) == 0 else float(linregress(np.log(x), y).pvalue)


def fit_runs(
    x: np.ndarray, y: np.ndarray, law: str | None = None, perfect: float | None = None, draws: int = 2000, seed: int = 0
) -> tuple[FittedLaw, dict[str, Any]]:
    """Fit the law asked for, or the one that predicts left-out sizes better.

    Args:
        x: size or cost of each run.
        y: its score.
        law: log-linear or power; None for a choice by cross-validation over sizes.
        perfect, draws, seed: as in `law_named` and `fit_law`.

    Returns:
        The law, and what is to be told: its "parameters" with intervals, its "curve", "r2", "trend_p_value",
        "cross_validation" (errors of left-out sizes, of the laws and of the "constant" mean), "warnings".

    Raises:
        InputError: as they do, and on sizes that are not above 0, or numbers that are not finite.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()):
        raise InputError("sizes must be finite and above 0, and scores finite. Correct or leave out those rows.")
    errors: dict[str, float | None] = {"constant": cross_validate(None, x, y)}
    for name in ("log-linear", "power"):
        # What is not asked for may be impossible, such as a power law without a perfect score.
        if law in (None, name):
            errors[name] = cross_validate(law_named(name, x, y, perfect), x, y)
    known = {name: error for name, error in errors.items() if error is not None and name != "constant"}
    chosen = law or (min(known, key=known.__getitem__) if len(known) == 2 else "log-linear")
    fitted = fit_law(law_named(chosen, x, y, perfect), x, y, draws, seed)
    return fitted, {
        "law": chosen, "runs": len(x), "sizes": len(np.unique(x)), "parameters": fitted.intervals(),
        "curve": fitted.curve(x), "r2": fitted.r2,
        "trend_p_value": trend_p_value(x, y), "cross_validation": errors,
        "warnings": _warnings(fitted, x, y, perfect, unchosen=law is None and len(known) < 2),
    }  # fmt: skip


def _warnings(fitted: FittedLaw, x: np.ndarray, y: np.ndarray, perfect: float | None, unchosen: bool) -> list[str]:
    found, sizes, largest = [], len(np.unique(x)), x.max()
    if sizes < _FEW_SIZES:
        found.append(f"too few points: {sizes} sizes; with fewer than {_FEW_SIZES} a law is hardly tested.")
    if unchosen:
        found.append("too few sizes to choose a law by cross-validation: log-linear was taken.")
    if perfect is None and trend_p_value(x, y) < 1 - LEVEL and np.polyfit(np.log(x), y, 1)[0] < 0:
        found.append("scores fall with size: if they are losses, give --perfect 0.")
    law, score = fitted.law, float(y[x == largest].mean())
    if isinstance(law, PowerLaw):
        exponent, irreducible = fitted.found[0], fitted.found[2]
        falling = float(law.curve(np.array([largest]), fitted.found[:, None])[0, 0] - irreducible)
        if falling < fitted.spread:
            found.append(
                f"the ceiling is reached: at the largest size {falling:.3g} of the error still falls, less than the "
                f"runs' spread of {fitted.spread:.3g}."
            )
        if not 1.01e-3 < exponent < 3.99:
            found.append("the exponent is at the end of its range: these runs do not tell it.")
    elif perfect is not None or (y.min() >= 0 and y.max() <= 100):
        best = perfect_score(y) if perfect is None else perfect
        if best and abs(best - score) < _NEAR_PERFECT * abs(best):
            found.append(
                f"the ceiling is near: {score:.4g} at the largest size, of {best:g} at most, and a law without a "
                "ceiling passes it. Take --law power."
            )
    return found
