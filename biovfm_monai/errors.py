"""Exceptions for a user's mistake and a run that went wrong, and one way to show what ends one without a traceback."""

from __future__ import annotations

import errno
import logging
import math
import numbers
import re
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

__all__ = [
    "CollapseError", "InputError", "NonFiniteLossError", "UnreadableError", "is_unreadable", "reason_of",
    "report_input_errors", "require_pair", "require_within",
]  # fmt: skip

logger = logging.getLogger(__name__)

_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT,
    errno.EFBIG,
)  # fmt: skip
_LOST = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT)
_REMEDIES = {
    **dict.fromkeys(_UNWRITABLE, "Give another folder, or make room or the right to use it."),
    **dict.fromkeys(_LOST, "Look whether its disk or network is there."),
}
# torch has no error of its own for a process that Gloo does not reach any more.
_LOST_PROCESS = re.compile(r"Dist\w*Error|[Gg]loo")
# Nor does it tell more of a worker of a DataLoader that died.
_LOST_WORKER = re.compile(r"DataLoader worker \([^)]*\) (exited unexpectedly[^.]*|is killed by signal: [^.]*)")


class InputError(ValueError):
    """A file, key or value given by the user cannot be used; the message names it, the rule and the remedy."""


class UnreadableError(InputError):
    """An image's file is broken or gone; the message names it."""


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite; the message says when, and what to try."""


class CollapseError(ArithmeticError):
    """An encoder tells images apart no more; the message says by what that shows, and what to try."""


def require_within(
    least: float, most: float = math.inf, above: bool = False, whole: bool = False, **given: Any
) -> None:
    """Refuse what is no number of a range; of several numbers, each is to be one.

    Args:
        least, most: ends of the range, which are in it.
        above: whether `least` is not.
        whole: whether it has to be a whole number.
        **given: name of an argument -> its value.

    Raises:
        InputError: naming the argument, its value and the rule.
    """
    kind = numbers.Integral if whole else numbers.Real
    for name, value in given.items():
        for number in _listed(value):
            fits = isinstance(number, kind)
            if not (fits and least <= number <= most and not (above and number == least)):
                rule = "" if fits else f"a {'whole ' if whole else ''}number, "
                rule += f"above {least}" if above else f"{least} or more"
                rule += "" if most == math.inf else f", and at most {most}"
                raise InputError(f"{name} {value!r} must be {rule}. Correct it.")


def require_pair(least: float, most: float = math.inf, above: bool = False, **given: Any) -> None:
    """Refuse what is no range inside a range: two numbers as `require_within` takes them, the lower one first."""
    for name, value in given.items():
        require_within(least, most, above, **{name: value})
        pair = _listed(value)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise InputError(f"{name} {value!r} must be two numbers, the lower one first. Correct it.")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _message(error: BaseException | None) -> str | None:
    """The line to show for an error, found among its causes; None when it is a mistake of the program."""
    while error is not None:
        if isinstance(error, InputError | NonFiniteLossError | CollapseError):
            return str(error)
        if isinstance(error, KeyboardInterrupt):
            return "stopped from the keyboard. To go on from the last whole epoch, add --resume True."
        if isinstance(error, OSError) and error.errno in _REMEDIES and error.filename:
            return f"{error.filename}: {error.strerror}. {_REMEDIES[error.errno]}"
        if isinstance(error, RuntimeError) and (lost := _of_lost_process(error)):
            return lost
        # A worker of a DataLoader hands over the text of its traceback, not the exception.
        worker = re.search(rf"^{re.escape(__name__)}\.\w+: (.*)$", str(error), re.MULTILINE)
        if worker:
            return worker.group(1)
        error = error.__cause__
    return None


def _of_lost_process(error: RuntimeError) -> str | None:
    if died := _LOST_WORKER.search(str(error)):
        return (
            f"a process that reads images died ({died.group()}). If memory was short, give more of it, or fewer "
            "--num_workers; if it dies again at the same step, an image breaks its decoder: look for it with "
            "--num_workers 0. Go on with --resume True."
        )
    if not _LOST_PROCESS.search(f"{type(error).__name__} {error}"):
        return None
    reason = re.split(r"[.] |\n", str(error))[0]
    return (
        f"another process was waited for in vain ({reason}). If none says why it ended, a machine, network or disk is "
        "gone or slow. Go on with --resume True; for slow ones, raise the timeout of distributed.initialize."
    )


def is_unreadable(error: BaseException | None) -> bool:
    """Whether an `UnreadableError` is among the causes of an error, itself included."""
    return error is not None and (isinstance(error, UnreadableError) or is_unreadable(error.__cause__))


def reason_of(error: BaseException) -> str:
    """The line of a user's mistake, also where MONAI has wrapped it in an error of its own."""
    return _message(error) or str(error)


def report_input_errors() -> None:
    """Print what ends this process as one line instead of a traceback, unless it is a mistake of the program.

    That is an error of this module, a folder that cannot be written, or the user's Ctrl-C.

    MONAI's config parser and transforms wrap what is raised inside them, so the chain of causes is searched.
    The whole traceback is still logged at level DEBUG.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        message = _message(error)
        if message is None:
            previous(kind, error, traceback)
            return
        logger.debug("where it happened", exc_info=(kind, error, traceback))
        sys.stderr.write(f"error: {message}\n")

    sys.excepthook = hook
