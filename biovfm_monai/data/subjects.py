"""Labelled images by subject: parts of a dataset that comes without, and a few subjects in place of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biovfm_monai.data.datalist import DATALIST
from biovfm_monai.data.mixture import Labels, subset
from biovfm_monai.errors import InputError

__all__ = ["few_subjects", "share_out"]

_PARTS = ("training", "training", "training", "validation", "test")
Kind = Callable[[Mapping[str, Any]], str]


def _alike(_: Mapping[str, Any]) -> str:
    return ""


def share_out(folder: Path, items: Sequence[dict[str, Any]], kind: Kind = _alike) -> dict[str, list[dict[str, Any]]]:
    """Three of every five subjects for "training", one for "validation" and one for "test".

    Args:
        folder: for the message.
        items: of a datalist; one without a "subject" is a subject of its own.
        kind: of an item, such as its class: subjects, each of its first item's kind, are shared out kind by kind.

    Raises:
        InputError: when there are some subjects, but fewer than five.
    """
    kinds = _kinds(items, kind)
    if 0 < len(kinds) < len(_PARTS):
        raise InputError(
            f"{folder}: {len(kinds)} labelled subject(s) are too few to share out, {len(_PARTS)} are needed. Write a "
            f'{DATALIST} with "training", "validation" and "test".'
        )
    part, counts = {}, dict.fromkeys(kinds.values(), 0)
    for subject, of in sorted(kinds.items()):
        part[subject] = _PARTS[counts[of] % len(_PARTS)]
        counts[of] += 1
    return {name: [item for item in items if part[_subject(item)] == name] for name in dict.fromkeys(_PARTS)}


def few_subjects(items: Sequence[dict[str, Any]], fraction: float, kind: Kind = _alike) -> list[dict[str, Any]]:
    """The items of a share of the subjects of each kind, always the same ones; a smaller share is part of a larger one.

    Args:
        items, kind: as of `share_out`.
        fraction: as of `subset`.

    Raises:
        InputError: when the fraction means nothing.
    """
    kinds = _kinds(items, kind)
    subjects = sorted(kinds)
    kept = subset(Labels.of([kinds[subject] for subject in subjects]), fraction)
    chosen = {subject for subject, keep in zip(subjects, kept.tolist(), strict=True) if keep}
    return [item for item in items if _subject(item) in chosen]


def _kinds(items: Sequence[Mapping[str, Any]], kind: Kind) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for item in items:
        kinds.setdefault(_subject(item), kind(item))
    return kinds


def _subject(item: Mapping[str, Any]) -> str:
    return str(item.get("subject") or item["image"])
