"""Laws of a score over size or cost: as BioVFM published it, and on the error with a part that stays (https://arxiv.org/abs/2001.08361)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import least_squares

from biovfm_monai.errors import InputError

__all__ = ["Law", "LogLinear", "PowerLaw", "perfect_score"]

_EXPONENTS = np.geomspace(1e-3, 4, 64)
_GOLDEN = (np.sqrt(5) - 1) / 2
_STEPS = 14


class Law(Protocol):
    """A curve y(x) whose parameters are least squares of one or many series of scores, with noise on `scale(y)`."""

    @property
    def name(self) -> str:
        """As the command line has it."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what is fitted."""

    def scale(self, y: np.ndarray) -> np.ndarray:
        """Scores on the scale on which squares are summed."""

    def fit(self, x: np.ndarray, scaled: np.ndarray) -> np.ndarray:
        """Parameters x series, of n sizes and n x series scores on that scale."""

    def curve(self, x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Sizes x series on that scale, of parameters x series."""

    def predict(self, x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Scores, sizes x series, of parameters x series."""


@dataclass(frozen=True)
class LogLinear:
    """BioVFM's law, score = factor x size^slope, by ordinary least squares of ln score on ln size."""

    name: str = "log-linear"
    parameters: tuple[str, ...] = ("slope", "factor")

    def scale(self, y: np.ndarray) -> np.ndarray:
        """Map scores to their logarithms.

        Raises:
            InputError: when one is not above 0.
        """
        if y.min() <= 0:
            raise InputError(f"the log-linear law needs scores above 0, got {y.min():g}. Take --law power.")
        return np.log(y)

    def fit(self, x: np.ndarray, scaled: np.ndarray) -> np.ndarray:
        """Slopes and factors of n x series logarithms."""
        slope, intercept = np.polyfit(np.log(x), scaled, 1)
        return np.stack([slope, np.exp(intercept)])

    def curve(self, x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Logarithms of scores."""
        return parameters[0] * np.log(x)[:, None] + np.log(parameters[1])

    def predict(self, x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Scores."""
        return np.exp(self.curve(x, parameters))


@dataclass(frozen=True)
class PowerLaw:
    """A law of the error e = |perfect - score|: e = coefficient x (size / reference)^-exponent + irreducible.

    None of them is below 0, and the exponent is sought between 0.001 and 4.

    Args:
        perfect: score without error, above all scores (1 or 100), or below them (0, for a loss).
        reference: size at which the coefficient is the part of the error that falls; such as the smallest.
        falling: whether scores lie above `perfect`.
    """

    perfect: float
    reference: float = 1.0
    falling: bool = False
    name: str = "power"
    parameters: tuple[str, ...] = ("exponent", "coefficient", "irreducible")

    def scale(self, y: np.ndarray) -> np.ndarray:
        """Map scores to errors."""
        return y - self.perfect if self.falling else self.perfect - y

    def fit(self, x: np.ndarray, scaled: np.ndarray) -> np.ndarray:
        """Exponents, coefficients and irreducible errors of n x series errors.

        One series is fitted by scipy's `least_squares` from the best of a grid of exponents. Many are, for speed, by
        golden-section search of the exponent around theirs, the other two being linear.
        """
        size = np.log(x / self.reference)[:, None]
        grid = np.stack([_linear(np.exp(-a * size), scaled)[2] for a in _EXPONENTS])
        best = grid.argmin(0)
        if scaled.shape[1] == 1:
            return self._polished(x, scaled[:, 0], float(_EXPONENTS[best[0]]))[:, None]
        low, high = (np.log(_EXPONENTS[(best + step).clip(0, len(grid) - 1)]) for step in (-1, 1))
        for _ in range(_STEPS):
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            ahead = [_linear(np.exp(-np.exp(a) * size), scaled)[2] for a in (left, right)]
            keep_left = ahead[0] < ahead[1]
            low, high = np.where(keep_left, low, left), np.where(keep_left, right, high)
        exponent = np.exp((low + high) / 2)
        return np.stack([exponent, *_linear(np.exp(-exponent * size), scaled)[:2]])

    def _polished(self, x: np.ndarray, error: np.ndarray, exponent: float) -> np.ndarray:
        coefficient, irreducible, _ = _linear(((x / self.reference) ** -exponent)[:, None], error[:, None])
        start = np.array([exponent, coefficient[0], irreducible[0]])
        unit = max(float(np.abs(error).max()), np.finfo(float).tiny)
        limits = ([_EXPONENTS[0], 0, 0], [_EXPONENTS[-1], np.inf, np.inf])
        found = least_squares(
            lambda p: (self.curve(x, p[:, None])[:, 0] - error) / unit, np.clip(start, *limits), bounds=limits,
            x_scale=[1, unit, unit], xtol=1e-12, ftol=1e-12, gtol=1e-12,
        )  # fmt: skip
        return np.asarray(found.x)

    def curve(self, x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Errors."""
        return parameters[1] * (x[:, None] / self.reference) ** -parameters[0] + parameters[2]

    def predict(self, x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """Scores."""
        return self.perfect + (1 if self.falling else -1) * self.curve(x, parameters)


def _linear(z: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficient and irreducible error, neither below 0, and the sum of squares left, of each column of n x series."""
    centred, mean = z - z.mean(0), error.mean(0)
    spread = np.maximum((centred**2).sum(0), np.finfo(float).tiny)
    coefficient = (centred * (error - mean)).sum(0) / spread
    irreducible = mean - coefficient * z.mean(0)
    alone = np.maximum((z * error).sum(0) / (z**2).sum(0), 0)
    coefficient = np.where(irreducible < 0, alone, coefficient)
    irreducible = np.maximum(irreducible, 0)
    flat = coefficient <= 0
    coefficient, irreducible = np.where(flat, 0, coefficient), np.where(flat, np.maximum(mean, 0), irreducible)
    return coefficient, irreducible, ((coefficient * z + irreducible - error) ** 2).sum(0)


def perfect_score(y: np.ndarray) -> float:
    """The score without error that a scale suggests: 1 where all scores are from 0 to 1, 100 where they are to 100.

    Raises:
        InputError: when it is neither.
    """
    for perfect in (1.0, 100.0):
        if y.min() >= 0 and y.max() <= perfect:
            return perfect
    raise InputError(
        f"scores from {y.min():g} to {y.max():g} have no known best. Give --perfect: 1, 100, or 0 for a loss."
    )
