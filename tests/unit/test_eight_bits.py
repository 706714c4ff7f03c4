"""Images of eight bits travel as they are, and look the same as if they were floats."""

import numpy as np
import pytest
import torch
from image_files import write_nifti, write_png
from monai.data import DataLoader
from monai.transforms import CastToTyped, Compose
from torch.utils.data import Subset

from biovfm_monai.data import (
    ByModalityd,
    MatchChannelsd,
    MultiCrop,
    RandomCropDataset,
    RandomResizedCrop,
    ReadImaged,
    Store,
    find_images,
    pack,
    training_transform,
)
from biovfm_monai.data.encoding import eight_bits, shares

CPU = torch.device("cpu")


def as_floats(in_channels, **options):
    """As `training_transform`, but all images are float16."""
    steps = [ReadImaged("image"), ByModalityd("image", **options), CastToTyped("image", dtype=torch.float16)]
    return Compose([*steps, MatchChannelsd("image", in_channels)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Colour, grey and 16-bit images, four of each."""
    root = tmp_path_factory.mktemp("eight_bits") / "images"
    rng = np.random.default_rng(0)
    for name, shape in (("dermoscopy", (40, 44, 3)), ("oct", (40, 44))):
        (root / name).mkdir(parents=True)
        for number in range(4):
            write_png(root / name / f"{number}.png", rng.integers(0, 256, shape, np.uint8))
    (root / "ct").mkdir()
    for number in range(4):
        write_nifti(root / f"ct/{number}.nii.gz", rng.integers(-900, 900, (40, 44, 3)))
    pack(root, root.with_name("store"), num_workers=1)
    return root


@pytest.fixture(params=["files", "store"])
def source(request, folder):
    """Images of the given modalities, from files or a store."""

    def images(*modalities):
        if request.param == "files":
            return [item for item in find_images(folder) if item["modality"] in modalities]
        if len(modalities) == 1:
            return Store(folder.with_name("store"), modality=modalities[0])
        return Store(folder.with_name("store"))

    return images


def crops(data, transform, size=(32, 24), **options):
    return RandomCropDataset(data, transform, size, seed=3, **options)


def batches(dataset, batch_size=4, **options):
    return list(DataLoader(Subset(dataset, range(24)), batch_size=batch_size, **options))


ALL = ("dermoscopy", "oct", "ct")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("modality", ["dermoscopy", "oct"])
def test_a_batch_of_images_of_eight_bits_holds_their_numbers(source, modality, workers):
    dataset = crops(source(modality), training_transform(3))
    for batch in batches(dataset, num_workers=workers):
        assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, 3, 1, 32, 24))
    assert batch["image"].max() > 200


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixed_batch_holds_the_values_in_floats(source, folder, workers):
    mixed = batches(crops(source(*ALL), training_transform(3)), batch_size=8, num_workers=workers)
    expected = batches(crops([*find_images(folder)], as_floats(3)), batch_size=8)
    for batch, other in zip(mixed, expected, strict=True):
        assert batch["image"].dtype == torch.float16
        torch.testing.assert_close(batch["image"], other["image"], rtol=0, atol=1e-3)


VIEWS = [RandomResizedCrop((16, 16)), MultiCrop([RandomResizedCrop((16, 16))] * 2, RandomResizedCrop((8, 8)), 2)]


@pytest.mark.parametrize("view", VIEWS, ids=["one", "several"])
@pytest.mark.parametrize("zoom", [(1, 1), (0.7, 1.3)])
def test_views_are_to_the_bit_those_of_the_same_images_as_floats(source, folder, view, zoom):
    items = [item for item in find_images(folder) if item["modality"] == "dermoscopy"]
    numbers = batches(crops(source("dermoscopy"), training_transform(3), zoom=zoom))
    floats = batches(crops(items, as_floats(3), zoom=zoom))
    assert numbers[0]["image"].dtype == (torch.uint8 if zoom == (1, 1) else torch.float16)
    for batch, other in zip(numbers, floats, strict=True):
        made, expected = view(batch, CPU), view(other, CPU)
        for name in {"image", "global_crops", "local_crops"} & set(made):
            assert torch.equal(made[name], expected[name])
    assert torch.equal(VIEWS[0].still_view(batch["image"]), VIEWS[0].still_view(other["image"]))


def test_a_view_does_not_depend_on_what_else_is_in_the_batch(source):
    dataset = crops(source(*ALL), training_transform(3))
    large, small = (batches(dataset, batch_size=size) for size in (8, 1))
    assert {batch["image"].dtype for batch in large} == {torch.float16}
    assert {batch["image"].dtype for batch in small} == {torch.float16, torch.uint8}
    together, alone = (torch.cat([VIEWS[0](batch, CPU)["image"] for batch in of]) for of in (large, small))
    assert torch.equal(together, alone)


def test_a_crop_asked_for_by_its_number_is_in_floats(source, folder):
    dataset, expected = crops(source(*ALL), training_transform(3)), crops([*find_images(folder)], as_floats(3))
    for number in range(12):
        crop = dataset[number]["image"]
        assert crop.dtype == torch.float16
        torch.testing.assert_close(crop, expected[number]["image"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("modality", "bytes_each"), [("oct", 1), ("dermoscopy", 3), ("ct", 2 * 3)])
def test_memory_holds_each_number_of_eight_bits_as_a_byte(folder, modality, bytes_each):
    items = [item for item in find_images(folder) if item["modality"] == modality]
    dataset = crops(items, training_transform(3))
    assert {sample["image"].untyped_storage().nbytes() for sample in dataset.images} == {40 * 44 * bytes_each}


def test_pixels_of_a_channel_lie_side_by_side_in_memory_so_that_crops_are_copied_fast(folder):
    dataset = crops([*find_images(folder)], training_transform(3))
    assert all(sample["image"][0].is_contiguous() for sample in dataset.images)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_what_is_computed_of_eight_bits_is_not_rounded_to_them(source, folder, in_channels):
    """Zoomed crops, and colours that become their luminance."""
    zoom = (1, 1) if in_channels == 1 else (1.2, 1.3)
    items = [item for item in find_images(folder) if item["modality"] == "dermoscopy"]
    made = batches(crops(source("dermoscopy"), training_transform(in_channels), zoom=zoom))
    expected = batches(crops(items, as_floats(in_channels), zoom=zoom))
    for batch, other in zip(made, expected, strict=True):
        assert torch.equal(batch["image"], other["image"])
        assert ((batch["image"].float() * 255).frac() - 0.5).abs().min() < 0.1


def test_a_photo_that_a_preset_shrinks_has_the_same_eight_bits_from_files_and_from_a_store(tmp_path):
    (tmp_path / "oct").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (600, 520), np.uint8)
    write_png(tmp_path / "oct/a.png", noise)
    pack(tmp_path / "oct", tmp_path / "store", num_workers=1)
    data = (find_images(tmp_path / "oct"), Store(tmp_path / "store"))
    one, other = (batches(crops(of, training_transform(1)))[0]["image"] for of in data)
    assert one.dtype == torch.uint8
    assert torch.equal(one, other)


def test_an_image_of_a_store_has_the_same_eight_bits_whole_as_its_file(folder):
    transform = training_transform(3)
    items = zip(find_images(folder), Store(folder.with_name("store")), strict=True)
    for one, other in ((transform(item)["image"], transform(stored)["image"]) for item, stored in items):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.as_tensor(), other.as_tensor(), rtol=0, atol=1e-3)


def test_eight_bits_that_a_preset_brings_beyond_one_stay_floats(tmp_path):
    (tmp_path / "mri").mkdir()
    write_png(tmp_path / "mri/a.png", np.random.default_rng(0).integers(0, 256, (40, 44), np.uint8))
    presets = {"mri": {"z_score": True}}
    pack(tmp_path / "mri", tmp_path / "store", presets=presets, num_workers=1)
    for data in (find_images(tmp_path / "mri"), Store(tmp_path / "store")):
        (batch, *_) = batches(crops(data, training_transform(1, presets=presets)))
        assert batch["image"].dtype == torch.float16
        assert batch["image"].min() < -1


def test_eight_bits_of_other_steps_than_a_255th_become_floats(tmp_path):
    (tmp_path / "ct").mkdir()
    write_nifti(tmp_path / "ct/a.nii.gz", np.random.default_rng(0).integers(0, 80, (40, 44, 3)))
    presets = {"ct": {"window": "brain"}}
    pack(tmp_path / "ct", tmp_path / "store", presets=presets, num_workers=1)
    assert Store(tmp_path / "store")[0]["image"].dtype == np.uint8
    data = (find_images(tmp_path / "ct"), Store(tmp_path / "store"))
    one, other = (batches(crops(of, training_transform(1, presets=presets)))[0]["image"] for of in data)
    assert one.dtype == other.dtype == torch.float16
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_every_number_of_eight_bits_is_the_same_float_by_any_way():
    numbers = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(shares(numbers), (numbers.float() / 255).half())
    assert torch.equal(eight_bits(shares(numbers).float()), numbers)
    assert torch.equal(shares(torch.ones(2)), torch.ones(2))
