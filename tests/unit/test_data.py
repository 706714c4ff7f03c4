"""Readers and presets: from files to samples."""

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from image_files import cause_of, preset, write_dicom, write_nifti, write_png
from monai.data import MetaTensor
from PIL import Image

from biovfm_monai.anisotropy import spacing_of
from biovfm_monai.checkpoints import save_encoder
from biovfm_monai.data import (
    ByModalityd,
    FitSized,
    MatchChannelsd,
    encoder_transform,
    find_images,
    load_datalist,
    medmnist,
    read_image,
    training_transform,
)
from biovfm_monai.data.modalities.base import Resampled, SlicesFirstd
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import embed_files, transform_of
from biovfm_monai.networks import Embedder, spad_vit_tiny, vit_tiny

STORED = ["RAS", "LPS", "SPL", "AIR", "PSR", "ILA"]


def _cut(source, path, share):
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


BAD = {
    "cut.nii.gz": lambda p: _cut(
        write_nifti(p.with_name("whole.nii.gz"), np.random.default_rng(0).random((9, 9, 9))), p, 0.6
    ),
    "text.nii.gz": lambda p: p.write_text("This is no image."),
    "zero_bytes.png": lambda p: p.write_bytes(b""),
    "cut.png": lambda p: _cut(write_png(p.with_name("whole.png"), np.eye(64, dtype=np.uint8)), p, 0.6),
    "cut.dcm": lambda p: _cut(write_dicom(p.with_name("whole.dcm"), "1.2.3"), p, 0.9),
    "nan.nii.gz": lambda p: write_nifti(p, np.where(np.eye(4)[None], np.nan, np.ones((4, 4, 4)))),
    "infinite.nii.gz": lambda p: write_nifti(p, np.full((4, 4, 4), np.inf)),
    "missing.png": lambda p: None,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_name_and_a_remedy(tmp_path, name):
    BAD[name](tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}.*(Repair|remove|Correct)"):
        read_image(tmp_path / name)


def test_the_pages_of_a_tiff_are_slices_that_stand_for_themselves(tmp_path):
    pages = np.arange(3 * 5 * 8, dtype=np.uint8).reshape(3, 5, 8)
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(tmp_path / "stack.tif", save_all=True, append_images=others)
    image = read_image(tmp_path / "stack.tif")
    assert image.shape == (1, 8, 5, 3)
    assert torch.equal(image.as_tensor()[0].permute(2, 1, 0), torch.from_numpy(pages))
    (item,) = find_images(tmp_path, "microscopy")
    assert (item["shape"], item["anisotropy"]) == ([8, 5, 3], 5)
    assert "spacing" not in item
    prepared = preset("microscopy", tmp_path / "stack.tif")
    assert spacing_of(prepared)[0] == pytest.approx(1e8)
    assert torch.equal(prepared.as_tensor()[0].mul(255).round().byte(), torch.from_numpy(pages))


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((9, 7), {}, (1, 7, 9)),
        ((9, 7, 3), {"photometric": "rgb"}, (3, 7, 9)),
        ((4, 9, 7), {"photometric": "minisblack"}, (1, 7, 9, 4)),
        ((4, 2, 9, 7), {"imagej": True, "metadata": {"axes": "ZCYX"}}, (2, 7, 9, 4)),
        ((4, 9, 7), {"compression": "lzw", "photometric": "minisblack"}, (1, 7, 9, 4)),
    ],
)
def test_every_voxel_of_a_sixteen_bit_tiff_is_at_its_place(tmp_path, shape, options, expected):
    values = np.random.default_rng(0).integers(0, 65535, shape, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    image = read_image(tmp_path / "a.tif")
    assert image.shape == expected
    stored = values if values.shape[-1] != 3 else np.moveaxis(values, -1, 0)
    axes = {4: "ZCYX", 3: "ZYX" if expected[0] == 1 else "CYX", 2: "YX"}[stored.ndim]
    order = [axes.index(axis) for axis in "CXYZ" if axis in axes]
    assert np.array_equal(image.numpy().squeeze(), stored.transpose(order).astype(np.float32).squeeze())


def test_a_stack_of_imagej_has_the_spacing_that_it_says(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((4, 9, 7), np.uint16), imagej=True, resolution=(2, 2),
        metadata={"axes": "ZYX", "spacing": 3, "unit": "um"},
    )  # fmt: skip
    (item,) = find_images(tmp_path, "microscopy")
    assert item["spacing"] == pytest.approx([0.0005, 0.0005, 0.003])
    assert item["anisotropy"] == 2
    assert spacing_of(preset("microscopy", tmp_path / "a.tif")) == pytest.approx([0.003, 0.0005, 0.0005])


def test_a_file_of_several_volumes_is_one_item_each_which_are_alike(tmp_path):
    values = np.random.default_rng(0).random((5, 6, 7, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "dwi.nii.gz")
    items = find_images(tmp_path, "mri")
    assert [item["image"] for item in items] == [f"{tmp_path}/dwi.nii.gz::{n}" for n in range(3)]
    assert [item["alike"] for item in items] == [3] * 3
    for number, item in enumerate(items):
        image = read_image(item["image"])
        assert np.array_equal(image[0].numpy(), values[..., number])
        assert image.meta["filename_or_obj"] == item["image"]
    with pytest.raises(InputError, match=r"dwi\.nii\.gz: has no volume '3'"):
        read_image(f"{tmp_path}/dwi.nii.gz::3")


@pytest.mark.parametrize(
    ("shape", "size", "channels", "degree"),
    [((4, 9, 7), [7, 9], 1, 5), ((4, 9, 7, 3), [7, 9], 3, 5), ((4, 5, 9, 7), [7, 9, 5], 1, 0)],
)
def test_an_archive_of_medmnist_is_one_item_per_image_with_label_and_split(tmp_path, shape, size, channels, degree):
    images = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    path = tmp_path / "bloodmnist.npz"
    np.savez_compressed(path, train_images=images, train_labels=np.arange(4)[:, None], test_images=images[:1])
    items = find_images(path)
    assert [item["label"] for item in items[:4]] == [0, 1, 2, 3]
    assert [item["split"] for item in items] == ["training"] * 4 + ["test"]
    assert items[2] == {
        "image": f"{path}::train_images::2", "modality": "microscopy", "shape": size, "channels": channels,
        "dtype": "uint8", "anisotropy": degree, "split": "training", "label": 2,
    }  # fmt: skip
    prepared = preset("microscopy", items[2]["image"])
    expected = images[2].transpose(2, 0, 1)[:, None] if channels == 3 else images[2].reshape(1, -1, 9, 7)
    assert np.array_equal(prepared.mul(255).round().numpy(), expected)


def test_an_archive_written_anew_is_read_anew(tmp_path):
    for value in (1, 2):
        np.savez(tmp_path / "bloodmnist.npz", train_images=np.full((2, 9, 7), value, np.uint8))
        assert (read_image(f"{tmp_path}/bloodmnist.npz::train_images::1") == value).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_images_of_an_archive_that_does_not_fit_into_memory_are_unpacked_one_by_one(tmp_path, monkeypatch, save, dtype):
    images = np.random.default_rng(0).integers(0, 255, (30, 9, 11, 3)).astype(dtype)
    save(tmp_path / "bloodmnist.npz", train_images=images)
    whole = [read_image(f"{tmp_path}/bloodmnist.npz::train_images::{n}") for n in range(30)]
    monkeypatch.setattr("biovfm_monai.data.medmnist._IN_MEMORY", images.nbytes // 2)
    medmnist._opened.cache_clear()
    for number in (0, 1, 7, 29, 3, 3, 4):
        image = read_image(f"{tmp_path}/bloodmnist.npz::train_images::{number}")
        assert torch.equal(image, whole[number])
    with pytest.raises(InputError, match="out of bounds"):
        read_image(f"{tmp_path}/bloodmnist.npz::train_images::30")
    assert isinstance(medmnist._opened(tmp_path / "bloodmnist.npz", "train_images", ()), medmnist._Unpacked)


def test_an_archive_that_needs_unpickling_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", train_images=np.array([{}, {}], dtype=object))
    with pytest.raises(InputError, match=r"bad\.npz: train_images of object"):
        find_images(tmp_path, "ct")
    with pytest.raises(InputError, match=r"bad\.npz: train_images of object"):
        read_image(tmp_path / "bad.npz::train_images::0")


def test_what_would_not_fit_into_memory_is_refused_by_its_header(tmp_path):
    write_nifti(tmp_path / "a.nii", np.zeros((4, 4, 4)))
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], np.int16).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    for call in (lambda path: find_images(path, "ct"), read_image):
        with pytest.raises(InputError, match=r"a\.nii: would take \d+ GiB of memory"):
            call(tmp_path / "a.nii")


def test_running_out_of_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr("monai.data.PILReader.get_data", exhausted)
    with pytest.raises(MemoryError):
        read_image(write_png(tmp_path / "a.png", np.zeros((8, 8), np.uint8)))


def test_rows_and_colours_of_a_photo_stay_where_they_are(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = preset("pathology", write_png(tmp_path / "a.png", colours))
    torch.testing.assert_close(image.as_tensor()[:, 0], torch.from_numpy(colours).movedim(2, 0) / 255)


def test_a_palette_photo_gives_its_colours(tmp_path):
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 51, 0, 102, 0])
    image.putdata([1, 0, 0, 0])
    image.save(tmp_path / "a.png")
    expected = torch.tensor([[[0, 255], [255, 255]], [[102, 0], [0, 0]], [[0, 51], [51, 51]]]) / 255
    torch.testing.assert_close(preset("pathology", tmp_path / "a.png").as_tensor()[:, 0], expected)


def test_a_16_bit_photo_is_scaled_between_its_percentiles(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (20, 30), dtype=np.uint16)
    low, high = np.percentile(values, (0.5, 99.5))
    image = preset("microscopy", write_png(tmp_path / "a.png", values))
    expected = np.clip((values.astype(float) - low) / (high - low), 0, 1)
    torch.testing.assert_close(image.as_tensor()[0, 0].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_a_photo_whose_transparency_hides_nothing_has_its_three_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (9, 8, 4), dtype=np.uint8)
    colours[..., 3] = 255
    image = read_image(write_png(tmp_path / "a.png", colours))
    assert torch.equal(image.as_tensor(), torch.from_numpy(colours[..., :3]).permute(2, 1, 0))


def test_a_photo_with_transparency_is_refused_by_its_number_of_channels(tmp_path):
    path = write_png(tmp_path / "rgba.png", np.zeros((9, 9, 4), dtype=np.uint8))
    message = cause_of(training_transform(3), {"image": str(path), "modality": "pathology"})
    assert "rgba.png: has 4 channels, the encoder takes 3" in message


# Presets


@pytest.mark.parametrize("stored", STORED)
def test_a_volume_comes_out_the_same_whatever_the_order_of_its_axes(tmp_path, stored):
    hounsfield = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.float32)
    image = preset("ct", write_nifti(tmp_path / "a.nii.gz", hounsfield, stored=stored))
    expected = (hounsfield.transpose(2, 1, 0)[:, ::-1, ::-1] + 1000) / 2000
    torch.testing.assert_close(image.as_tensor()[0], torch.from_numpy(expected.copy()))


ENDS = {"L": (0, 0), "R": (0, -1), "P": (1, 0), "A": (1, -1), "I": (2, 0), "S": (2, -1)}
"""For each direction of the body, axis and index of its end in an array stored right, anterior, superior."""


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("thick", "begins"), [(2, "IAR"), (1, "ASR"), (0, "RSA")], ids=["axial", "coronal", "sagittal"]
)
def test_slices_lie_along_the_thick_axis_and_are_seen_as_a_radiologist_does(tmp_path, stored, thick, begins):
    """`begins`: where the first slice, the first row and the first column lie."""
    shape, spacing = [6, 7, 8], [1.0, 1.0, 1.0]
    shape[thick], spacing[thick] = 4, 5.0
    volume = np.full(shape, -1000.0)
    for value, direction in enumerate(begins):
        axis, index = ENDS[direction]
        np.moveaxis(volume, axis, 0)[index] += 200 * 2**value
    image = preset("ct", write_nifti(tmp_path / "a.nii.gz", volume, spacing, stored)).mul(10).round()[0]
    assert image.shape[0] == 4
    assert [(image[0, 1, 1], image[1, 0, 1], image[1, 1, 0]), image[1, 1, 1]] == [(1, 2, 4), 0]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("thick", range(3))
def test_thick_slices_of_any_direction_set_the_degree_of_anisotropy_that_an_encoder_sees(tmp_path, stored, thick):
    shape, spacing = [32, 32, 32], [1.0, 1.0, 1.0]
    shape[thick], spacing[thick] = 8, 5.0
    image = preset("ct", write_nifti(tmp_path / "a.nii.gz", np.zeros(shape), spacing, stored))
    patches = vit_tiny(1, (32, 32, 32)).patchify(image[None])
    assert (patches.anisotropy, patches.grid_size) == (2, (2, 2, 2))
    assert patches.spacing == pytest.approx([5.0, 1.0, 1.0])


@pytest.mark.parametrize("axis", range(3))
def test_an_axis_of_size_one_is_the_slice_axis_even_where_another_is_thick(tmp_path, axis):
    shape, spacing = [5, 6, 7], [1.0, 1.0, 1.0]
    shape[axis], spacing[axis - 1] = 1, 9.0
    assert preset("ct", write_nifti(tmp_path / "a.nii.gz", np.zeros(shape), spacing)).shape[1] == 1


def test_the_ct_window_maps_hounsfield_units_exactly(tmp_path):
    units = np.array([-2000, -1000, -500, 0, 250, 1000, 3000.0]).reshape(7, 1, 1)
    image = preset("ct", write_nifti(tmp_path / "a.nii.gz", np.tile(units, (1, 2, 2))))
    assert image[0, 0, 0].flip(0).tolist() == [0, 0, 0.25, 0.5, 0.625, 1, 1]


def test_mri_is_scaled_by_percentiles_of_the_foreground_only(tmp_path):
    rng = np.random.default_rng(0)
    volume = (rng.gamma(4, 50, (12, 13, 14)) * (rng.random((12, 13, 14)) < 0.3)).astype(np.float32)
    low, high = np.percentile(volume[volume > 0], (0.5, 99.5))
    image = preset("mri", write_nifti(tmp_path / "a.nii.gz", volume))
    expected = np.clip((volume.transpose(2, 1, 0)[:, ::-1, ::-1] - low) / (high - low), 0, 1)
    torch.testing.assert_close(image.as_tensor()[0], torch.from_numpy(expected.astype(np.float32)))


def test_a_constant_mri_gives_finite_values(tmp_path):
    assert preset("mri", write_nifti(tmp_path / "a.nii.gz", np.full((4, 4, 4), 7.0))).isfinite().all()


@pytest.mark.parametrize("axis", range(3))
def test_resampling_keeps_every_value_at_its_place_in_the_world(tmp_path, axis):
    shape, spacing = (12, 14, 10), (1.0, 1.5, 3.0)
    coordinates = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    image = read_image(write_nifti(tmp_path / "a.nii.gz", coordinates[axis] + (-7, 11, 30)[axis], spacing))
    image = Resampled("image", (2.0, 2.0, 2.5))(SlicesFirstd("image")({"image": image}))["image"]
    assert image.pixdim.tolist() == pytest.approx([2.0, 2.0, 2.5])
    index = torch.stack(torch.meshgrid(*map(torch.arange, image.shape[1:]), indexing="ij")).double().flatten(1)
    world = (image.affine[:3, :3] @ index + image.affine[:3, 3:])[axis].view(image.shape[1:])
    inner = (slice(1, -1),) * 3
    torch.testing.assert_close(image.as_tensor()[0][inner].double(), world[inner], rtol=0, atol=1e-3)


def test_a_large_photo_shrinks_to_512_on_its_shorter_side(tmp_path):
    assert preset("fundus", write_png(tmp_path / "a.png", np.zeros((600, 900), np.uint8))).shape == (1, 1, 512, 768)


def test_every_sample_image_keeps_its_eight_bits_or_becomes_half_precision_within_unit_range(samples):
    transform = training_transform(3)
    wrong = {}
    for item in load_datalist(samples):
        image, eight_bit = transform(item)["image"], read_image(item["image"]).dtype == torch.uint8
        dtype, largest = (torch.uint8, 255) if eight_bit else (torch.float16, 1)
        within = 0 <= image.min() < image.max() <= largest
        if image.dtype != dtype or image.ndim != 4 or not within:
            wrong[item["image"]] = image.dtype, tuple(image.shape)
    assert wrong == {}


def test_the_encoders_input_is_normalised_and_of_its_size(samples):
    item = load_datalist(samples, "place_test")[0]
    image = encoder_transform(3, (32, 48), mean=0.5, std=0.5)(item)["image"]
    assert (image.shape, image.dtype, image.min().item()) == ((3, 1, 32, 48), torch.float32, -1)


def test_grey_is_repeated_for_an_encoder_of_colours():
    image = torch.rand(1, 1, 3, 4)
    assert torch.equal(MatchChannelsd("image", 3)({"image": image})["image"], image.expand(3, -1, -1, -1))


def test_colour_becomes_its_luminance_for_an_encoder_of_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).movedim(2, 0)[:, None] / 255
    grey = MatchChannelsd("image", 1)({"image": image})["image"][0, 0] * 255
    assert (grey - torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).copy())).abs().max() <= 1


@pytest.mark.parametrize(("given", "taken"), [(2, 1), (2, 3), (4, 3), (3, 2)])
def test_other_numbers_of_channels_are_refused(given, taken):
    with pytest.raises(InputError, match=f"a.png: has {given} channels, the encoder takes {taken}"):
        MatchChannelsd("image", taken)(
            {"image": MetaTensor(torch.ones(given, 1, 2, 2), meta={"filename_or_obj": "a.png"})}
        )


def test_an_unknown_modality_is_refused_with_the_list_of_known_ones():
    with pytest.raises(InputError, match=r"a\.png: modality 'smell' has no preset; there are ct, derm.*--modality"):
        ByModalityd("image")({"image": "a.png", "modality": "smell"})


@pytest.mark.parametrize(
    ("shape", "img_size", "filled"),
    [((2, 20, 40), (32, 32), (2, 16, 32)), ((2, 80, 40), (32, 32), (2, 32, 16)),
     ((4, 32, 16), (8, 16, 16), (2, 16, 8)), ((4, 4, 4), (8, 12, 16), (8, 8, 8))],
)  # fmt: skip
def test_fitting_keeps_proportions_and_pads_with_zeros_around(shape, img_size, filled):
    image = FitSized("image", img_size)({"image": torch.ones(1, *shape)})["image"]
    target = img_size if len(img_size) == 3 else (shape[0], *img_size)
    assert image.shape == (1, *target)
    middle = tuple(slice((t - f) // 2, (t - f) // 2 + f) for t, f in zip(target, filled, strict=True))
    assert image[0][middle].eq(1).all()
    assert image.sum() == np.prod(filled)


def test_fitting_thins_slices_evenly_and_keeps_both_ends():
    stack = torch.arange(32.0).view(1, 32, 1, 1).expand(-1, -1, 8, 8)
    image = FitSized("image", (8, 8), max_slices=4)({"image": stack})["image"]
    assert image[0, :, 0, 0].tolist() == [0, 10, 21, 31]


@pytest.mark.parametrize("spacing", [(1, 1), (0, 1, 1), (1, -1, 1)])
def test_a_spacing_to_resample_to_must_be_three_positive_numbers(spacing):
    with pytest.raises(InputError, match="three positive numbers"):
        ByModalityd("image", spacing)


def test_an_encoder_of_volumes_embeds_2d_images_and_thick_slices_for_what_they_are(tmp_path):
    encoder = spad_vit_tiny(in_channels=1, img_size=(64, 64, 64), patch_size=(16, 16, 16), depth=1).eval()
    save_encoder(encoder, tmp_path / "e.safetensors", preprocessing={"mean": 0.5, "std": 0.5})
    (tmp_path / "mri").mkdir()
    rng = np.random.default_rng(0)
    write_png(tmp_path / "mri/a.png", rng.integers(0, 255, (64, 64), dtype=np.uint8))
    write_nifti(tmp_path / "mri/b.nii.gz", rng.random((64, 64, 16)), spacing=(1, 1, 4.2))
    write_nifti(tmp_path / "mri/c.nii.gz", rng.random((64, 64, 64)))
    embed_files([tmp_path / "mri"], tmp_path / "e.safetensors", tmp_path / "out.npz")
    embeddings = np.load(tmp_path / "out.npz")["embeddings"]
    transform = transform_of(tmp_path / "e.safetensors")
    for item, embedding, degree, depth in zip(
        find_images(tmp_path / "mri"), embeddings, (5, 2, 0), (1, 16, 64), strict=True
    ):
        image = transform(item)["image"].as_tensor()
        assert image.shape == (1, depth, 64, 64)
        with torch.no_grad():
            expected = Embedder(encoder)(image[None], anisotropy=degree)[0].numpy()
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5)
