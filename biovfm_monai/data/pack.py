"""Pack the images of a datalist into a store, on all cores, so that it can be stopped and gone on with at any time."""

from __future__ import annotations

import csv
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from joblib import Parallel, delayed
from monai.data import MetaTensor
from tqdm import tqdm

from biovfm_monai.anisotropy import spacing_of
from biovfm_monai.data.datalist import read_datalist
from biovfm_monai.data.duplicates import count_alike, perceptual_hash
from biovfm_monai.data.encoding import encode, frame_of
from biovfm_monai.data.find import hashed, require_modality, survey
from biovfm_monai.data.preprocessing import ByModalityd, degree_of
from biovfm_monai.data.reading import read_image
from biovfm_monai.data.store import ABOUT, ALIGNMENT, INDEX, shard_name
from biovfm_monai.errors import InputError, reason_of
from biovfm_monai.files import require_writable, write_atomically
from biovfm_monai.sheet import middle_slice

__all__ = ["pack"]

_SIZE = ("channels", "depth", "height", "width")
_FIELDS = pa.schema(
    {
        "shard": pa.int32(), "start": pa.uint32(), "bytes": pa.int64(), **{name: pa.int32() for name in _SIZE},
        "dtype": pa.string(), "spacing": pa.list_(pa.float32(), 3), "anisotropy": pa.int8(), "modality": pa.string(),
        "source": pa.string(), "subject": pa.string(), "split": pa.string(), "label": pa.string(),
        "alike": pa.int32(), "checksum": pa.string(), "hash": pa.uint64(),
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
    items, unread = _items(Path(datalist).expanduser().resolve(), modality)
    prepare = ByModalityd("image", spacing, presets)
    about = {
        "format": 1, "spacing": spacing, "presets": presets or {}, "datalist": _digest(items),
        "exclude_benchmark": [_digest_of(Path(path)) for path in exclude_benchmark],
    }  # fmt: skip
    require_writable(out)
    _begin(out, about)
    shards = list(_shards(items))
    if (out / INDEX).is_file():
        _tidy(out, len(shards))
        return f"{out}: was ready already. Remove it to pack again."
    salt = _kept_salt(out, salt)
    todo = [number for number in range(len(shards)) if not _table_of(out, number).is_file()]
    jobs = (delayed(_write_shard)(out, number, shards[number], prepare, salt) for number in todo)
    finished = Parallel(n_jobs=num_workers, return_as="generator_unordered")(jobs)
    for _ in tqdm(finished, "shards", total=len(shards), initial=len(shards) - len(todo), disable=not todo):
        pass
    return _finish(out, len(shards), exclude_benchmark, unread)


def _items(path: Path, modality: str | None) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The items of a datalist or folder, and the files of a folder that cannot be used, with the reason."""
    unread: list[dict[str, str]] = []
    if path.is_dir():
        items = []
        for found in survey(path):
            items += [item | ({"subject": item.pop("patient")} if "patient" in item else {}) for item in found.items]
            unread += [one._asdict() for one in found.rejected]
    elif path.suffix in (".json", ".parquet") and path.is_file():
        items = [{"split": name, **item} for name, of in read_datalist(path).items() for item in of]
    else:
        raise InputError(f"{path}: no datalist. Write one with `biovfm index`, or name a folder of images.")
    if not items:
        raise InputError(f"{path}: names no image. Index a folder that holds some.")
    return require_modality(items, modality), unread


def _digest(items: Iterable[Mapping[str, Any]]) -> str:
    digest = blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item, sort_keys=True).encode())
    return digest.hexdigest()


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
        with write_atomically(path) as draft:
            draft.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


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
        _table_of(out, number).unlink(missing_ok=True)
    (out / _SALT).unlink(missing_ok=True)


def _shards(items: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Cut a datalist into the items of one file each, by their number and the size that their headers say."""
    shard: list[dict[str, Any]] = []
    voxels = 0
    for item in items:
        size = int(np.prod(item.get("shape", [2**20]), dtype=np.int64)) * int(item.get("channels", 1))
        if shard and (voxels + size > _VOXELS or len(shard) == _IMAGES):
            yield shard
            shard, voxels = [], 0
        shard.append(item)
        voxels += size
    yield shard


def _table_of(out: Path, number: int) -> Path:
    return out / f"{shard_name(number)}.parquet"


def _write_shard(out: Path, number: int, items: Sequence[dict[str, Any]], prepare: ByModalityd, salt: str) -> None:
    """Write one file of images and, when it is whole, the table of them."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    with write_atomically(out / shard_name(number)) as draft, draft.open("wb") as file:
        for item in items:
            try:
                row, frame = _prepared(item, prepare, salt)
            except (InputError, RuntimeError) as error:
                name = item["image"] if isinstance(item["image"], str) else item["image"][0]
                rejected.append({"file": name, "reason": reason_of(error)})
                continue
            rows.append({"shard": number, "start": file.tell() // ALIGNMENT, "bytes": len(frame), **row})
            file.write(frame + bytes(-len(frame) % ALIGNMENT))
    table = pa.Table.from_pylist(rows, _FIELDS.append(pa.field("file", pa.string())))
    table = table.replace_schema_metadata({"rejected": json.dumps(rejected)})
    with write_atomically(_table_of(out, number)) as draft:
        pq.write_table(table, draft)


def _prepared(item: Mapping[str, Any], prepare: ByModalityd, salt: str) -> tuple[dict[str, Any], bytes]:
    raw = read_image(item["image"])
    image: MetaTensor = prepare({"image": raw, "modality": item.get("modality")})["image"]
    spacing, degree = spacing_of(image) or [1.0, 1.0, 1.0], degree_of(image)
    encoded = encode(image.as_tensor().float().numpy(), raw.dtype == torch.uint8)
    digest = blake2b(str(encoded.numbers.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(encoded.numbers).data)
    subject = item.get("subject")
    row = {
        **dict(zip(_SIZE, image.shape, strict=True)), "dtype": str(encoded.numbers.dtype),
        "spacing": spacing, "anisotropy": degree,
        "modality": item["modality"], "source": item.get("source", ""), "split": item.get("split", "training"),
        "subject": None if subject is None else hashed(f"{item.get('source', '')}/{subject}", salt),
        "label": _label(item.get("label")), "alike": item.get("alike", 1),
        "checksum": digest.hexdigest(), "hash": perceptual_hash(middle_slice(image)),
        "file": item["image"] if isinstance(item["image"], str) else item["image"][0],
    }  # fmt: skip
    return row, frame_of(encoded, degree, spacing)


def _label(label: Any) -> str | None:
    """A label as JSON; none for the path of a label map, which may name somebody."""
    return None if label is None or (isinstance(label, str) and "/" in label) else json.dumps(label)


def _finish(out: Path, count: int, benchmarks: Sequence[str | Path], unread: Sequence[dict[str, str]]) -> str:
    """Join the shards' tables, leave out what is there twice or in a benchmark, and write the index."""
    tables = [pq.read_table(_table_of(out, number)) for number in range(count)]
    rejected = [*unread] + [row for table in tables for row in json.loads(table.schema.metadata[b"rejected"])]
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    checksums, files = table.column("checksum").to_numpy(), table.column("file").to_numpy()
    _, first, which = np.unique(checksums, return_index=True, return_inverse=True)
    original = first[which]
    twice = original != np.arange(len(checksums))
    duplicates = [{"file": files[n], "same as": files[original[n]]} for n in np.flatnonzero(twice)]
    hashes = table.column("hash").to_numpy()
    known = np.zeros(len(hashes), dtype=bool)
    for path in benchmarks:
        there = pq.read_table(Path(path).expanduser().resolve() / INDEX, columns=["checksum", "hash"])
        known |= np.isin(checksums, there.column("checksum").to_numpy())
        known |= count_alike(hashes, there.column("hash").to_numpy()) > 0
    excluded = [{"file": file, "reason": "in a benchmark"} for file in files[known]]
    kept = ~twice & ~known
    table = table.drop_columns("file").filter(pa.array(kept))
    alike = np.maximum(table.column("alike").to_numpy(), count_alike(hashes[kept]))
    table = table.set_column(table.column_names.index("alike"), "alike", pa.array(alike, pa.int32()))
    lists = {"rejected": rejected, "duplicates": duplicates, "excluded": excluded}
    for name, rows in lists.items():
        _write_list(out.with_name(f"{out.name}-{name}.csv"), rows)
    if not len(table):
        raise InputError(f"{out}: no image is left to store. See {out}-*.csv for the reasons.")
    images = np.bincount(table.column("shard").to_numpy(), minlength=count).tolist()
    table = table.replace_schema_metadata({"images": json.dumps(images)})
    with write_atomically(out / INDEX) as draft:
        pq.write_table(table, draft, row_group_size=2**20)
    _tidy(out, count)
    size = sum(path.stat().st_size for path in out.iterdir())
    left = [f"{len(rows)} {name} ({out.name}-{name}.csv)" for name, rows in lists.items() if rows]
    without = f"\nLeft out: {', '.join(left)}." if left else ""
    return f"{out}: ready, {len(table)} images in {count} file(s), {size / 2**20:.1f} MiB.{without}"


def _write_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table of files, or remove that of an earlier store, if there are none."""
    path.unlink(missing_ok=True)
    if rows:
        with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
