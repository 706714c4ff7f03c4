"""Work shared out by joblib: to this machine's cores or, inside `joblib.parallel_config`, to a cluster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from joblib import Parallel
from joblib.parallel import get_active_backend

__all__ = ["share_out"]


def share_out(jobs: Iterable[Any], num_workers: int, ordered: bool = True) -> Iterable[Any]:
    """The results of delayed calls, as they come; all at the end where the backend, as Ray's, knows no other way.

    Args:
        jobs: made by `joblib.delayed`; taken one by one as workers become free.
        num_workers: processes; -1 for as many as there are cores.
        ordered: whether results come in the order of the jobs.
    """
    backend, _ = get_active_backend()
    as_they_come = "generator" if ordered else "generator_unordered"
    way = as_they_come if backend.supports_return_generator else "list"
    return Parallel(n_jobs=num_workers, return_as=way)(jobs)
