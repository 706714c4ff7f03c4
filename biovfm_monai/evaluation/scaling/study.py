"""A study: pretraining runs over a grid of networks, methods, data and seeds, read from one file and planned."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from biovfm_monai import networks
from biovfm_monai.engines import Plan, make_plan, measured_rate, plan_cells, table_of
from biovfm_monai.errors import InputError, reason_of, require_within
from biovfm_monai.evaluation.scaling.score import require_benchmark
from biovfm_monai.shipped import shipped_folder

__all__ = ["FRACTION", "StudyRun", "plan_study", "read_study"]

FRACTION = "train#dataset#fraction"
_AXES = {"methods": "method", "presets": "preset", "modalities": "modality", "fractions": "fraction", "seeds": "seed"}
_KEYS = ("bundle", "settings", "benchmarks", *_AXES)
_DEFAULT: dict[str, Any] = {"fractions": [1], "modalities": ["all"], "seeds": [0]}


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Args:
        about: method, preset, modality, fraction and seed: columns of its rows.
        files: the bundle's train.json, and the method's overlay.
        settings: keys of the configuration -> values, which go on top of them.
        benchmarks: name -> what its encoder is scored on, as from `require_benchmark`.
    """

    about: Mapping[str, Any]
    files: Sequence[str]
    settings: Mapping[str, Any]
    benchmarks: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Of its folder."""
        return re.sub(r"[^\w.+-]+", "_", " ".join(f"{value}" for value in self.about.values()))

    def plan(self) -> Plan:
        """What it takes on one device; of runs that differ in their seed only, it is found once."""
        return _planned(
            tuple(self.files), json.dumps({key: self.settings[key] for key in self.settings if key != "seed"})
        )


@lru_cache
def _planned(files: tuple[str, ...], settings: str) -> Plan:
    return make_plan(files, json.loads(settings))


def read_study(path: str | Path) -> list[StudyRun]:
    """The runs of a study, of each combination of its axes one.

    The file is JSON with "bundle" (name of a shipped one, or a folder), "settings" (keys of its train.json -> values,
    for all runs), "methods" (overlays), "presets" (of `biovfm_monai.networks`), "fractions" of the images, "modalities"
    ("all", or the one that is used), "seeds", and "benchmarks" (name -> as `require_benchmark` takes it). Methods,
    presets and modalities may be an object, name -> settings of its own; a preset or modality then may have any name,
    and of modalities it may be name -> list of those that are used, null for all.

    Raises:
        InputError: when the file is none, or a key or value means nothing.
    """
    study = _read(Path(path))
    bundle = Path(str(study["bundle"])).expanduser()
    folder = bundle if bundle.is_dir() else shipped_folder("bundles") / bundle
    train = folder / "configs/train.json"
    if not train.is_file():
        raise InputError(f"{path}: there is no bundle {study['bundle']!r} to train. Name a shipped one, or a folder.")
    axes = {axis: _choices(path, axis, study.get(axis, _DEFAULT.get(axis))) for axis in _AXES}
    common = dict(study.get("settings", {}))
    if "dataset_dir" in common:
        common["dataset_dir"] = str(Path(common["dataset_dir"]).expanduser().resolve())
    benchmarks = {name: _probed(path, name, given) for name, given in study.get("benchmarks", {}).items()}
    runs = []
    for chosen in itertools.product(*(choices.items() for choices in axes.values())):
        about = {column: name for column, (name, _) in zip(_AXES.values(), chosen, strict=True)}
        settings = common | {key: value for _, own in chosen for key, value in own.items()}
        overlay = shipped_folder("configs") / f"{about['method']}.json"
        runs.append(StudyRun(about, [str(train), str(overlay)], settings, benchmarks))
    return runs


def plan_study(path: str | Path, rate: float | str | None = None, price: float | None = None) -> str:
    """A table of what each run of a study takes on one device, and of what all take.

    Args:
        path: as of `read_study`.
        rate, price: as of `biovfm plan`.

    Raises:
        InputError: when one of them cannot be used.
    """
    speed = None if rate is None else measured_rate(rate)
    if price is not None and speed is None:
        raise InputError("price needs a rate, which tells the time. Give --rate, in FLOP/s of a device.")
    runs = read_study(path)
    plans = [run.plan() for run in runs]
    rows = [
        {name: f"{value}" for name, value in run.about.items()} | plan_cells(plan, speed, price)
        for run, plan in zip(runs, plans, strict=True)
    ]
    total = f"{len(runs)} runs, {sum(plan.samples for plan in plans):,} images, {sum(p.flops for p in plans):.4g} FLOPs"
    if speed is not None:
        hours = sum(plan.hours(speed) for plan in plans)
        total += f", {hours:,.2f} hours of a device" + ("" if price is None else f", {hours * price:,.2f} in all")
    return f"{table_of([[*rows[0]], *([*row.values()] for row in rows)])}\n{total}"


def _read(path: Path) -> dict[str, Any]:
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Give a study's .json.") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}). Correct it.") from error
    if not isinstance(study, dict):
        raise InputError(f"{path}: must be an object with {', '.join(_KEYS)}. Correct it.")
    unknown = [key for key in study if key not in _KEYS]
    if unknown:
        raise InputError(f"{path}: {', '.join(unknown)} mean(s) nothing; known are {', '.join(_KEYS)}. Correct it.")
    for key in ("bundle", "methods", "presets"):
        if key not in study:
            raise InputError(f"{path}: has no {key!r}. Add it.")
    for key in ("settings", "benchmarks"):
        if not isinstance(study.get(key, {}), dict):
            raise InputError(f"{path}: {key} must be an object. Correct it.")
    return study


def _choices(path: str | Path, axis: str, given: Any) -> dict[Any, dict[str, Any]]:
    """Each choice of an axis -> the settings that it stands for."""
    if not isinstance(given, list | dict) or not given:
        raise InputError(f"{path}: {axis} {given!r} must be a list with an entry at least. Correct it.")
    if isinstance(given, list) and any(isinstance(name, list | dict) for name in given):
        raise InputError(f"{path}: {axis} {given!r} must be a list of names, or an object. Correct it.")
    own = given if isinstance(given, dict) else {name: {} for name in given}
    if axis == "modalities":
        own = {name: {"modality": of} if of is None or _is_names(of) else of for name, of in own.items()}
    for name, settings in own.items():
        if not isinstance(settings, dict):
            raise InputError(f"{path}: {axis}, {name}: {settings!r} must be an object of settings. Correct it.")
    return {name: {**_meant(path, axis, name, bool(settings)), **settings} for name, settings in own.items()}


def _is_names(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(name, str) for name in given)


def _meant(path: str | Path, axis: str, name: Any, own: bool) -> dict[str, Any]:
    """What the name of a choice stands for; of a preset with settings of its own it may be any."""
    if axis == "methods":
        overlays = shipped_folder("configs").glob("*.json")
        of = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in overlays}
        # One with an encoder of its own trains something else.
        known = sorted(name for name, content in of.items() if "method" in content and "encoder" not in content)
        if name not in known:
            raise InputError(f"{path}: there is no method {name!r}, but {', '.join(known)}. Correct it.")
        return {}
    if axis == "presets":
        known = sorted(found for found in networks.__all__ if re.match(r"(spad_)?vit_", found))
        if name not in known and not own:
            raise InputError(f"{path}: there is no preset {name!r}, but {', '.join(known)}. Correct it.")
        size = ("in_channels", "img_size", "patch_size")
        target = {"_target_": f"biovfm_monai.networks.{name}", **{key: f"@{key}" for key in size}}
        return {"encoder": target} if name in known else {}
    if axis == "fractions":
        require_within(0, 1, above=True, fractions=name)
        return {FRACTION: name}
    if axis == "seeds":
        require_within(0, whole=True, seeds=name)
        return {"seed": name}
    return {} if name == "all" or own else {"modality": name}


def _probed(path: str | Path, name: str, given: Any) -> dict[str, Any]:
    try:
        # Better now than after hours of training.
        return require_benchmark(given)
    except (InputError, OSError) as error:
        raise InputError(f"{path}: benchmarks, {name}: {reason_of(error)}") from error
