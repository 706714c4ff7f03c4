"""What the verbs that use images one by one say at their end."""

from __future__ import annotations

from collections.abc import Sequence

from biovfm_monai.errors import InputError

__all__ = ["served"]


def served(out: str, done: int, aside: Sequence[tuple[str, str]]) -> str:
    """Lines to print: what was written, of how many images, and those set aside with the reason.

    Raises:
        InputError: when no image could be used.
    """
    if not done:
        raise InputError(f"no image could be used. {aside[0][1] if aside else 'There is none.'}")
    return "\n".join([f"{out}: ready, {done} image(s).", *(f"set aside: {reason}" for _, reason in aside)])
