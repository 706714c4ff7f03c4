"""Random crops per second from a store, and from what else keeps images on disk or in memory.

    python benchmarks/data_speed.py [--volumes 12] [--images 120] [--rounds 3] [--batches]

Volumes are 256 x 256 x 256 voxels of 16 bits in .nii.gz, crops 96 x 96 x 96: a brain that nilearn ships, at that size,
with the noise of a scanner. Images are 512 x 512 pixels of colour in .png, crops 224 x 224: photographs of skin, tissue
and retina that scikit-image ships, turned and cut at random. All contestants give the same crops in the same order, as
float16 between 0 and 1; each runs in a process of its own, one after the other in turns. "Cold" is the first pass after
the files were dropped from the system's cache, "warm" the second. Memory is the peak over what a process held before.
Time to the first crop includes what a contestant prepares before it, such as filling its cache: PersistentDataset and
LMDBDataset are timed with their files written already, and so is the store.

With --batches only ours is timed, in batches of 32 as a worker of a DataLoader makes them: the processor's time per
crop, and then with one view of each, made on the same core.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import nilearn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from monai.data import CacheDataset, DataLoader, Dataset, LMDBDataset, MetaTensor, PersistentDataset
from monai.transforms import Compose, EnsureChannelFirstd, Lambdad, LoadImaged, Orientationd, ScaleIntensityRanged
from PIL import Image
from scipy.ndimage import zoom
from skimage import data as photographs
from torch.utils.data import Subset

from biovfm_monai.data import RandomCropDataset, RandomResizedCrop, Store, find_images, pack, training_transform

Read = Callable[[int], Any]
WINDOW = (-1000.0, 1000.0)
CROPS = {"volumes": (96, 96, 96), "images": (1, 224, 224)}


def write_volumes(folder: Path, count: int) -> None:
    """Volumes of whole numbers between -1000 and 1000, as of CT."""
    shipped = Path(nilearn.__file__).parent / "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    brain = np.asarray(nib.load(shipped).dataobj, dtype=np.float32)
    brain = zoom(brain, [256 / n for n in brain.shape], order=1)
    brain = brain / brain.max() * 1200 - 1000
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        noisy = brain + (brain > -950) * rng.normal(0, 12, brain.shape)
        values = np.clip(np.roll(noisy, rng.integers(-9, 9, 3), (0, 1, 2)), *WINDOW).round().astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{number:03}.nii.gz")


def write_images(folder: Path, count: int) -> None:
    """Photographs of 512 x 512 pixels."""
    sources = [photographs.retina(), photographs.immunohistochemistry(), photographs.astronaut(), photographs.rocket()]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        picture = np.rot90(sources[number % len(sources)], rng.integers(4))
        top, left = (int(rng.integers(n - 400)) for n in picture.shape[:2])
        part = Image.fromarray(np.ascontiguousarray(picture[top : top + 400, left : left + 400]))
        part.resize((512, 512), Image.Resampling.LANCZOS).save(folder / f"{number:04}.png")


def monai_transform(kind: str) -> Compose:
    """From a file to values between 0 and 1, in MONAI's way."""
    low, high = WINDOW if kind == "volumes" else (0.0, 255.0)
    load = [LoadImaged("image"), EnsureChannelFirstd("image")]
    turn = Orientationd("image", "SPL", labels=(("L", "R"), ("P", "A"), ("I", "S"))) if kind == "volumes" else _as_stack
    return Compose([*load, turn, ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)])


_as_stack = Lambdad("image", lambda image: image.transpose(1, 2)[:, None])


def prepare(kind: str, folder: Path) -> None:
    """Write what each contestant reads."""
    items = find_images(folder / kind)
    pack(folder / kind, folder / "store")
    for write in (PersistentDataset(items, monai_transform(kind), folder / "persistent"), _lmdb(kind, folder, items)):
        for number in range(len(items)):
            write[number]
    (folder / "blosc2").mkdir()
    prepared = Dataset(items, monai_transform(kind))
    for number in range(len(items)):
        values = prepared[number]["image"].numpy()
        chunks = (len(values), *CROPS[kind])
        blosc2.asarray(np.ascontiguousarray(values), urlpath=str(folder / f"blosc2/{number}.b2nd"), chunks=chunks)
    if kind == "images":
        encoded = [Path(item["image"]).read_bytes() for item in items]
        pq.write_table(pa.table({"png": encoded}), folder / "images.parquet", row_group_size=1)


def _lmdb(kind: str, folder: Path, items: list[dict[str, Any]]) -> LMDBDataset:
    return LMDBDataset(items, monai_transform(kind), folder / "lmdb", progress=False, lmdb_kwargs={"map_size": 2**36})


def contestants(kind: str, folder: Path) -> dict[str, tuple[Callable[[], Read], list[Path]]]:
    """Name -> how to open it, which gives a function from an image's number to the image, and its files."""
    items = find_images(folder / kind)
    transform = monai_transform(kind)

    def of(dataset: Any) -> Read:
        return lambda row: dataset[row]["image"]

    def per_file() -> Read:
        return lambda row: blosc2.open(str(folder / f"blosc2/{row}.b2nd"), mmap_mode="r", dparams={"nthreads": 1})

    def pngs() -> Read:
        table = pq.ParquetFile(folder / "images.parquet")

        def read(row: int) -> np.ndarray:
            encoded = table.read_row_group(row).column(0)[0].as_py()
            return np.moveaxis(np.asarray(Image.open(io.BytesIO(encoded))), -1, 0)[:, None] / np.float32(255)

        return read

    found = {
        "MONAI Dataset": (lambda: of(Dataset(items, transform)), [folder / kind]),
        "MONAI PersistentDataset": (
            lambda: of(PersistentDataset(items, transform, folder / "persistent", track_meta=True, weights_only=False)),
            [folder / "persistent"],
        ),
        "MONAI LMDBDataset": (lambda: of(_lmdb(kind, folder, items)), [folder / "lmdb"]),
        "MONAI CacheDataset": (lambda: of(CacheDataset(items, transform, progress=False)), [folder / kind]),
        "Blosc2 files, as nnU-Net": (per_file, [folder / "blosc2"]),
    }
    return found | ({"Parquet of PNGs": (pngs, [folder / "images.parquet"])} if kind == "images" else {})


def cut(image: Any, start: np.ndarray, size: tuple[int, ...]) -> torch.Tensor:
    """A crop of C x D x H x W as float16."""
    crop = image[(slice(None), *(slice(int(s), int(s) + n) for s, n in zip(start, size, strict=True)))]
    crop = crop.as_tensor() if isinstance(crop, MetaTensor) else crop
    return (crop if torch.is_tensor(crop) else torch.from_numpy(np.asarray(crop))).half()


def disk(paths: list[Path]) -> float:
    """Bytes below paths, in MB."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def drop(paths: list[Path]) -> None:
    """Take files out of the system's cache."""
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def race(name: str, kind: str, folder: Path, count: int, pipe: Any) -> None:
    """Two passes of one contestant; sends crops per second cold and warm, seconds to the first, MB, and a checksum."""
    torch.set_num_threads(1)
    size, channels = CROPS[kind], 1 if kind == "volumes" else 3
    ours = RandomCropDataset(Store(folder / "store"), training_transform(channels), size)
    room = np.array((256, 256, 256) if kind == "volumes" else (1, 512, 512)) - size + 1
    places = [np.random.default_rng((0, number, 1)).integers(room) for number in range(count)]
    rows = [ours._row(number) for number in range(count)]
    open_, files = contestants(kind, folder).get(name, (None, [folder / "store"]))
    drop(files)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if open_ is None:
        crops = RandomCropDataset(Store(folder / "store"), training_transform(channels), size)
        draw: Read = lambda number: crops[number]["image"]  # noqa: E731
    else:
        read = open_()
        draw = lambda number: cut(read(rows[number]), places[number], size)  # noqa: E731
    checks = [float(draw(0).float().mean())]
    first, rates = time.perf_counter() - begun, []
    for _ in range(2):
        begun = time.perf_counter()
        checks += [float(draw(number)[0, 0, 0].float().mean()) for number in range(count)]
        rates.append(count / (time.perf_counter() - begun))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    pipe.send((*rates, first, memory, checks[:4]))


def batches(kind: str, folder: Path, count: int, rounds: int) -> None:
    """Print what batches of ours cost, from a store and from files in memory."""
    torch.set_num_threads(1)
    size, channels = CROPS[kind], 1 if kind == "volumes" else 3
    size = size if kind == "volumes" else size[1:]
    view, cpu = RandomResizedCrop(size), torch.device("cpu")
    for name, data in (("store", Store(folder / "store")), ("files in memory", find_images(folder / kind))):
        crops = Subset(RandomCropDataset(data, training_transform(channels), size, batch_size=32), range(4 * count))
        costs: list[list[float]] = [[], []]
        for _ in range(rounds + 1):
            for viewed, of in enumerate(costs):
                begun = time.process_time()
                for batch in DataLoader(crops, batch_size=32):
                    if viewed:
                        view(batch, cpu)
                of.append(1e6 * (time.process_time() - begun) / len(crops))
        alone, with_view = (statistics.median(of[1:]) for of in costs)
        print(f"{kind} from {name}, {batch['image'].dtype}: {alone:.0f} us per crop, {with_view:.0f} with a view")


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=12)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", action="store_true")
    arguments = parser.parse_args()
    for kind, write in (("volumes", write_volumes), ("images", write_images)):
        count = getattr(arguments, kind)
        if not count:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder / kind / ("ct" if kind == "volumes" else "dermoscopy"), count)
            if arguments.batches:
                pack(folder / kind, folder / "store")
                batches(kind, folder, count, arguments.rounds)
            else:
                prepare(kind, folder)
                table(kind, folder, count, arguments.rounds)


def table(kind: str, folder: Path, count: int, rounds: int) -> None:
    """Run the contestants in turns and print medians."""
    names = ["biovfm_monai Store", *contestants(kind, folder)]
    results: dict[str, list[Any]] = {name: [] for name in names}
    context = multiprocessing.get_context("fork")
    for number in range(rounds):
        for name in names[number:] + names[:number]:
            # What reads whole files needs seconds for each crop.
            crops = count if name == "MONAI Dataset" and kind == "volumes" else 4 * count
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=race, args=(name, kind, folder, crops, send))
            process.start()
            send.close()
            results[name].append(receive.recv())
            process.join()
    print(f"\n{count} {kind}, crops of {' x '.join(map(str, CROPS[kind]))}, medians of {rounds} rounds")
    print(f"{'':26}{'crops/s cold':>13}{'warm':>9}{'ours is':>9}{'first s':>9}{'memory MB':>11}{'disk MB':>9}")
    medians = {
        name: [statistics.median(column) for column in list(zip(*of, strict=True))[:4]] for name, of in results.items()
    }
    files = {name: of for name, (_, of) in contestants(kind, folder).items()}
    for name, (cold, warm, first, memory) in medians.items():
        stored = disk(files.get(name, [folder / "store"]))
        ahead = medians[names[0]][1] / warm
        print(f"{name:26}{cold:>13.1f}{warm:>9.1f}{ahead:>8.1f}x{first:>9.2f}{memory:>11.0f}{stored:>9.0f}")
    print(f"originals on disk: {disk([folder / kind]):.0f} MB")
    expected = results[names[0]][0][4]
    for name, of in results.items():
        if not np.allclose(of[0][4], expected, atol=2e-3):
            print(f"{name} GIVES OTHER CROPS: {of[0][4]} and not {expected}")


if __name__ == "__main__":
    main()
