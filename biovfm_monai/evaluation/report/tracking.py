"""The numbers of a report as MLflow runs (https://mlflow.org/docs/latest/ml/tracking/), in a file of their own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.report.collect import Run
from biovfm_monai.files import write_atomically

__all__ = ["write_mlflow"]

_EXPERIMENT = "biovfm report"
_AT_ONCE = 1000


def write_mlflow(runs: Sequence[Run], path: str | Path) -> None:
    """Write runs into a SQLite file: curves and scores as metrics, what was trained as parameters.

    Scores have the names "task, score", and " low" and " high" behind them for the ends of an interval. A file that was
    there is replaced, so that a second report makes no duplicates.

    Args:
        runs: as collected.
        path: file to write, for `mlflow ui --backend-store-uri sqlite:///FILE`.

    Raises:
        InputError: when MLflow is not installed.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise InputError("--mlflow needs MLflow. Install biovfm-monai[mlflow].")
    # Else MLflow reports its use to a server as soon as it is imported.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient  # noqa: PLC0415 - an extra, slow to import
    from mlflow.entities import Metric, Param  # noqa: PLC0415

    path = Path(path)
    with write_atomically(path) as draft:
        client = MlflowClient(f"sqlite:///{draft.resolve()}")
        folder = path.resolve().with_name(f"{path.name}_artifacts")
        experiment = client.create_experiment(_EXPERIMENT, artifact_location=folder.as_uri())
        for run in runs:
            key = client.create_run(experiment, start_time=0, run_name=run.name).info.run_id
            about = {**run.about.get("network", {}), **run.about.get("training", {}), "parameters": run.parameters}
            parameters = [Param(_name(name), str(value)[:500]) for name, value in about.items() if value is not None]
            metrics = [Metric(_name(name), value, 0, step) for name, step, value in run.curves.itertuples(index=False)]
            for score in run.scores:
                name = f"{score.task}, {score.name}"
                found = {"": score.value, " low": score.low, " high": score.high}
                metrics += [Metric(_name(name + end), value, 0, 0) for end, value in found.items() if value is not None]
            for first in range(0, len(parameters), 100):
                client.log_batch(key, params=parameters[first : first + 100])
            for first in range(0, len(metrics), _AT_ONCE):
                client.log_batch(key, metrics[first : first + _AT_ONCE])
            client.set_terminated(key, end_time=0)


def _name(text: str) -> str:
    """A name as MLflow takes it."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-. /:") else "_" for letter in text)
    return plain[:250]
