"""From files to a packed store."""

from __future__ import annotations

from typing import Any

from biovfm_monai.errors import InputError

__all__ = ["index", "pack", "verify"]


def index(
    *paths: str,
    out: str = "datalist.json",
    modality: str | None = None,
    settings: Any = None,
    validation: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    salt: str | None = None,
    num_workers: int = 1,
) -> str:
    r"""Describe all images below folders in one datalist, with rejected.csv and thumbnails.png beside it.

    Args:
        *paths: folders, image files, datalists (.json), or tables with a column "image" (.csv).
        out: .json or .parquet file to write.
        modality: of the images that neither a header nor a folder's name gives one.
        settings: fields by regular expression of the path, such as "{'(P[0-9]+)_t2':{'subject':'\1'}}";
            None leaves images out, as in "{'_mask':None}".
        validation: share of the subjects that are for validation.
        test: share of the subjects that are for testing.
        seed: of that split.
        salt: secret word, to give a patient the same subject in other datalists, too.
        num_workers: processes that read headers.
    """
    options = {name: value for name, value in locals().items() if name not in ("paths", "out")}
    if not paths:
        raise InputError("name at least one folder or file.")
    from biovfm_monai.data import index as run  # noqa: PLC0415

    return run([str(path) for path in paths], str(out), **options | {"salt": None if salt is None else str(salt)})


def pack(
    datalist: str,
    out: str,
    spacing: Any = None,
    presets: Any = None,
    modality: str | None = None,
    exclude_benchmark: Any = (),
    salt: str | None = None,
    num_workers: int = -1,
) -> str:
    """Read, prepare and store every image of a datalist; stopped at any moment, the same command goes on.

    Args:
        datalist: .json or .parquet file, or a folder of images.
        out: folder of the store, which can then be a --dataset_dir.
        spacing: mm along depth, height and width to resample volumes to, such as [2,1,1].
        presets: options of the modalities' presets, such as "{'ct':{'window':'lung'}}".
        modality: of the images of a folder that neither a header nor a folder's name gives one.
        exclude_benchmark: stores of evaluation sets, images of which are left out and listed.
        salt: secret word, to give a subject the same name in other stores, too.
        num_workers: processes; -1 for all cores.
    """
    from biovfm_monai.data import pack as run  # noqa: PLC0415

    benchmarks = [exclude_benchmark] if isinstance(exclude_benchmark, str) else exclude_benchmark
    salt = None if salt is None else str(salt)
    return run(str(datalist), str(out), spacing, presets, modality, [str(b) for b in benchmarks], salt, num_workers)


def verify(store: str, num_workers: int = -1) -> str:
    """Read all of a store, and compare each image with the checksum that it was packed with.

    Args:
        store: folder that `biovfm pack` wrote.
        num_workers: processes; -1 for all cores.
    """
    from biovfm_monai.data import verify as run  # noqa: PLC0415

    return run(str(store), num_workers)
