"""`biovfm scale <verb>`: each verb is one call into `evaluation.scaling`."""

from __future__ import annotations

from typing import Any

from biovfm_monai.errors import InputError

__all__ = ["compare", "factors", "fit", "plan", "run"]


def fit(
    table: str,
    x: str,
    y: str,
    by: Any = (),
    law: str | None = None,
    out: str | None = None,
    perfect: float | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> str:
    """Fit a scaling law to a table with one row per run, with intervals, and say what the runs cannot tell.

    Args:
        table: .csv or .parquet file.
        x: column of sizes or costs, such as encoder_parameters.
        y: column of scores.
        by: column, or several such as method,task; rows that agree in them are fitted together.
        law: log-linear, as BioVFM has it, or power, of the error; without it cross-validation over sizes chooses.
        out: .json file to write.
        perfect: score without error, of the power law: 1, 100, or 0 for a loss.
        draws: of the bootstrap.
        seed: of it.
    """
    from biovfm_monai.evaluation.scaling import fit_table, listing  # noqa: PLC0415

    return listing(fit_table(str(table), str(x), str(y), _columns(by), law, out, perfect, draws, seed))


def factors(
    table: str,
    properties: str,
    x: str,
    y: str,
    by: Any = "method",
    task: str = "task",
    out: str | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> str:
    """Correlate the slopes of the log-linear law with properties of the tasks, over tasks.

    Args:
        table: .csv or .parquet file with a row for each run.
        properties: .csv or .parquet file with a row for each task and numbers in its other columns.
        x: column of sizes or costs.
        y: column of scores.
        by: column of methods, or several such as method,protocol.
        task: column of tasks, in both tables.
        out: .csv file to write.
        permutations: of the tests.
        seed: of them.
    """
    from biovfm_monai.evaluation.scaling import factor_table  # noqa: PLC0415

    found, without = factor_table(str(table), str(properties), x, y, _columns(by), task, out, permutations, seed)
    left_out = f"\nLeft out, for want of properties: {', '.join(without)}" if without else ""
    return found.to_string(index=False, float_format="{:.3f}".format) + left_out


def compare(
    table: str,
    x: str,
    y: str,
    by: str = "method",
    at: Any = (),
    within: Any = None,
    law: str | None = None,
    perfect: float | None = None,
    out: str | None = None,
) -> str:
    """Tell which runs no cheaper one beats, and what methods reach at equal cost, by their fitted laws.

    Args:
        table: .csv or .parquet file with a row for each run.
        x: column of costs, such as flops.
        y: column of scores.
        by: column of methods.
        at: cost, or several such as 1e17,1e18, at which to compare; without it one in the middle of all methods' runs.
        within: columns in which runs that are compared agree; without it task, protocol, modality and fraction.
        law: as in `biovfm scale fit`.
        perfect: likewise; 0 for a loss.
        out: .json file to write.
    """
    from biovfm_monai.evaluation.scaling import compare_table, comparison  # noqa: PLC0415

    budgets = [at] if isinstance(at, int | float) else list(at)
    alike = None if within is None else _columns(within)
    return comparison(compare_table(str(table), x, y, by, budgets, alike, law, perfect, out))


def plan(study: str, rate: Any = None, price: float | None = None) -> str:
    """Tell what each run of a study will take, and all together, before any begins.

    Args:
        study: .json file, as docs/scaling.md has it.
        rate: FLOP/s of a device, or the log.jsonl of a run that measured it, for the time.
        price: of a device for an hour, for the cost.
    """
    from biovfm_monai.evaluation.scaling import plan_study  # noqa: PLC0415

    return plan_study(str(study), rate, price)


def run(study: str, out: str = "study", launcher: str = "local", workers: int = 1, options: Any = None) -> str:
    """Pretrain and score all runs of a study; stopped in any way, the same command goes on.

    Args:
        study: .json file, as docs/scaling.md has it.
        out: folder for the runs and their table, runs.parquet.
        launcher: local, ray (extra ray), or slurm (extra slurm), for an array job.
        workers: runs at a time.
        options: of submitit, such as "{'slurm_partition':'gpu','gpus_per_node':1,'timeout_min':600}".
    """
    from biovfm_monai.evaluation.scaling import run_study  # noqa: PLC0415

    table, failed = run_study(str(study), str(out), launcher, workers, options)
    if failed:
        reasons = "; ".join(f"{name} {reason}" for name, reason in failed.items())
        raise InputError(f"{len(failed)} run(s) failed, and the same command tries them again. {reasons}")
    return f"{table}: ready."


def _columns(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else [str(column) for column in given]
