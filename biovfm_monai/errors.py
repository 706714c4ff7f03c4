"""One exception for a user's mistake, and one way to show it without a traceback."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

__all__ = ["InputError", "report_input_errors"]

logger = logging.getLogger(__name__)


class InputError(ValueError):
    """A file, key or value given by the user cannot be used; the message names it, the rule and the remedy."""


def _find(error: BaseException | None) -> BaseException | None:
    while error is not None and not isinstance(error, (InputError, FloatingPointError)):
        error = error.__cause__ or error.__context__
    return error


def report_input_errors() -> None:
    """Print an uncaught `InputError` as one line instead of a traceback, for the rest of this process.

    MONAI's config parser and transforms wrap what is raised inside them, so the chain of causes is searched.
    The whole traceback is still logged at level DEBUG.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        mistake = _find(error)
        if mistake is None:
            previous(kind, error, traceback)
            return
        logger.debug("where it happened", exc_info=(kind, error, traceback))
        sys.stderr.write(f"error: {mistake}\n")

    sys.excepthook = hook
