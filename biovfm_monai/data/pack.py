"""Pack the images of a datalist into a store, on all cores, so that it can be stopped and gone on with at any time."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from joblib import delayed
from monai.data import MetaTensor
from tqdm import tqdm

from biovfm_monai.anisotropy import spacing_of
from biovfm_monai.data.datalist import iterate_datalist
from biovfm_monai.data.duplicates import perceptual_hash
from biovfm_monai.data.encoding import checksum_of, encode, frame_of
from biovfm_monai.data.find import hashed, survey, with_modality
from biovfm_monai.data.headers import ARRAYS, NIFTI, PHOTO, TIFF, VOLUME, suffix
from biovfm_monai.data.jobs import share_out
from biovfm_monai.data.join import join_tables
from biovfm_monai.data.preprocessing import ByModalityd, degree_of
from biovfm_monai.data.reading import read_image
from biovfm_monai.data.store import ABOUT, ALIGNMENT, INDEX, shard_name, table_name
from biovfm_monai.errors import InputError, reason_of
from biovfm_monai.files import require_writable, write_atomically, write_json
from biovfm_monai.sheet import middle_slice

__all__ = ["pack"]

_SIZE = ("channels", "depth", "height", "width")
_FIELDS = pa.schema(
    {
        "shard": pa.int32(), "start": pa.uint32(), "bytes": pa.int64(), **{name: pa.int32() for name in _SIZE},
        "dtype": pa.string(), "spacing": pa.list_(pa.float32(), 3), "anisotropy": pa.int8(), "modality": pa.string(),
        "source": pa.string(), "subject": pa.string(), "split": pa.string(), "label": pa.string(),
        "alike": pa.int32(), "checksum": pa.binary(16), "hash": pa.uint64(), "file": pa.string(),
    }
)  # fmt: skip
_SALT = ".salt"
_IMAGES, _VOXELS = 4096, 2**28


def pack(
    datalist: str | Path,
    out: str | Path,
    spacing: Sequence[float] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    modality: str | None = None,
    exclude_benchmark: Sequence[str | Path] = (),
    salt: str | None = None,
    num_workers: int = -1,
) -> str:
    """Read, prepare and store every image of a datalist; what cannot be read is listed in `OUT-rejected.csv`.

    Stopped at any moment, the same call goes on where it was, and the files come out the same to the byte. Of images
    that are the same voxel by voxel the first is kept and the others are listed in `OUT-duplicates.csv`; images that
    are nearly the same are counted, and sampled less often in return. Work is shared out by joblib: inside
    `joblib.parallel_config(backend="dask")`, or "ray", the same call runs on a cluster.

    Args:
        datalist: .json or .parquet file, or a folder of images.
        out: folder of the store.
        spacing: mm along depth, height and width that volumes are resampled to; None to keep theirs.
        presets: options of the modalities' presets, as for `ByModalityd`.
        modality: of the images of a folder, as for `load_datalist`.
        exclude_benchmark: stores whose images, whole or nearly, are left out and listed in `OUT-excluded.csv`.
        salt: makes the subjects' names, so that they are the same in another store; by default a random one.
        num_workers: processes; -1 for as many as there are cores.

    Returns:
        What was stored, and what was left out.

    Raises:
        InputError: when the datalist cannot be used, or the folder holds another store.
    """
    out = Path(out).expanduser().resolve()
    images = _Images(Path(datalist).expanduser().resolve(), modality)
    prepare = ByModalityd("image", spacing, presets)
    sizes, digest = _cut(images)
    about = {
        "format": 1, "spacing": spacing, "presets": presets or {}, "datalist": digest,
        "exclude_benchmark": [_digest_of(Path(path)) for path in exclude_benchmark],
    }  # fmt: skip
    require_writable(out)
    _begin(out, about)
    if (out / INDEX).is_file():
        _tidy(out, len(sizes))
        return f"{out}: was ready already. Remove it to pack again."
    salt = _kept_salt(out, salt)
    todo = [not (out / table_name(number)).is_file() for number in range(len(sizes))]
    shards = ((number, shard) for number, shard in enumerate(_shards(images, sizes)) if todo[number])
    jobs = (delayed(_write_shard)(out, number, shard, prepare, salt) for number, shard in shards)
    try:
        finished = share_out(jobs, num_workers, ordered=False)
        for _ in tqdm(finished, "shards", total=len(sizes), initial=len(sizes) - sum(todo), disable=not any(todo)):
            pass
    except BrokenProcessPool as error:
        raise InputError(
            f"{out}: a process was killed, most likely since memory ran out. Run this again with fewer --num_workers; "
            "what is packed stays."
        ) from error
    report = join_tables(out, len(sizes), exclude_benchmark, images.unread)
    _tidy(out, len(sizes))
    return report


class _Images:
    """The items to pack, as often as they are asked for; a table of millions is read a piece at a time.

    Attributes:
        unread: the files of a folder that cannot be used, with the reason.
    """

    def __init__(self, path: Path, modality: str | None) -> None:
        self._path, self._modality = path, modality
        self._found: list[dict[str, Any]] = []
        self.unread: list[dict[str, str]] = []
        if path.is_dir():
            for found in survey(path):
                for item in found.items:
                    self._found.append(item | ({"subject": item.pop("patient")} if "patient" in item else {}))
                self.unread += [one._asdict() for one in found.rejected]
        elif not (path.suffix in (".json", ".parquet") and path.is_file()):
            raise InputError(f"{path}: no datalist. Write one with `biovfm index`, or name a folder of images.")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        items = self._found if self._path.is_dir() else iterate_datalist(self._path)
        for item in with_modality(items, self._modality):
            if self._modality in (None, item["modality"]):
                yield item

    def __str__(self) -> str:
        return f"{self._path}" + (f" (modality {self._modality})" if self._modality else "")


def _cut(images: _Images) -> tuple[list[int], str]:
    """How many images each file gets, by their number and the size that their headers say; and what the list is."""
    digest = blake2b(digest_size=16)
    sizes: list[int] = []
    voxels = 0
    for item in images:
        digest.update(json.dumps(item, sort_keys=True).encode())
        size = int(np.prod(item.get("shape", [2**20]), dtype=np.int64)) * int(item.get("channels", 1))
        if not sizes or voxels + size > _VOXELS or sizes[-1] == _IMAGES:
            sizes.append(0)
            voxels = 0
        sizes[-1] += 1
        voxels += size
    if not sizes:
        raise InputError(f"{images}: names no image. Index a folder that holds some.")
    return sizes, digest.hexdigest()


def _shards(images: Iterable[dict[str, Any]], sizes: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    items = iter(images)
    for size in sizes:
        yield [*islice(items, size)]


def _digest_of(store: Path) -> str:
    index = store.expanduser().resolve() / INDEX
    if not index.is_file():
        raise InputError(f"{store}: no finished store to exclude. Write it with `biovfm pack`.")
    return blake2b(index.read_bytes(), digest_size=16).hexdigest()


def _begin(out: Path, about: Mapping[str, Any]) -> None:
    """Say what the store is, or check that it is what was begun."""
    path = out / ABOUT
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(about))
        other = [key for key in wanted if there.get(key) != wanted[key]]
        if other:
            raise InputError(
                f"{out}: holds a store of another {' and '.join(other)}. Remove it, or give another --out."
            )
    elif any(path for path in out.iterdir() if path.name != f".{ABOUT}.draft"):
        raise InputError(f"{out}: holds files, but no store. Give an empty folder as --out.")
    else:
        write_json(path, about)


def _kept_salt(out: Path, salt: str | None) -> str:
    """The salt, which lasts until the store is ready, so that all its subjects have the same one."""
    path = out / _SALT
    if not path.is_file():
        with write_atomically(path) as draft:
            draft.write_text(salt or secrets.token_hex(16), encoding="utf-8")
        path.chmod(0o600)
    kept = path.read_text(encoding="utf-8")
    if salt not in (None, kept):
        raise InputError(f"{out}: was begun with another --salt. Give that one, or another --out.")
    return kept


def _tidy(out: Path, count: int) -> None:
    """Remove what only packing needs: the salt, and the shards' tables, in which paths stand."""
    for number in range(count):
        (out / table_name(number)).unlink(missing_ok=True)
    (out / _SALT).unlink(missing_ok=True)


def _write_shard(out: Path, number: int, items: Sequence[dict[str, Any]], prepare: ByModalityd, salt: str) -> None:
    """Write one file of images and, when it is whole, the table of them."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    with write_atomically(out / shard_name(number)) as draft, draft.open("wb") as file:
        for item in items:
            try:
                row, frame = _prepared(item, prepare, salt)
            except (InputError, RuntimeError, MemoryError) as error:
                lacking = f"{_file(item)}: does not fit into memory. Run with fewer --num_workers, or cut it."
                reason = lacking if isinstance(error, MemoryError) else reason_of(error)
                rejected.append({"file": _file(item), "reason": reason})
                continue
            rows.append({"shard": number, "start": file.tell() // ALIGNMENT, "bytes": len(frame), **row})
            file.write(frame + bytes(-len(frame) % ALIGNMENT))
    table = pa.Table.from_pylist(rows, _FIELDS.with_metadata({"rejected": json.dumps(rejected)}))
    with write_atomically(out / table_name(number)) as draft:
        pq.write_table(table, draft)


def _prepared(item: Mapping[str, Any], prepare: ByModalityd, salt: str) -> tuple[dict[str, Any], bytes]:
    raw = read_image(item["image"])
    image: MetaTensor = prepare({"image": raw, "modality": item.get("modality")})["image"]
    spacing, degree = spacing_of(image) or [1.0, 1.0, 1.0], degree_of(image)
    encoded = encode(image.as_tensor().float().numpy(), raw.dtype == torch.uint8)
    subject = item.get("subject")
    row = {
        **dict(zip(_SIZE, image.shape, strict=True)), "dtype": str(encoded.numbers.dtype),
        "spacing": spacing, "anisotropy": degree,
        "modality": item["modality"], "source": item.get("source", ""), "split": item.get("split", "training"),
        "subject": None if subject is None else hashed(f"{item.get('source', '')}/{subject}", salt),
        "label": _label(item.get("label")), "alike": item.get("alike", 1),
        "checksum": checksum_of(encoded), "hash": perceptual_hash(middle_slice(image)), "file": _file(item),
    }  # fmt: skip
    return row, frame_of(encoded, degree, spacing)


def _file(item: Mapping[str, Any]) -> str:
    return str(item["image"] if isinstance(item["image"], str) else item["image"][0])


def _label(label: Any) -> str | None:
    """A label as JSON; none for label maps, whose paths may name somebody."""
    parts = label if isinstance(label, list | tuple) else [label]
    return None if label is None or any(map(_is_path, parts)) else json.dumps(label)


def _is_path(part: Any) -> bool:
    endings = (*NIFTI, *VOLUME, *TIFF, *PHOTO, *ARRAYS, ".dcm")
    return isinstance(part, str) and ("/" in part or "\\" in part or suffix(Path(part)) in endings)
