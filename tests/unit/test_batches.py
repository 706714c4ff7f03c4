"""Crops, batches and views: from samples to what a method is given."""

import pickle
import re
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import cause_of, write_nifti, write_png
from monai.data import MetaTensor
from monai.transforms import Compose
from torch.utils.data import DataLoader, default_collate

from biovfm_monai import distributed
from biovfm_monai.data import (
    POLICIES,
    GlobalBatchSampler,
    MultiCrop,
    Policy,
    RandomCropDataset,
    RandomResizedCrop,
    Store,
    find_images,
    pack,
    training_transform,
)
from biovfm_monai.data.encoding import shares
from biovfm_monai.data.views import Drawn
from biovfm_monai.errors import InputError, UnreadableError
from biovfm_monai.methods import MAE
from biovfm_monai.networks import spad_vit_tiny
from biovfm_monai.networks.masking import random_mask

# Crops


def stream(count=5, size=(3, 8, 9), crop=(2, 4, 5), **options):
    images = torch.arange(count * np.prod(size)).view(count, 1, *size)
    load = Compose([lambda item: {"image": images[item["number"]], "modality": "ct"}])
    return images, RandomCropDataset([{"number": i} for i in range(count)], load, crop, **options)


def test_a_crop_depends_on_the_seed_and_its_number_only():
    (_, first), (_, again), (_, other) = stream(seed=3), stream(seed=3, cache_rate=0.4), stream(seed=4)
    crops = [first[n]["image"] for n in range(20)]
    assert all(torch.equal(again[n]["image"], crops[n]) for n in (19, 3, 11, 3))
    assert not all(torch.equal(other[n]["image"], crops[n]) for n in range(20))


def test_images_are_read_once_and_kept_in_memory(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("biovfm_monai.data.reading._of_nifti", lambda path, _: read.append(path) or _volume())
    (tmp_path / "mri").mkdir()
    write_nifti(tmp_path / "mri/a.nii.gz", np.zeros((8, 8, 8)))
    crops = RandomCropDataset(find_images(tmp_path), training_transform(1), (4, 4))
    for number in range(10):
        crops[number]
    assert len(read) == 1


PIXELS = np.zeros((9, 9), np.uint8)


def photos(folder, count):
    """Images of one grey level each, their number, read again for every crop."""
    items = []
    for number in range(count):
        write_png(folder / f"{number}.png", PIXELS + np.uint8(number))
        items.append({"image": str(folder / f"{number}.png"), "modality": "xray"})
    return RandomCropDataset(items, training_transform(1), (4, 4), cache_rate=0.0)


def shown(crops):
    return [int((255 * crop["image"].float()).round().unique()) for crop in crops]


def test_an_image_that_breaks_in_the_middle_of_a_run_is_replaced_by_the_same_other_one_in_every_run(tmp_path, caplog):
    crops = photos(tmp_path, 20)
    whole = shown(crops[n] for n in range(60))
    for broken in (3, 7):
        (tmp_path / f"{broken}.png").write_bytes(b"broken")
    found = shown(crops[n] for n in range(60))
    assert len(caplog.records) == 2
    assert all(str(tmp_path / f"{broken}.png") in caplog.text for broken in (3, 7))
    assert [number for number, before in enumerate(whole) if before not in (3, 7)] == [
        number for number, (before, after) in enumerate(zip(whole, found, strict=True)) if before == after
    ]
    assert not {3, 7} & set(found)
    again = RandomCropDataset(crops.images.data, training_transform(1), (4, 4), cache_rate=0.0)
    assert shown(again[n] for n in reversed(range(60))) == found[::-1]


def test_what_takes_the_place_of_broken_images_keeps_the_weights_of_the_sources():
    items = [{"source": f"s{n % 3}", "number": n} for n in range(300)]

    def load(item):
        if item["number"] in (0, 3, 6):
            raise UnreadableError(f"{item['number']} is broken")
        return {"image": torch.full((1, 1, 2, 2), int(item["source"][1:])), "modality": "ct"}

    weights = {"s0": 100.0, "s1": 5.0, "s2": 0.0}
    crops = RandomCropDataset(items, load, (2, 2), cache_rate=0, source_weights=weights)
    replaced = [n for n in range(10_000) if crops._row(n, 0) in (0, 3, 6)]
    shares = np.bincount([int(crops[n]["image"].max()) for n in replaced], minlength=3) / len(replaced)
    assert len(replaced) > 200
    assert shares == pytest.approx([97 / 102, 5 / 102, 0], abs=0.04)


def test_too_many_images_that_break_end_the_run(tmp_path):
    crops = photos(tmp_path, 6)
    for broken in range(4):
        (tmp_path / f"{broken}.png").unlink()
    with pytest.raises(InputError, match=r"4 of 6 images cannot be read any more, the last one: .*\d\.png"):
        [crops[n] for n in range(40)]


def test_a_broken_file_among_those_kept_in_memory_is_named_with_what_lists_all_such_files(tmp_path):
    items = [{"image": str(write_png(tmp_path / f"{n}.png", PIXELS)), "modality": "xray"} for n in range(3)]
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1\.png: .*Repair or remove the file\. `biovfm pack` lists all such files"):
        RandomCropDataset(items, training_transform(1), (4, 4))


def test_a_mistake_of_the_program_is_not_an_images_fault():
    crops = RandomCropDataset([{}] * 6, lambda item: item["picture"], (4, 4), cache_rate=0.0)
    with pytest.raises(RuntimeError) as caught:
        crops[0]
    assert isinstance(caught.value.__cause__, KeyError)


def _volume():
    return np.ones((8, 8, 8)), {"affine": np.eye(4), "original_channel_dim": "no_channel"}


def test_the_seed_moves_the_places_of_crops_too():
    (_, first), (_, other) = stream(count=1, seed=3), stream(count=1, seed=4)
    assert not all(torch.equal(first[n]["image"], other[n]["image"]) for n in range(20))


def test_each_pass_visits_every_image_once_in_an_order_of_its_own():
    images, crops = stream(count=7)
    passes = [[int(crops[7 * k + n]["image"].min()) // images[0].numel() for n in range(7)] for k in range(4)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1


def sources(counts, **options):
    """One image of one voxel per item, which holds its number, from sources of the given sizes."""
    items = [{"number": n, "source": f"s{s}"} for s, n in enumerate(counts) for n in [s] * n]

    def load(item):
        return {"image": torch.full((1, 1, 2, 2), int(item["source"][1:])), "modality": "ct"}

    return RandomCropDataset(items, load, (2, 2), **options)


def test_a_raised_source_comes_as_often_as_its_weight_says():
    crops = sources((90, 10), source_weights={"s1": 9.0})
    of_raised = [int(crops[n]["image"].max()) for n in range(1000)]
    assert sum(of_raised) == pytest.approx(500, abs=50)
    even = sources((90, 10), temperature=1e6)
    assert sum(int(even[n]["image"].max()) for n in range(1000)) == pytest.approx(500, abs=50)


def test_a_fraction_keeps_that_share_of_every_source():
    crops = sources((90, 10), fraction=0.3)
    assert len(crops) == 30
    assert sum(int(crops[n]["image"].max()) for n in range(30)) == 3


@pytest.mark.parametrize("crop", [(2, 4, 5), (4, 5), (3, 8, 9)])
def test_a_crop_is_a_part_of_its_image_and_every_place_occurs(crop):
    images, crops = stream(count=1, crop=crop)
    size = (1, *crop)[-3:]
    windows = images[0, 0].unfold(0, size[0], 1).unfold(1, size[1], 1).unfold(2, size[2], 1)
    places = {tuple(w.flatten().tolist()) for w in windows.reshape(-1, int(np.prod(size)))}
    seen = {tuple(crops[n]["image"].flatten().tolist()) for n in range(600)}
    assert crops[0]["image"].shape == (1, *size)
    assert seen == places


@pytest.mark.parametrize(("crop", "fits"), [((5, 6), True), ((2, 5, 6), True), ((2, 5, 7), False), ((5, 7), False)])
def test_an_image_smaller_than_the_crop_is_refused(crop, fits):
    def load(_):
        return {"image": MetaTensor(torch.ones(1, 2, 5, 6), meta={"filename_or_obj": "a.png"}), "modality": "ct"}

    if fits:
        assert RandomCropDataset([{}], load, crop)[0]["image"].shape == (1, *((1, *crop)[-3:]))
    else:
        message = cause_of(lambda: RandomCropDataset([{}], load, crop)[0])
        assert re.match(r"a\.png: size 2 x 5 x 6 is smaller than the crop .*--crop_size", message)


def test_a_volume_with_fewer_slices_than_the_crop_gives_single_ones(caplog):
    with caplog.at_level("INFO"):
        crops = stream(count=2, size=(3, 8, 9), crop=(4, 4, 5))[1]
    assert "2 of 2 images have fewer slices than a crop" in caplog.text
    assert (crops[0]["image"].shape, crops[0]["anisotropy"]) == ((1, 1, 4, 5), 5)
    assert {int(crops[number]["image"].min()) // 72 % 3 for number in range(40)} == {0, 1, 2}


@pytest.mark.parametrize("size", [96, (96,), (0, 96)])
def test_a_crop_size_that_means_nothing_is_refused(size):
    with pytest.raises(InputError, match=r"crop_size .* such as \[96,96\]"):
        stream(crop=size)


@pytest.mark.parametrize("zoom", [(0, 1), (2, 1), (1,)])
def test_a_zoom_that_means_nothing_is_refused(zoom):
    with pytest.raises(InputError, match=r"zoom .* such as \[0\.75,2\]"):
        stream(zoom=zoom)


def test_a_zoomed_crop_shows_more_or_less_of_the_image_and_never_beyond_it():
    ramp = torch.arange(40.0).expand(1, 1, 30, 40)
    crops = RandomCropDataset([{}], lambda _: {"image": ramp, "modality": "ct"}, (10, 10), zoom=(0.5, 8.0))
    spans = []
    for number in range(200):
        crop = crops[number]["image"]
        assert crop.shape == (1, 1, 10, 10)
        assert 0 <= crop.min() <= crop.max() <= 39
        spans.append(float((crop[0, 0, 0, -1] - crop[0, 0, 0, 0]) / 9))
    assert min(spans) < 0.6
    assert 2.7 < max(spans) <= 3.0
    again = RandomCropDataset([{}], lambda _: {"image": ramp, "modality": "ct"}, (10, 10), zoom=(0.5, 8.0))
    assert torch.equal(again[150]["image"], crops[150]["image"])


def test_an_image_smaller_than_the_crop_is_magnified_where_zoom_allows_it():
    small = torch.rand(1, 1, 6, 6)
    crops = RandomCropDataset([{}], lambda _: {"image": small, "modality": "ct"}, (10, 10), zoom=(0.6, 1.0))
    assert crops[0]["image"].shape == (1, 1, 10, 10)
    crops = RandomCropDataset([{}], lambda _: {"image": small, "modality": "ct"}, (10, 10), zoom=(0.7, 1.0))
    told = "an image in memory: size 1 x 6 x 6 is smaller than the crop 1 x 7 x 7"
    assert cause_of(crops.__getitem__, 0).startswith(told)


def thick(counts, batch_size, **options):
    """Volumes of 32 voxels a side and of thicker slices, as many of each degree of anisotropy as given."""
    items = [{"degree": degree, "source": "a"} for degree, n in enumerate(counts) for _ in range(n)]

    def load(item):
        depth = 1 if item["degree"] == 5 else 40 >> item["degree"]
        image = torch.full((1, depth, 32, 32), float(item["degree"]))
        affine = torch.diag(torch.tensor([2.0 ** item["degree"], 1, 1, 1], dtype=torch.float64))
        return {"image": MetaTensor(image, affine=affine), "modality": "ct"}

    return RandomCropDataset(items, load, (32, 16, 16), batch_size=batch_size, **options)


def test_each_batch_of_volumes_has_one_degree_and_thick_slices_give_as_many_fewer():
    crops = thick((6, 4, 0, 2, 2, 6), batch_size=4)
    degrees = []
    for batch in range(1000):
        samples = [crops[batch * 4 + n] for n in range(4)]
        (degree,) = {sample["anisotropy"] for sample in samples}
        assert {sample["image"].shape for sample in samples} == {(1, (32, 16, 8, 4, 2, 1)[degree], 16, 16)}
        assert all((sample["image"] == degree).all() for sample in samples)
        degrees.append(degree)
    shares = np.bincount(degrees, minlength=6) / 1000
    assert shares == pytest.approx(np.array([6, 4, 0, 2, 2, 6]) / 20, abs=0.02)


def ramps(spacing, size):
    """A volume whose three channels count its voxels along each axis."""
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in size], indexing="ij"))
    return MetaTensor(grid, affine=affine)


def zooms(crops, count=120):
    """Voxels of the image per voxel of a crop, along each axis, of many crops."""
    found = []
    for number in range(count):
        image = crops[number]["image"]
        lines = [image[axis].transpose(0, axis).flatten(1).mean(1) for axis in range(3)]
        # Near the border a magnified image repeats its last voxels.
        inner = [
            (line[-1 - len(line) // 4] - line[len(line) // 4], len(line) - 1 - 2 * (len(line) // 4)) for line in lines
        ]
        found.append([float(span) / count for span, count in inner])
    return np.array(found)


@pytest.mark.parametrize("thickness", [2.0, 2.9, 3.9])
def test_thick_slices_are_zoomed_in_their_plane_as_far_as_their_degree_stays(thickness):
    image = ramps((thickness, 1, 1), (20, 64, 64))
    crops = RandomCropDataset([{}], lambda _: {"image": image, "modality": "ct"}, (32, 20, 20), zoom=(0.5, 3.0))
    assert {(crops[n]["anisotropy"], crops[n]["image"].shape[1]) for n in range(20)} == {(1, 16)}
    depth, height, width = zooms(crops).T
    assert np.allclose(depth, 1)
    assert np.allclose(height, width, atol=0.01)
    # The degree is 1 while slices are 2 to 4 times as far apart as the crop's pixels; a box has whole voxels.
    assert (np.log2(thickness / height) > 1 - 0.06).all()
    assert (np.log2(thickness / height) < 2 + 0.06).all()
    assert height.max() / height.min() > 1.6


@pytest.mark.parametrize(("thickness", "stretched"), [(1.0, True), (1.4, True), (1.6, False)])
def test_nearly_isotropic_volumes_are_zoomed_along_all_axes_and_sometimes_a_little_across_slices(thickness, stretched):
    image = ramps((thickness, 1, 1), (80, 80, 80))
    crops = RandomCropDataset([{}], lambda _: {"image": image, "modality": "ct"}, (30, 30, 30), zoom=(0.7, 2.0))
    assert {crops[n]["anisotropy"] for n in range(20)} == {0}
    depth, height, width = zooms(crops).T
    assert np.allclose(height, width, atol=0.01)
    ratio = depth / height
    assert ((ratio > 0.75) & (ratio < 1.3)).all()
    share = (np.abs(ratio - 1) > 0.06).mean()
    assert (0.1 < share < 0.35) if stretched else share == 0


def test_the_store_and_the_files_zoom_alike(tmp_path):
    rng = np.random.default_rng(0)
    for number, thick_slices in enumerate((1, 3, 6)):
        shape = (40, 40, 40 // thick_slices)
        (tmp_path / "ct").mkdir(exist_ok=True)
        write_nifti(tmp_path / f"ct/{number}.nii.gz", rng.integers(-900, 900, shape), spacing=(1, 1, thick_slices))
    pack(tmp_path / "ct", tmp_path / "store", num_workers=1)
    options = {"crop_size": (16, 16, 16), "zoom": (0.6, 2.0), "batch_size": 2}
    files = RandomCropDataset(find_images(tmp_path / "ct"), training_transform(1), **options)
    packed = RandomCropDataset(Store(tmp_path / "store"), training_transform(1), **options)
    for number in range(60):
        torch.testing.assert_close(files[number]["image"], packed[number]["image"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("degree", [0, 1, 4, 5])
def test_views_of_thick_slices_have_as_many_fewer(degree):
    view = RandomResizedCrop((32, 16, 16), scale=(1.0, 1.0), policy=Policy(flip=0.0))
    crop = torch.rand(2, 1, max(32 >> degree, 1) if degree < 5 else 1, 16, 16)
    batch = {"image": crop, "anisotropy": torch.tensor([degree, degree]), "modality": ["ct", "ct"]}
    made = view(batch, torch.device("cpu"))
    torch.testing.assert_close(made["image"], crop * 2 - 1)
    assert made["anisotropy"] is batch["anisotropy"]


def test_a_method_learns_from_batches_of_all_degrees():
    encoder = spad_vit_tiny(in_channels=1, img_size=(32, 16, 16), patch_size=(8, 8, 8), depth=1, embed_dim=48)
    method = MAE(encoder, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    crops, view = thick((2, 2, 2, 2, 2, 2), batch_size=2), RandomResizedCrop((32, 16, 16))
    seen = set()
    for batch in range(24):
        samples = default_collate([crops[batch * 2 + n] for n in range(2)])
        method(view(samples, torch.device("cpu")))["loss"].backward()
        seen.add(int(samples["anisotropy"][0]))
    assert seen == {0, 1, 2, 3, 4, 5}


def test_images_that_are_alike_come_less_often():
    items = [{"number": n, "alike": 4} for n in range(4)] + [{"number": 4}, {"number": 5}]
    crops = RandomCropDataset(
        items, lambda item: {"image": torch.full((1, 1, 2, 2), item["number"]), "modality": "mri"}, (2, 2)
    )
    counts = np.bincount([int(crops[n]["image"].max()) for n in range(3000)]) / 3000
    # Four of 7/16 each beside two of 1: 3.75 in all.
    assert counts == pytest.approx([7 / 16 / 3.75] * 4 + [1 / 3.75] * 2, abs=0.01)


def test_a_stream_of_no_images_is_refused():
    with pytest.raises(InputError, match=r"empty.*--dataset_dir"):
        stream(count=0)


def test_crops_reach_workers_that_are_spawned(tmp_path):
    item = {"image": str(write_nifti(tmp_path / "a.nii.gz", np.arange(216).reshape(6, 6, 6))), "modality": "mri"}
    crops = RandomCropDataset([item], training_transform(1), (4, 4))
    copy = pickle.loads(pickle.dumps(crops))  # noqa: S301 - our own
    assert torch.equal(copy[5]["image"], crops[5]["image"])


# Sampling


def global_batches(monkeypatch, world, accumulation, seen):
    """Per optimizer step, the numbers that all processes and micro-batches draw together."""
    steps = [[] for _ in range(3)]
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sampler = GlobalBatchSampler(16, 3, accumulation)
        sampler.samples_seen = seen
        micro = list(sampler)
        assert [len(m) for m in micro] == [16 // world // accumulation] * len(sampler)
        for number, numbers in enumerate(micro):
            steps[number // accumulation] += numbers
    return [sorted(step) for step in steps]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("seen", [0, 48])
def test_the_global_batch_is_the_same_on_any_number_of_processes(monkeypatch, world, accumulation, seen):
    expected = [list(range(seen + 16 * step, seen + 16 * step + 16)) for step in range(3)]
    assert global_batches(monkeypatch, world, accumulation, seen) == expected


def of_all_kinds():
    """Crops of volumes, thick slices and photographs of eight and sixteen bits, some of them zoomed, some broken."""

    def load(item):
        number = item["number"]
        if item["broken"] and number in (4, 15):
            raise UnreadableError(f"{number} is broken")
        degree = (0, 2, 5)[number % 3]
        depth, generator = 1 if degree == 5 else 40 >> degree, torch.Generator().manual_seed(number)
        image = torch.rand(1, depth, 32, 32, generator=generator)
        affine = torch.diag(torch.tensor([2.0**degree, 1, 1, 1], dtype=torch.float64))
        image = (image * 255).byte() if number % 4 < 2 else image.half()
        return {"image": MetaTensor(image, affine=affine), "modality": ("ct", "mri", "fundus")[number % 3]}

    items = [{"number": number, "broken": False} for number in range(24)]
    crops = RandomCropDataset(
        items, load, (32, 16, 16), seed=3, batch_size=8, cache_rate=0, zoom=(0.7, 1.3), temperature=2.0
    )
    for item in items:
        item["broken"] = True
    return crops


def seen(crops, workers=0):
    """Per sample its key with a hash of its crop, of what was drawn for its views, and of its mask; and all views."""
    view = RandomResizedCrop((32, 16, 16), policy=POLICIES)
    views = MultiCrop([view, view], RandomResizedCrop((16, 8, 8), scale=(0.05, 0.3), policy=POLICIES), 2)
    samples, pixels = [], []
    for batch in DataLoader(crops, batch_sampler=GlobalBatchSampler(8, 6), num_workers=workers):
        made, degree = views(batch, torch.device("cpu")), int(batch["anisotropy"][0])
        drawn = view.draw(batch["image"], degree, batch["key"], batch["modality"])
        keep, _ = random_mask(batch["key"], 64, 0.75)
        exact = [shares(batch["image"]), drawn.maps, *drawn.changes, keep]
        for n, key in enumerate(batch["key"].tolist()):
            content = b"".join(of[n].contiguous().numpy().tobytes() for of in exact)
            samples.append((key, batch["modality"][n], sha256(content).hexdigest()))
            pixels.append(torch.cat([made[name][:, n].flatten() for name in ("global_crops", "local_crops")]))
    return samples, pixels


def test_workers_see_the_same_images_views_and_masks_in_the_same_order_as_one_process():
    (samples, pixels), (again, others) = seen(of_all_kinds()), seen(of_all_kinds(), workers=2)
    assert len(set(samples)) == 48
    assert again == samples
    assert all(torch.equal(one, other) for one, other in zip(pixels, others, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_the_processes_of_a_run_see_together_the_same_images_views_and_masks_as_one(monkeypatch, world):
    def in_order(ranks):
        share = 8 // world
        return [one for n in range(0, len(ranks[0]), share) for rank in ranks for one in rank[n : n + share]]

    (samples, pixels), ranks = seen(of_all_kinds()), []
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks.append(seen(of_all_kinds()))
    assert in_order([samples for samples, _ in ranks]) == samples
    for one, other in zip(in_order([pixels for _, pixels in ranks]), pixels, strict=True):
        # Where a batch has another size, powers are rounded in another way.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("batch", "world", "accumulation"), [(6, 4, 1), (4, 2, 4), (0, 1, 1), (-2, 1, 1)])
def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch, batch, world, accumulation):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    with pytest.raises(InputError, match=f"batch_size {batch} .*multiple of {world * accumulation}"):
        GlobalBatchSampler(batch, 1, accumulation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("abc", 3), "batch_size 'abc' must be a whole number. Correct --batch_size"),
        ((4, 1.5), "steps_per_epoch 1.5 must be a whole number"),
        ((4, 0), "steps_per_epoch 0 must be above 0. Correct --steps_per_epoch"),
    ],
)
def test_numbers_of_a_batch_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        GlobalBatchSampler(*arguments)


# Views

SIZES = [(8, 8), (6, 8, 10)]


def raw_view(size, **options):
    return RandomResizedCrop(size, mean=0, std=1, **options)


def source(size, batch=2):
    return torch.rand(batch, 1, *((1, *size) if len(size) == 2 else size))


@pytest.mark.parametrize("size", SIZES)
def test_still_maps_give_the_source_back(size):
    view, image = raw_view(size), source(size)
    torch.testing.assert_close(view.apply(image.half(), view.still(image)).reshape(image.shape), image.half().float())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("corner", [-1, 1])
def test_a_map_of_half_the_sides_shows_exactly_its_corner(size, corner):
    image = source(size)
    half = [n // 2 for n in size]
    maps = torch.cat([torch.eye(len(size)) / 2, torch.full((len(size), 1), corner / 2)], dim=1).expand(2, -1, -1)
    shown = raw_view(half).apply(image, Drawn(maps, None))
    expected = image.view(2, 1, *size)[(..., *(slice(None, h) if corner < 0 else slice(h, None) for h in half))]
    torch.testing.assert_close(shown, expected)


@pytest.mark.parametrize("size", SIZES)
def test_a_flip_mirrors_the_width_and_nothing_else(size):
    view, image = raw_view(size, scale=(1, 1), ratio=(1, 1), policy=Policy(flip=1.0)), source(size)
    expected = image.view(2, 1, *size).flip(-1)
    torch.testing.assert_close(view.apply(image, view.draw(image)), expected)


@pytest.mark.parametrize("size", SIZES)
def test_a_view_is_normalised_by_mean_and_deviation(size):
    image, views = source(size), [raw_view(size), RandomResizedCrop(size, mean=0.2, std=0.4)]
    raw, normalised = (view.apply(image, view.still(image)) for view in views)
    torch.testing.assert_close(normalised, (raw - 0.2) / 0.4)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([*((s, s) for s in SIZES), ((8, 8), (20, 9)), ((8, 8, 8), (6, 30, 17))]),
    st.floats(0.05, 1), st.floats(0.05, 1), st.floats(1, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_drawn_views_lie_inside_the_source(sizes, a, b, ratio, seed):
    size, sourced = sizes
    view = RandomResizedCrop(size, scale=(min(a, b), max(a, b)), ratio=(1 / ratio, ratio))
    maps = view.draw(source(sourced, 64), keys=seed + torch.arange(64)).maps
    reach = maps[:, :, :-1].abs().sum(2) + maps[:, :, -1].abs()
    assert reach.max() <= 1 + 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_the_share_shown_fills_the_stated_range(size):
    share = RandomResizedCrop(size, scale=(0.2, 0.5)).draw(source(size, 2000)).maps[:, :, :-1].det().abs()
    assert 0.2 - 1e-5 <= share.min() < 0.21
    assert 0.49 < share.max() <= 0.5 + 1e-5
    assert abs(share.mean() - 0.35) < 0.01


def test_the_height_of_2d_views_over_their_width_fills_the_stated_range():
    maps = RandomResizedCrop((8, 8), scale=(0.1, 0.2), ratio=(1.0, 4.0)).draw(source((8, 8), 2000)).maps.abs()
    aspect = (maps[:, 1, 1] / maps[:, 0, 0]).log2()
    assert -1e-5 <= aspect.min() < 0.05
    assert 1.95 < aspect.max() <= 2 + 1e-5


def test_volumes_keep_their_proportions():
    sides = RandomResizedCrop((8, 8, 8)).draw(source((8, 8, 8), 100)).maps[:, :, :-1].abs().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(sides, sides[:, :1].expand(-1, 3))


@pytest.mark.parametrize(("size", "wide"), [((8, 8), (10, 30)), ((8, 4), (10, 30)), ((4, 8, 8), (9, 10, 30))])
def test_views_of_an_oblong_source_are_turned_and_zoomed_but_not_sheared_or_stretched(size, wide):
    image = source(wide, 200)
    maps = RandomResizedCrop(size, ratio=(1, 1), policy=Policy(rotation=180.0)).draw(image).maps[:, :, :-1]
    view, voxels = (torch.tensor(s[::-1], dtype=torch.float32) for s in (size, wide))
    zoomed = maps * voxels[:, None] / view
    zoom = zoomed.det().abs() ** (1 / len(size))
    turn = zoomed / zoom[:, None, None]
    torch.testing.assert_close(turn @ turn.mT, torch.eye(len(size)).expand_as(turn), atol=1e-5, rtol=0)
    assert turn[:, 0, 1].abs().max() > 0.99
    largest = min(n / v for n, v in zip(wide, size, strict=True))
    assert 0.2 ** (1 / len(size)) * largest - 1e-4 <= zoom.min() < zoom.max() <= largest + 1e-4


def test_a_still_view_of_an_oblong_source_is_its_middle():
    image = source((4, 10))
    view = raw_view((4, 4))
    torch.testing.assert_close(view.apply(image, view.still(image)), image[:, :, 0, :, 3:7])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_flips_happen_with_the_stated_probability(size, flip):
    flipped = RandomResizedCrop(size, policy=Policy(flip=flip)).draw(source(size, 4000)).maps[:, :, :-1].det() < 0
    assert abs(flipped.float().mean() - flip) < 0.03


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8)])
def test_each_flip_turns_its_own_axis(size):
    flips = {"flip": 0.2, "vertical_flip": 0.5, "depth_flip": 0.8}
    maps = RandomResizedCrop(size, policy=Policy(**flips)).draw(source(size, 4000)).maps
    along = (maps[:, :, :-1].diagonal(dim1=1, dim2=2) < 0).float().mean(0)
    torch.testing.assert_close(along, torch.tensor([*flips.values()])[: len(size)], rtol=0, atol=0.03)


def test_views_are_turned_either_way_by_up_to_the_stated_angle():
    views = RandomResizedCrop((8, 8), ratio=(1, 1), policy=Policy(flip=0, rotation=30.0))
    maps = views.draw(source((8, 8), 4000)).maps
    degrees = torch.atan2(maps[:, 1, 0], maps[:, 0, 0]).rad2deg()
    # Uniform: quarters of all views are below -15, 0 and 15 degrees.
    torch.testing.assert_close(
        degrees.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])),
        torch.tensor([-30.0, -15, 0, 15, 30]),
        rtol=0,
        atol=1.5,
    )


def test_drawn_maps_follow_their_keys_and_differ_within_a_batch():
    image = source((8, 8), 3)
    first, again = (RandomResizedCrop((8, 8)).draw(image, keys=torch.arange(len(image))).maps for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_as_prepare_batch_a_view_changes_the_image_only():
    batch = {"image": source((8, 8)), "modality": ["ct", "mri"], "label": torch.ones(2)}
    views = RandomResizedCrop((4, 6))(batch, torch.device("cpu"), non_blocking=True, extra=None)
    assert views["image"].shape == (2, 1, 4, 6)
    assert {k: v is batch[k] for k, v in views.items()} == {"image": False, "modality": True, "label": True}


def test_a_crop_of_several_slices_is_no_2d_view():
    view = RandomResizedCrop((8, 8))
    with pytest.raises(InputError, match=r"4 slices.*--img_size"):
        view.apply(torch.zeros(1, 1, 4, 8, 8), view.still(torch.zeros(1, 1, 4, 8, 8)))


def test_a_crop_of_one_slice_is_no_volume():
    view = RandomResizedCrop((4, 8, 8))
    with pytest.raises(InputError, match=r"one slice.*--crop_size"):
        view.apply(torch.zeros(1, 1, 1, 8, 8), Drawn(torch.eye(3, 4)[None], None))
