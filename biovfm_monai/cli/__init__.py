"""`biovfm <verb>`: each verb is one call into the package (https://github.com/google/python-fire)."""

from __future__ import annotations

import sys
from typing import Any

import fire

from biovfm_monai.cli import scale
from biovfm_monai.cli.bundles import bundle, classify, label_init, plan, segment
from biovfm_monai.cli.data import index, pack, verify
from biovfm_monai.cli.encoders import convert, embed, export, info
from biovfm_monai.cli.scores import probe, probe_voxels, report
from biovfm_monai.errors import report_input_errors

__all__ = ["main"]


def quickstart(folder: str = "biovfm_quickstart", **options: Any) -> str:
    """Pretrain on real images that come with the dependencies, and show what was learnt (about four minutes).

    Args:
        folder: where a copy of the bundle goes when installed without a clone.
        **options: overrides for the bundle, such as --max_epochs 2.
    """
    from biovfm_monai.quickstart import quickstart as run  # noqa: PLC0415 - MONAI takes seconds to import

    return run(folder, options)


def main() -> None:
    """Entry point of the `biovfm` command."""
    report_input_errors()
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments) and "--" not in arguments:
        # A verb that takes any option would take this one, too, and begin its work.
        arguments = [text for text in arguments if text not in ("--help", "-h")] + ["--", "--help"]
    fire.Fire(
        {
            "quickstart": quickstart,
            "index": index,
            "pack": pack,
            "verify": verify,
            "embed": embed,
            "probe": probe,
            "probe_voxels": probe_voxels,
            "segment": segment,
            "classify": classify,
            "info": info,
            "plan": plan,
            "scale": {name: getattr(scale, name) for name in scale.__all__},
            "report": report,
            "bundle": bundle,
            "label": {"init": label_init},
            "convert": convert,
            "export": export,
        },
        command=arguments,
        name="biovfm",
    )
