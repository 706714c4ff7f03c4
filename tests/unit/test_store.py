"""The packed store: what goes in comes out, whatever happens meanwhile."""

import csv
import hashlib
import importlib
import json
import os
import pickle
import shutil
import time

import joblib
import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from image_files import write_dicom, write_nifti, write_png
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.transforms import Compose
from PIL import Image
from programs import run_python, started
from skimage import data as photographs

from biovfm_monai.anisotropy import spacing_of
from biovfm_monai.data import (
    ByModalityd,
    RandomCropDataset,
    ReadImaged,
    Store,
    encoder_transform,
    index,
    load_datalist,
    pack,
    training_transform,
    verify,
)
from biovfm_monai.data.duplicates import count_alike, perceptual_hash
from biovfm_monai.data.encoding import decode, encode
from biovfm_monai.data.preprocessing import degree_of
from biovfm_monai.data.reading import read_image
from biovfm_monai.data.store import INDEX
from biovfm_monai.errors import InputError

# Numbers


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(-1000, 1000), (-160, 240), (-3, 997.25), (0, 4095)]),
    st.sampled_from([1, 2, 16]),
)
@settings(max_examples=60, deadline=None)
def test_whole_numbers_in_a_window_come_back_in_eight_or_sixteen_bits(seed, window, spread):
    low, high = window
    values = np.random.default_rng(seed).integers((low - 99) // spread, (high + 99) // spread, (1, 9, 10, 11)) * spread
    image = np.clip((values.astype(np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    encoded = encode(image, eight_bit=False)
    assert encoded.numbers.dtype in (np.uint8, np.int16)
    assert encoded.numbers.dtype == np.uint8 or (high - low) / spread > 253
    back = decode(encoded.numbers, encoded.scale, encoded.offset, encoded.unit).numpy()
    assert np.abs(back - image).max() <= 2e-6


@given(arrays(np.float32, (1, 2, 3, 4), elements=st.floats(-50, 50, width=32)))
@settings(max_examples=60, deadline=None)
def test_any_other_numbers_come_back_to_a_part_in_two_thousand(image):
    encoded = encode(image, eight_bit=False)
    back = decode(encoded.numbers, encoded.scale, encoded.offset, encoded.unit).numpy()
    assert np.abs(back - image).max() <= np.abs(image).max() / 2000 + 1e-6


@given(arrays(np.uint8, (3, 1, 4, 5)))
@settings(max_examples=30, deadline=None)
def test_eight_bits_stay_eight_bits(pixels):
    encoded = encode(pixels.astype(np.float32) / 255, eight_bit=True)
    assert np.array_equal(encoded.numbers, pixels)


# Packing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of all kinds: eight and sixteen bits, colours, thin and thick slices, a film, a copy, and a bad file."""
    root = tmp_path_factory.mktemp("a folder")
    rng = np.random.default_rng(0)
    for name in ("ct", "mri", "fundus", "ultrasound"):
        (root / name).mkdir()
    for number in range(3):
        write_nifti(root / f"ct/{number}.nii.gz", rng.integers(-1200, 1200, (40, 44, 48)), spacing=(1, 1, 1))
        write_nifti(root / f"mri/{number}.nii.gz", rng.normal(500, 90, (40, 44, 12)), spacing=(1, 1, 5))
        photo = photographs.astronaut()[number * 60 : number * 60 + 200, :260]
        write_png(root / f"fundus/{number}.png", np.ascontiguousarray(photo))
    shutil.copy(root / "fundus/0.png", root / "fundus/copy.png")
    frames = rng.integers(0, 900, (5, 48, 64)).astype(np.int16)
    write_dicom(
        root / "ultrasound/film.dcm", "1.2", Modality="US", NumberOfFrames=5, Rows=48, Columns=64,
        PixelData=frames.tobytes(), RescaleSlope=1, RescaleIntercept=0,
    )  # fmt: skip
    write_nifti(root / "ct/nan.nii.gz", np.full((40, 40, 40), np.nan))
    index([root], root.with_name("list") / "datalist.json", salt="x")
    return root


@pytest.fixture(scope="module")
def store(folder):
    out = folder.with_name("store")
    pack(folder.with_name("list") / "datalist.json", out, salt="y", num_workers=1)
    return out


def by_content(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def test_paths_of_label_maps_do_not_enter_a_store(tmp_path):
    labels = ["malignant", 3, [0, 1], None, "DOE_JOHN_seg.nii.gz", ["/data/DOE_JOHN/gm.nii.gz"], "C:\\DOE\\map.dcm"]
    items = []
    for number, label in enumerate(labels):
        image = str(write_png(tmp_path / f"{number}.png", np.full((40, 40), number, np.uint8)))
        items.append({"image": image, "modality": "xray", "label": label})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items}))
    pack(tmp_path / "datalist.json", tmp_path / "store", num_workers=1)
    assert [item.get("label") for item in Store(tmp_path / "store")] == ["malignant", 3, [0, 1], *[None] * 4]
    assert not any(b"DOE" in path.read_bytes() for path in (tmp_path / "store").iterdir())


def test_a_store_written_anew_is_read_anew(tmp_path):
    (tmp_path / "images").mkdir()
    for value in (50, 60):
        write_png(tmp_path / "images" / "a.png", np.full((40, 40), value, np.uint8))
        index([tmp_path / "images"], tmp_path / "datalist.json", modality="xray")
        pack(tmp_path / "datalist.json", tmp_path / "store", num_workers=1)
        assert (Store(tmp_path / "store")[0]["image"][...] * 255).round().unique().tolist() == [value]
        shutil.rmtree(tmp_path / "store")


def test_every_image_comes_back_as_its_preset_gave_it(folder, store):
    prepare = training_transform(1)
    stored = Store(store)
    expected = {}
    for item in load_datalist(folder.with_name("list")):
        if "nan" not in item["image"] and "copy" not in item["image"]:
            sample = prepare(item)
            expected[sample["image"].as_tensor().float().numpy().tobytes()] = sample
    assert len(stored) == len(expected) == 10
    images = [sample["image"].as_tensor() for sample in expected.values()]
    for sample in stored:
        image = prepare(sample)["image"]
        gaps = [float((image - other).abs().max()) for other in images if other.shape == image.shape]
        assert min(gaps) <= 1e-3
        assert degree_of(sample["image"].whole()) == sample["anisotropy"]


def kept_items(folder):
    """The items of the list that are in the store, in its order."""
    items = load_datalist(folder.with_name("list"))
    return [item for item in items if "nan" not in item["image"] and "copy" not in item["image"]]


@pytest.mark.parametrize("of_monai", [Dataset, CacheDataset, PersistentDataset])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_files_through_monais_datasets_give_the_samples_of_the_store(folder, store, tmp_path, of_monai, channels):
    prepare = training_transform(channels)
    # By default it would forget the spacing.
    kept = {"cache_dir": tmp_path / "cache", "track_meta": True, "weights_only": False}
    options = kept if of_monai is PersistentDataset else {}
    files = of_monai(kept_items(folder), prepare, **options)
    stored, raw = Dataset(Store(store), prepare), Store(store)
    numbers = pq.read_table(store / INDEX)["dtype"].to_pylist()
    for _ in range(2 if of_monai is PersistentDataset else 1):  # the second time out of its folder
        for row, (one, other) in enumerate(zip(files, stored, strict=True)):
            image, again = one["image"], other["image"]
            assert (image.shape, image.dtype) == (again.shape, again.dtype)
            # Whole numbers of sixteen bits give values to 2e-6, of which rounding may make the next float16.
            gap = 2**-11 if numbers[row] == "int16" else 0
            torch.testing.assert_close(image.as_tensor(), again.as_tensor(), rtol=0, atol=gap)
            assert spacing_of(image) == pytest.approx(spacing_of(again))
            assert degree_of(image) == degree_of(again) == raw[row]["anisotropy"]
            assert [one[key] for key in ("modality", "source")] == [other[key] for key in ("modality", "source")]


def test_values_of_the_store_are_those_of_the_files_to_the_stated_precision(folder, store):
    prepare = Compose([ReadImaged("image"), ByModalityd("image")])
    for one, other, number in zip(
        Dataset(kept_items(folder), prepare), Dataset(Store(store), prepare), Store(store), strict=True
    ):
        image, again = one["image"].as_tensor(), other["image"].as_tensor()
        # Whole numbers of eight and sixteen bits, or else float16.
        bound = 2e-6 if number["image"].dtype != np.float16 else float(image.abs().max()) / 2048
        assert float((image - again).abs().max()) <= bound


def test_what_is_not_stored_is_listed_with_the_reason(folder, store):
    def listed(name):
        with store.with_name(f"{store.name}-{name}.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    ((rejected,), (duplicate,)) = listed("rejected"), listed("duplicates")
    assert rejected["file"] == str(folder / "ct/nan.nii.gz")
    assert "NaN or infinite" in rejected["reason"]
    assert duplicate == {"file": str(folder / "fundus/copy.png"), "same as": str(folder / "fundus/0.png")}


def test_the_store_holds_no_path_and_no_name(folder, store):
    content = b"".join(file.read_bytes() for file in store.iterdir())
    for secret in (b"4711", b".nii", b".png", b"pytest"):
        assert secret not in content


def test_a_box_of_an_image_is_that_part_of_the_whole(store):
    for sample in Store(store):
        image = sample["image"]
        whole = image.whole().as_tensor()
        d, h, w = (slice(n // 3, n // 3 + max(n // 2, 1)) for n in image.shape[1:])
        assert torch.equal(image[:, d, h, w], whole[:, d, h, w])


@pytest.mark.parametrize("crop", [(32, 24), (8, 32, 24), (32, 32, 24)])
def test_crops_of_the_store_and_of_the_files_are_alike(folder, store, crop):
    items = kept_items(folder)
    for image in items:
        image["alike"] = 1
    stored = Store(store)
    order = [items.index(item) for item in items]
    files = RandomCropDataset(items, training_transform(3), crop, seed=1, batch_size=2)
    packed = RandomCropDataset(stored, training_transform(3), crop, seed=1, batch_size=2)
    assert order == list(range(len(stored)))
    for number in range(40):
        one, other = files[number], packed[number]
        assert set(one) == set(other)
        assert {key: one[key] for key in one if key != "image"} == {key: other[key] for key in other if key != "image"}
        assert one["image"].dtype == other["image"].dtype == torch.float16
        torch.testing.assert_close(one["image"], other["image"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("workers", [1, 2])
def test_packing_again_gives_the_same_bytes_with_any_number_of_processes(folder, store, tmp_path, workers):
    pack(folder.with_name("list") / "datalist.json", tmp_path / "again", salt="y", num_workers=workers)
    assert by_content(tmp_path / "again") == by_content(store)


DASK = """
import importlib, sys
import joblib
from dask.distributed import Client, LocalCluster
module = importlib.import_module("biovfm_monai.data.pack")
module._IMAGES = 3
def moved(dask_scheduler):
    return len(dask_scheduler.transition_log)
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        with Client(cluster) as client, joblib.parallel_config(backend="dask"):
            print(module.pack(sys.argv[1], sys.argv[2], salt="y"))
            print("moved", client.run_on_scheduler(moved))
"""


def test_a_cluster_packs_the_same_bytes(folder, store, tmp_path):
    pytest.importorskip("distributed")
    arguments = ["-c", DASK, folder.with_name("list") / "datalist.json", tmp_path / "store"]
    done = run_python(arguments, tmp_path, DASK_TEMPORARY_DIRECTORY=str(tmp_path))
    assert "ready, 10 images in 4 file(s)" in done.stdout, done.stderr
    assert int(done.stdout.split("moved")[1]) >= 4
    assert len(Store(tmp_path / "store")) == len(Store(store))


def test_a_backend_that_gives_all_results_at_the_end_packs_too(folder, store, tmp_path):
    class Backend(joblib._parallel_backends.ThreadingBackend):
        supports_return_generator = False

    joblib.register_parallel_backend("all at the end", Backend)
    with joblib.parallel_config(backend="all at the end"):
        pack(folder.with_name("list") / "datalist.json", tmp_path / "again", salt="y", num_workers=2)
    assert by_content(tmp_path / "again") == by_content(store)


PACK = """
import importlib, sys
module = importlib.import_module("biovfm_monai.data.pack")
module._IMAGES = 1
module.pack(sys.argv[1], sys.argv[2], salt="y", num_workers=1)
"""


def test_a_killed_packing_goes_on_and_gives_the_same_bytes(folder, tmp_path):
    arguments = ["-c", PACK, folder.with_name("list") / "datalist.json"]
    assert run_python([*arguments, tmp_path / "whole"], tmp_path).returncode == 0
    for wanted in (1, 5):
        with started([*arguments, tmp_path / "cut"], tmp_path):
            deadline = time.monotonic() + 60
            while len(list((tmp_path / "cut").glob("*.b2"))) < wanted and time.monotonic() < deadline:
                time.sleep(0.002)
        with pytest.raises(InputError, match=r"the store is not finished\. Run the same"):
            load_datalist(tmp_path / "cut")
    assert run_python([*arguments, tmp_path / "cut"], tmp_path).returncode == 0
    assert by_content(tmp_path / "cut") == by_content(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".*"))


def test_a_table_is_packed_as_the_same_list_is(folder, store, tmp_path):
    index([folder], tmp_path / "datalist.parquet", salt="x")
    pack(tmp_path / "datalist.parquet", tmp_path / "again", salt="y", num_workers=1)
    here, there = by_content(tmp_path / "again"), by_content(store)
    assert {name for name in here if here[name] != there[name]} <= {"store.json"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_an_image_that_does_not_fit_into_memory_is_listed(folder, tmp_path, monkeypatch, error):
    module = importlib.import_module("biovfm_monai.data.pack")

    def read(path):
        if path.endswith("1.png"):
            raise error
        return read_image(path)

    monkeypatch.setattr(module, "read_image", read)
    report = pack(folder / "fundus", tmp_path / "store", modality="fundus", num_workers=1)
    assert "ready, 2 images" in report
    (row,) = csv.DictReader((tmp_path / "store-rejected.csv").read_text().splitlines())
    assert row["file"].endswith("fundus/1.png")
    assert "memory" in row["reason"]


KILLED = """
import importlib, os, sys
module = importlib.import_module("biovfm_monai.data.pack")
def _write_shard(*_):
    os.kill(os.getpid(), 9)
module._write_shard = _write_shard
from biovfm_monai.errors import report_input_errors
report_input_errors()
module.pack(sys.argv[1], sys.argv[2], num_workers=2)
"""


def test_a_process_that_is_killed_ends_packing_with_advice(folder, tmp_path):
    arguments = ["-c", KILLED, folder.with_name("list") / "datalist.json", tmp_path / "store"]
    done = run_python(arguments, tmp_path)
    assert done.returncode == 1
    assert "fewer --num_workers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_store_is_left_alone_and_another_one_is_not_written_over_it(folder, store, tmp_path):
    before = by_content(store)
    assert "was ready already" in pack(folder.with_name("list") / "datalist.json", store)
    with pytest.raises(InputError, match="holds a store of another presets"):
        pack(folder.with_name("list") / "datalist.json", store, presets={"ct": {"window": "lung"}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("precious")
    with pytest.raises(InputError, match="holds files, but no store"):
        pack(folder.with_name("list") / "datalist.json", tmp_path / "mine")
    assert by_content(store) == before


def test_another_salt_does_not_go_on_with_a_store(folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("biovfm_monai.data.pack"), "join_tables", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(folder / "fundus", tmp_path / "store", salt="x", num_workers=1)
    monkeypatch.undo()
    assert (tmp_path / "store/.salt").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="was begun with another --salt"):
        pack(folder / "fundus", tmp_path / "store", salt="y", num_workers=1)
    pack(folder / "fundus", tmp_path / "store", salt="x", num_workers=1)
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == [INDEX, "shard-000000.b2", "store.json"]


def test_what_was_left_by_a_stop_while_tidying_up_is_removed(folder, tmp_path):
    pack(folder / "fundus", tmp_path / "store", num_workers=1)
    for name in (".salt", "shard-000000.b2.parquet"):
        (tmp_path / "store" / name).write_text("secret")
    pack(folder / "fundus", tmp_path / "store", num_workers=1)
    assert not list((tmp_path / "store").glob(".*"))
    assert not (tmp_path / "store/shard-000000.b2.parquet").exists()


def test_a_folder_with_a_broken_file_is_packed_without_it(folder, tmp_path):
    shutil.copytree(folder / "fundus", tmp_path / "fundus")
    (tmp_path / "fundus/broken.png").write_bytes(b"broken")
    pack(tmp_path / "fundus", tmp_path / "store", num_workers=1)
    with (tmp_path / "store-rejected.csv").open(encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [str(tmp_path / "fundus/broken.png")]


def test_a_store_is_indexed_as_a_list_is(store):
    images = Store(store)
    assert torch.equal(images[-1]["image"][...], images[len(images) - 1]["image"][...])
    with pytest.raises(IndexError):
        images[len(images)]


def test_values_that_are_nearly_clipped_are_not_taken_for_clipped():
    image = np.array([[0, 0.0005, 0.0005, 0]], dtype=np.float32)
    assert np.abs(decode(*encode(image, eight_bit=False)).numpy() - image).max() <= 2e-6


def test_a_folder_packs_without_a_datalist_and_subjects_mean_nothing_without_the_salt(folder, tmp_path):
    names = []
    for name in "ab":
        pack(folder / "ultrasound", tmp_path / name, num_workers=1)
        names.append(Store(tmp_path / name)[0]["subject"])
    assert names[0] != names[1]


# Using it


def test_sections_and_labels_are_those_of_the_datalist(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (9, 12, 14), dtype=np.uint8)
    np.savez(tmp_path / "breastmnist.npz", train_images=images[:6], train_labels=np.arange(6)[:, None],
             test_images=images[6:], test_labels=np.arange(3)[:, None])  # fmt: skip
    index([tmp_path / "breastmnist.npz"], tmp_path / "out/datalist.json")
    pack(tmp_path / "out/datalist.json", tmp_path / "store", num_workers=1)
    training, test = load_datalist(tmp_path / "store"), load_datalist(tmp_path / "store", "test")
    assert [item["label"] for item in training] == [0, 1, 2, 3, 4, 5]
    assert [item["label"] for item in test] == [0, 1, 2]
    assert torch.equal(test[2]["image"][0, 0].mul(255).round().byte(), torch.from_numpy(images[8]))
    with pytest.raises(InputError, match="has no split 'valid', but t"):
        load_datalist(tmp_path / "store", "valid")


def test_several_modalities_of_a_store_can_be_had(store):
    names = {item["modality"] for item in Store(store)}
    some = sorted(names)[:2]
    expected = [item["modality"] for item in Store(store) if item["modality"] in some]
    assert [item["modality"] for item in load_datalist(store, modality=some)] == expected
    assert names > set(expected) == set(some)
    with pytest.raises(InputError, match="has no modality 'oct', but"):
        load_datalist(store, modality=[*some, "oct"])


def test_one_modality_of_a_store_can_be_had(store):
    assert {item["modality"] for item in load_datalist(store, modality="mri")} == {"mri"}
    assert len(load_datalist(store, modality="mri")) == 3
    with pytest.raises(InputError, match="has no modality 'oct', but"):
        load_datalist(store, modality="oct")


def test_an_encoder_takes_images_of_a_store_whole(folder, store):
    transform = encoder_transform(1, (32, 32), 0.5, 0.5)
    (expected,) = (transform(item)["image"] for item in load_datalist(folder / "ultrasound"))
    stored = [item for item in Store(store) if item["modality"] == "ultrasound"]
    torch.testing.assert_close(transform(stored[0])["image"].as_tensor(), expected.as_tensor(), rtol=0, atol=2e-3)


def test_images_prepared_in_another_way_are_refused(store):
    crops = RandomCropDataset(Store(store), training_transform(1, presets={"ct": {"window": "lung"}}), (16, 16))
    with pytest.raises(RuntimeError) as caught:
        [crops[number] for number in range(10)]
    assert "the store holds ct prepared with" in str(caught.value.__cause__)


def test_images_of_a_store_that_are_too_small_are_left_out_with_a_warning(store, caplog):
    crops = RandomCropDataset(Store(store), training_transform(1), (60, 60))
    assert len(crops) == 3
    assert "7 of 10 images are smaller than the crop 60 x 60" in caplog.text
    assert {crops[number]["modality"] for number in range(6)} == {"fundus"}
    with pytest.raises(InputError, match=r"all 10 images are smaller than the crop 900 x 900\. Give a smaller"):
        RandomCropDataset(Store(store), training_transform(1), (900, 900))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_see_the_same_crops_in_the_same_order(store, workers):
    crops = RandomCropDataset(Store(store), training_transform(1), (8, 32, 24), batch_size=4)
    first = DataLoader(torch.utils.data.Subset(crops, range(16)), batch_size=4)
    other = DataLoader(torch.utils.data.Subset(crops, range(16)), batch_size=4, num_workers=workers)
    for a, b in zip(first, other, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert a["modality"] == b["modality"]


def test_a_dataset_of_a_store_can_be_sent_to_another_process(store):
    crops = RandomCropDataset(Store(store), training_transform(1), (8, 32, 24))
    again = pickle.loads(pickle.dumps(crops))  # noqa: S301 - our own
    assert torch.equal(again[3]["image"], crops[3]["image"])


def test_a_fraction_of_a_store_keeps_its_share(store):
    assert len(RandomCropDataset(Store(store), training_transform(1), (16, 16), fraction=0.5)) == 5


def test_a_damaged_shard_is_named(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    (shard,) = (tmp_path / "store").glob("*.b2")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match=r"shard-000000\.b2: (no image at byte|an image cannot be decoded)"):
        [item["image"].whole() for item in load_datalist(tmp_path / "store")]
    (tmp_path / "store" / INDEX).write_bytes(b"PAR1")
    with pytest.raises(InputError, match="no index that can be read"):
        load_datalist(tmp_path / "store")


@pytest.fixture
def copied(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


def test_a_store_is_as_it_was_packed_until_a_byte_of_an_image_is_another(copied):
    assert verify(copied, num_workers=1) == f"{copied}: all 10 images are as they were packed."
    rows = pq.read_table(copied / INDEX).to_pylist()
    content = (copied / "shard-000000.b2").read_bytes()
    for row in (rows[2], rows[7]):
        byte = row["start"] * 64 + row["bytes"] // 2
        content = content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :]
    (copied / "shard-000000.b2").write_bytes(content)
    with pytest.raises(InputError, match=r"2 of 10 images are not as they .* in shard-000000.b2 \(2\)\. Copy"):
        verify(copied, num_workers=1)


def test_no_byte_of_a_shard_changes_an_image_unnoticed(copied):
    shard, rng = copied / "shard-000000.b2", np.random.default_rng(0)
    content = shard.read_bytes()
    starts = [start * 64 for start in pq.read_table(copied / INDEX)["start"].to_pylist()]
    # Headers and ends of frames, where sizes and places stand, and anywhere.
    places = [start + byte for start in starts[::3] for byte in range(0, 160, 9)]
    places += [start - byte for start in [*starts[1::4], len(content)] for byte in range(1, 200, 17)]
    places += rng.integers(len(content), size=40).tolist()

    def shown():
        return [(sample["image"][...].numpy().tobytes(), sample["image"].spacing) for sample in Store(copied)]

    whole, noticed = shown(), 0
    for number, byte in enumerate(places):
        changed = copied.with_name(f"changed-{number}")
        copied.rename(changed)
        copied = changed
        shard = copied / "shard-000000.b2"
        shard.write_bytes(content[:byte] + bytes([content[byte] ^ (1 << number % 8)]) + content[byte + 1 :])
        try:
            verify(copied, num_workers=1)
        except InputError:
            noticed += 1
        else:
            assert shown() == whole, byte
    assert noticed > 40


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_shards_that_are_gone_or_cut_are_not_as_they_were_packed(copied, damage):
    shard = copied / "shard-000000.b2"
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size * 3 // 4 if damage == "cut" else 0)
    with pytest.raises(InputError, match=r"\d+ of 10 images are not as they were packed, in shard-000000.b2"):
        verify(copied, num_workers=1)


def test_what_is_no_finished_store_is_not_verified(copied, tmp_path):
    with pytest.raises(InputError, match="no store"):
        verify(tmp_path)
    (copied / INDEX).unlink()
    with pytest.raises(InputError, match="not finished"):
        verify(copied)


# Twins


def test_images_of_a_benchmark_are_left_out_and_listed(folder, tmp_path):
    (tmp_path / "benchmark/fundus").mkdir(parents=True)
    Image.open(folder / "fundus/1.png").convert("RGB").resize((230, 180)).save(tmp_path / "benchmark/fundus/x.jpg")
    pack(tmp_path / "benchmark", tmp_path / "test_store", num_workers=1)
    pack(folder / "fundus", tmp_path / "store", exclude_benchmark=[tmp_path / "test_store"], num_workers=1)
    assert len(Store(tmp_path / "store")) == 2
    with (tmp_path / "store-excluded.csv").open(encoding="utf-8") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [str(folder / "fundus/1.png")]
    with pytest.raises(InputError, match="no finished store to exclude"):
        pack(folder / "fundus", tmp_path / "other", exclude_benchmark=[tmp_path / "nowhere"])


def test_nearly_the_same_images_are_counted(tmp_path):
    (tmp_path / "images/dermoscopy").mkdir(parents=True)
    photo = Image.fromarray(photographs.chelsea())
    photo.save(tmp_path / "images/dermoscopy/a.png")
    photo.save(tmp_path / "images/dermoscopy/b.jpg", quality=70)
    photo.resize((300, 200)).save(tmp_path / "images/dermoscopy/c.png")
    Image.fromarray(photographs.coffee()).save(tmp_path / "images/dermoscopy/d.png")
    pack(tmp_path / "images", tmp_path / "store", num_workers=1)
    assert Store(tmp_path / "store").alike.tolist() == [3, 3, 3, 1]


def test_the_volumes_of_one_file_are_alike(tmp_path):
    (tmp_path / "images/mri").mkdir(parents=True)
    values = np.random.default_rng(0).random((12, 13, 14, 5)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "images/mri/bold.nii.gz")
    pack(tmp_path / "images", tmp_path / "store", num_workers=1)
    assert Store(tmp_path / "store").alike.tolist() == [5] * 5


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30), st.integers(0, 63), st.integers(0, 63))
@settings(max_examples=100, deadline=None)
def test_counting_near_hashes_agrees_with_comparing_all_pairs(numbers, a, b):
    numbers = (
        numbers + [number ^ (1 << a) for number in numbers[::2]] + [n ^ (1 << a) ^ (7 << b) % 2**64 for n in numbers]
    )
    hashes = np.array(numbers, dtype=np.uint64)
    slow = [sum((x ^ y).bit_count() <= 3 for y in numbers) for x in numbers]
    assert count_alike(hashes).tolist() == slow
    half = len(numbers) // 2
    slow = [sum((x ^ y).bit_count() <= 3 for y in numbers[half:]) for x in numbers[:half]]
    assert count_alike(hashes[:half], hashes[half:]).tolist() == slow


def test_a_hash_hardly_changes_with_size_and_changes_with_the_picture():
    photo = Image.fromarray(photographs.chelsea())
    small = perceptual_hash(np.asarray(photo.resize((200, 133))))
    assert (perceptual_hash(np.asarray(photo)) ^ small).bit_count() <= 3
    assert (perceptual_hash(photographs.coffee()) ^ small).bit_count() > 10


def test_the_command_packs_and_a_bundle_could_load_it(folder, tmp_path, run):
    done = run("-m", "biovfm_monai.cli", "pack", folder / "fundus", tmp_path / "store", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "store: ready, 3 images in 1 file(s)" in done.stdout
    assert "1 duplicates (store-duplicates.csv)" in done.stdout
    about = json.loads((tmp_path / "store/store.json").read_text())
    assert about["spacing"] is None
