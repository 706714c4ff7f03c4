"""What each modality's preset makes of an image, and what the numbers of a DICOM file mean."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from image_files import preset, write_dicom, write_nifti, write_png
from monai.data import MetaTensor
from monai.transforms import LoadImage
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from skimage import data as photos
from skimage.feature import match_template

from biovfm_monai.checkpoints import save_encoder
from biovfm_monai.data import ByModalityd, modalities, read_image, sample_datalist
from biovfm_monai.data.dicom_values import uptake_factor
from biovfm_monai.data.modalities.base import CropToFieldd
from biovfm_monai.data.modalities.ct import WINDOWS
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import transform_of
from biovfm_monai.networks import vit_tiny


def brain():
    """The slice in the middle of a real T1 volume, rows x columns."""
    return np.asarray(LoadImage()(sample_datalist()[0]["image"])[:, :, 90], dtype=np.float32).T


@pytest.mark.parametrize("item", sample_datalist(), ids=lambda item: f"{item['modality']} of {item['source']}")
def test_a_real_image_comes_out_between_zero_and_one_with_its_spacing_and_always_the_same(item):
    image = read_image(item["image"])
    first, second = (getattr(modalities, item["modality"])("image")({"image": image})["image"] for _ in range(2))
    assert torch.equal(first, second)
    assert first.ndim == 4
    assert first.min() >= 0
    assert 0.5 < first.max() <= 1
    assert first.shape[0] == image.shape[0]
    if "spacing" in item and image.ndim == 4:
        assert first.pixdim[1:].tolist() == pytest.approx(item["spacing"][:2], rel=1e-4)


@pytest.mark.parametrize("name", modalities.__all__)
@pytest.mark.parametrize("array", [np.zeros((40, 50), np.uint8), np.full((40, 50), 200, np.uint8)])
def test_an_image_of_one_value_survives_every_preset(tmp_path, name, array):
    image = preset(name, write_png(tmp_path / "a.png", array))
    assert image.shape == (1, 1, 40, 50)
    torch.testing.assert_close(image.as_tensor(), torch.full((1, 1, 40, 50), array[0, 0] / 255))


@pytest.mark.parametrize("shear", [0.4, -0.4])
@pytest.mark.parametrize("spacing", [None, (3.0, 1.5, 1.5)])
def test_a_volume_on_a_slanting_grid_is_straightened_and_stays_where_it_was(tmp_path, shear, spacing):
    affine = np.array([[1.2, 0, 0, -20], [0, 1.4, shear * 4, 9], [0, 0, 4, 30], [0, 0, 0, 1]])
    size = (44, 40, 12)
    middle = (affine @ [*((n - 1) / 2 for n in size), 1])[:3]

    def ball(image, places):
        grid = np.stack(np.meshgrid(*map(np.arange, image), indexing="ij"), axis=-1)
        return np.linalg.norm(grid @ places[:3, :3].T + places[:3, 3] - middle, axis=-1) < 15

    nib.save(nib.Nifti1Image(2000 * ball(size, affine).astype(np.float32) - 1000, affine), tmp_path / "a.nii")
    image = preset("ct", tmp_path / "a.nii", spacing=spacing)
    axes = np.asarray(image.affine)[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(np.square(spacing or (4, 1.4, 1.2))), atol=1e-4)
    found, expected = image[0].numpy() > 0.5, ball(image.shape[1:], np.asarray(image.affine))
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.93


@pytest.mark.parametrize("name", modalities.__all__)
def test_other_entries_of_a_sample_do_not_disturb_resampling(tmp_path, name):
    path = write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).random((6, 7, 8)), spacing=(2, 2, 2))
    sample = {"image": read_image(path), "image_id": 3, "image_meta_dict": "mine"}
    result = getattr(modalities, name)("image", spacing=(4.0, 1.0, 1.0))(sample)
    assert (result["image_id"], result["image_meta_dict"]) == (3, "mine")
    torch.testing.assert_close(result["image"].pixdim, torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))


def test_a_spacing_for_volumes_leaves_large_photos_at_their_size_limit(tmp_path):
    path = write_png(tmp_path / "a.png", np.full((600, 900), 200, np.uint8))
    assert preset("fundus", path, spacing=(1, 1, 1)).shape == (1, 1, 512, 768)


def test_a_spacing_finer_than_the_size_limit_is_kept(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).random((6, 7, 8)), spacing=(100, 100, 100))
    assert preset("ct", path, spacing=(100.0, 1.0, 1.0)).shape == (1, 8, 601, 501)


def test_options_of_presets_reach_the_images_of_their_modality_only(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", np.linspace(-1350, 150, 125).reshape(5, 5, 5))
    lung = ByModalityd("image", options={"ct": {"window": "lung"}})
    expected = modalities.ct("image", window="lung")({"image": read_image(path)})["image"]
    assert torch.equal(lung({"image": read_image(path), "modality": "ct"})["image"], expected)
    plain = modalities.mri("image")({"image": read_image(path)})["image"]
    assert torch.equal(lung({"image": read_image(path), "modality": "mri"})["image"], plain)


def test_an_encoder_file_keeps_the_options_of_its_presets(tmp_path):
    item = {"image": str(write_nifti(tmp_path / "a.nii.gz", np.full((9, 9, 9), -600.0))), "modality": "ct"}
    preprocessing = {"mean": 0.0, "std": 1.0, "presets": {"ct": {"window": [-700, -500]}}}
    encoder = vit_tiny(in_channels=1, img_size=(9, 9), patch_size=9, depth=1)
    save_encoder(encoder, tmp_path / "encoder.safetensors", preprocessing)
    image = transform_of(tmp_path / "encoder.safetensors")(item)["image"]
    torch.testing.assert_close(image.as_tensor(), torch.full((1, 9, 9, 9), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("lung", "presets 'lung' must be options by modality"),
        ({"ctt": {}}, "presets: there is none for 'ctt', but ct, dermoscopy"),
        ({"ct": {"windows": "lung"}}, "presets: ct has no option 'windows'. There are window"),
        ({"ct": "lung"}, "presets: ct has no option 'lung'. There are window"),
        ({"xray": {"window": 1}}, "presets: xray has no option 'window'. There are none"),
        ({"ct": {"window": "liver"}}, "window 'liver' must be one of wide"),
    ],
)
def test_options_that_a_preset_does_not_have_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ByModalityd("image", options=options)


# CT, MRI


@pytest.mark.parametrize("window", [*WINDOWS, (-20, 120)])
def test_a_window_shows_its_two_ends_and_nothing_beyond(tmp_path, window):
    low, high = WINDOWS.get(window, window) if isinstance(window, str) else window
    units = np.array([low - 500, low, (low + high) / 2, high, high + 500], dtype=np.float32)
    image = preset("ct", write_nifti(tmp_path / "a.nii.gz", np.tile(units, (4, 4, 1))), window=window)
    assert image[0, :, 0, 0].tolist() == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("window", ["liver", (5, 5), (1, 2, 3), ()])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(InputError, match=r"window .* must be one of wide, soft tissue, .* lower one first"):
        modalities.ct("image", window=window)


def test_n4_takes_a_bias_field_off_a_real_brain(tmp_path):
    image = brain()
    rows, columns = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    field = np.exp(0.8 * columns - 0.4 * rows)
    inside = image > 0.2 * image.max()

    def unevenness(**options):
        path = write_nifti(tmp_path / "a.nii.gz", (image * field).T[:, :, None], stored="LPS")
        values = preset("mri", path, **options).as_tensor()[0, 0].numpy()
        values = values if values.shape == image.shape else values.T
        side = columns > 0
        return abs(np.log(values[inside & side].mean() / values[inside & ~side].mean()))

    assert unevenness(bias_field=True) < 0.3 * unevenness()


def test_z_scores_are_of_the_foreground(tmp_path):
    volume = np.zeros((8, 8, 8))
    volume[2:6, 2:6, 2:6] = np.random.default_rng(0).normal(500, 100, (4, 4, 4))
    image = preset("mri", write_nifti(tmp_path / "a.nii.gz", volume), z_score=True).as_tensor()
    foreground = image[image != 0]
    assert foreground.mean().item() == pytest.approx(0, abs=1e-3)
    assert foreground.std().item() == pytest.approx(1, abs=0.02)
    assert (image == 0).sum() >= 448


# Radiographs


def radiograph(path, values, **tags):
    tags = {"Modality": "DX", "RescaleSlope": 1, "RescaleIntercept": 0, "PixelRepresentation": 0} | tags
    pixels = np.asarray(values, dtype=np.uint16)
    tags |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "PixelData": pixels.tobytes()}
    return write_dicom(path, "1.2.3", **tags)


RAMP = np.arange(48).reshape(6, 8) * 80


@pytest.mark.parametrize("tags", [{}, {"RescaleSlope": 2, "RescaleIntercept": -1000}, {"RescaleSlope": 0.5}])
@pytest.mark.parametrize("signed", [0, 1])
def test_an_inverted_polarity_changes_no_measurement(tmp_path, tags, signed):
    path = radiograph(tmp_path / "a.dcm", RAMP, **tags, Modality="CT", PixelRepresentation=signed)
    expected = read_image(path)
    dark = radiograph(
        tmp_path / "b.dcm", RAMP, **tags, Modality="CT", PixelRepresentation=signed,
        PhotometricInterpretation="MONOCHROME1",
    )  # fmt: skip
    assert torch.equal(read_image(dark).as_tensor(), expected.as_tensor())


@pytest.mark.parametrize("modality", ["CR", "DX", "MG"])
def test_the_polarity_of_a_radiograph_does_not_show(tmp_path, modality):
    name = "mammography" if modality == "MG" else "xray"
    bright = radiograph(tmp_path / "a.dcm", RAMP, Modality=modality)
    dark = radiograph(tmp_path / "b.dcm", RAMP.max() - RAMP, Modality=modality, PhotometricInterpretation="MONOCHROME1")
    assert preset(name, bright)[0, 0, -1, -1] == 1
    torch.testing.assert_close(preset(name, dark).as_tensor(), preset(name, bright).as_tensor())


def test_a_radiograph_is_shown_in_the_window_of_its_file(tmp_path):
    plain = read_image(radiograph(tmp_path / "a.dcm", RAMP)).flatten()
    shown = read_image(radiograph(tmp_path / "b.dcm", RAMP, WindowCenter=1000.5, WindowWidth=1001)).flatten()
    order = plain.argsort()
    assert (shown[order].diff() >= 0).all()
    assert (shown[plain <= 500] == shown.min()).all()
    assert (shown[plain >= 1500] == shown.max()).all()
    inside = (plain > 500) & (plain < 1500)
    slopes = shown[order][inside[order]].diff() / plain[order][inside[order]].diff()
    assert slopes.std() < 1e-4 * slopes.mean()


def test_a_radiograph_is_shown_by_the_table_of_its_file(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], np.array([1000, 10, 30, 20], np.uint16).tobytes()
    path = radiograph(tmp_path / "a.dcm", np.arange(48).reshape(6, 8) % 4, VOILUTSequence=Sequence([table]))
    assert read_image(path)[0, :4, 0].flatten().tolist() == [1000, 10, 30, 20]


def test_padding_of_a_radiograph_is_black_in_both_polarities(tmp_path):
    values = RAMP.copy() + 10
    values[:, :2] = 4095
    for polarity in ("MONOCHROME1", "MONOCHROME2"):
        path = radiograph(tmp_path / "a.dcm", values, PhotometricInterpretation=polarity, PixelPaddingValue=4095)
        image = read_image(path)[0, :, :].squeeze()
        assert (image[:2] == image.min()).all()
        assert image[2:].max() > image.min()


def test_a_window_without_width_is_left_out_with_a_warning(tmp_path, caplog):
    image = read_image(radiograph(tmp_path / "a.dcm", RAMP, WindowCenter=1000, WindowWidth=0))
    assert "window of a radiograph means nothing" in caplog.text
    assert image.max() == RAMP.max()


def test_the_window_of_a_ct_changes_no_hounsfield_unit(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", "1.2.3", value=600, WindowCenter=40, WindowWidth=80)
    assert (read_image(path) == 200).all()


# PET


def pet_header(**changes):
    injected = Dataset()
    injected.RadionuclideTotalDose, injected.RadionuclideHalfLife = 370e6, 6586.2
    injected.RadiopharmaceuticalStartTime = "100000"
    header = Dataset()
    header.Modality, header.Units, header.DecayCorrection, header.PatientWeight = "PT", "BQML", "START", 70
    header.SeriesDate, header.SeriesTime = "20260301", "110000.00"
    header.RadiopharmaceuticalInformationSequence = Sequence([injected])
    for name, value in changes.items():
        setattr(injected if name.startswith("Radio") else header, name, value)
    return header


HOUR = 70_000 / (370e6 * 2 ** (-3600 / 6586.2))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, HOUR),
        ({"RadiopharmaceuticalStartDateTime": "20260301100000.0+0100"}, HOUR),
        ({"SeriesTime": "003000", "RadiopharmaceuticalStartTime": "233000"}, HOUR),
        ({"DecayCorrection": "ADMIN"}, 70_000 / 370e6),
        ({"Units": "GML"}, 1.0),
        ({"PatientWeight": None}, None),
        ({"RadionuclideTotalDose": 0}, None),
        ({"RadionuclideHalfLife": None}, None),
        ({"DecayCorrection": "NONE"}, None),
        ({"Units": "CNTS"}, None),
        ({"SeriesTime": ""}, None),
        ({"RadiopharmaceuticalStartDateTime": "20260303100000"}, None),
        ({"RadiopharmaceuticalStartDateTime": "19000101000000"}, None),
    ],
)
def test_uptake_is_activity_over_dose_and_weight_where_the_header_tells_them(changes, factor):
    assert uptake_factor(pet_header(**changes)) == (None if factor is None else pytest.approx(factor))


def test_a_pet_slice_is_scaled_by_its_uptake(tmp_path):
    tags = {element.keyword: element.value for element in pet_header()}
    path = write_dicom(tmp_path / "a.dcm", "1.2.3", value=30000, RescaleIntercept=0, RescaleSlope=2, **tags)
    image = read_image(path)
    assert image.meta["units"] == "SUV"
    assert image.mean().item() == pytest.approx(60000 * HOUR, rel=1e-5)
    assert preset("pet", path).mean().item() == pytest.approx(60000 * HOUR / 20, rel=1e-5)


def test_counts_without_uptake_are_scaled_by_their_percentiles(tmp_path):
    counts = np.random.default_rng(0).integers(0, 9000, (9, 10, 11)).astype(np.float32)
    image = preset("pet", write_nifti(tmp_path / "a.nii.gz", counts))
    assert (image.min(), image.max()) == (0, 1)
    high = np.percentile(counts[counts > 0], 99.9)
    assert (image == 1).sum() == (counts >= high).sum()


# Fields of view


@pytest.mark.parametrize("name", ["fundus", "endoscopy"])
def test_black_around_a_round_field_is_cropped_away(tmp_path, name):
    retina = np.asarray(Image.fromarray(photos.retina()).resize((400, 400)))
    framed = np.zeros((500, 700, 3), np.uint8)
    framed[60:460, 200:600] = retina
    framed[470:478, 20:90] = 255  # a line of text
    image = preset(name, write_png(tmp_path / "a.png", framed)).as_tensor()
    assert image.shape == pytest.approx((3, 1, 400, 400), abs=8)
    shown = image[:, 0].movedim(0, -1).mul(255).round().byte().numpy()
    corner = match_template(framed, shown).squeeze()
    assert corner.max() > 0.999
    assert np.unravel_index(corner.argmax(), corner.shape) == pytest.approx((60, 200), abs=4)


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "examples_jpeg2k.dcm"])
def test_the_text_around_a_real_scan_is_gone_and_the_scan_is_not(name):
    source = read_image(get_testdata_file(name))
    image = preset("ultrasound", get_testdata_file(name)).as_tensor()[:, 0]
    height, width = source.shape[2], source.shape[1]
    # Name of the hospital above, date and scale below: the scan is the band between them.
    assert 0.4 * height < image.shape[1] < 0.55 * height
    assert image.shape[2] > 0.9 * width
    doppler = (image.amax(0) - image.amin(0)) > 0.3
    assert doppler.float().mean() > 0.05


def test_all_frames_of_a_scan_are_cropped_alike():
    image = preset("ultrasound", get_testdata_file("examples_ybr_color.dcm"))
    assert image.shape[:2] == (3, 30)
    assert image.shape[2] < 0.9 * 240
    assert image.shape[3] < 0.7 * 320


@pytest.mark.parametrize("value", [0, 3, 200])
@pytest.mark.parametrize("size", [(600, 900), (512, 512), (7, 300), (1, 1)])
@pytest.mark.parametrize("name", ["fundus", "ultrasound"])
def test_an_image_that_is_all_field_or_has_none_stays_whole(name, size, value):
    image = MetaTensor(torch.full((1, *size), value, dtype=torch.uint8))
    result = getattr(modalities, name)("image")({"image": image})["image"]
    ratio = min(1, 512 / min(size))
    assert result.shape == (1, 1, round(size[1] * ratio), round(size[0] * ratio))
    torch.testing.assert_close(result.as_tensor(), torch.full(result.shape, value / 255))


def test_lines_alone_are_no_field():
    image = torch.zeros(1, 400, 400)
    image[:, ::40] = 1
    image[:, 100:110, 100:110] = 1
    assert modalities.fundus("image")({"image": MetaTensor(image)})["image"].shape == (1, 1, 400, 400)


def test_what_lies_beside_a_masked_field_is_black():
    image = torch.zeros(1, 1, 100, 100)
    image[..., 20:80, 20:80] = torch.rand(60, 60).clamp(0.1).tril().clamp(0)
    image[..., 22, 70:80] = 0.9  # text in the corner
    field = CropToFieldd("image", 0.03, mask=True)({"image": MetaTensor(image)})["image"]
    assert field.shape[2] <= 60
    assert field[0, 0, :5, -10:].sum() == 0
    assert field[0, 0, -10, 10] > 0


# Microscopy and pathology


def test_each_of_five_channels_has_its_own_brightness():
    image = torch.rand(5, 30, 40) * torch.tensor([1.0, 10, 100, 1000, 10000]).view(5, 1, 1)
    result = modalities.microscopy("image")({"image": MetaTensor(image)})["image"]
    assert result.shape == (5, 1, 40, 30)
    assert result.amax((1, 2, 3)).tolist() == [1] * 5
    assert (result.mean((1, 2, 3)) > 0.4).all()


def test_stains_of_one_tissue_come_closer(tmp_path):
    tissue = photos.immunohistochemistry()
    faded = (255 * (tissue / 255) ** np.array([0.6, 0.7, 0.9])).astype(np.uint8)
    paths = [write_png(tmp_path / f"{n}.png", array) for n, array in enumerate((tissue, faded))]

    def distance(**options):
        a, b = (preset("pathology", path, **options).as_tensor() for path in paths)
        return (a - b).abs().mean()

    assert distance(even_stains=True) < 0.35 * distance()


def test_glass_without_tissue_stays_as_it_is(tmp_path):
    path = write_png(tmp_path / "a.png", np.full((20, 30, 3), 250, np.uint8))
    assert torch.equal(preset("pathology", path, even_stains=True), preset("pathology", path))


def test_a_preset_leaves_nothing_of_the_patient_in_the_sample(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", "1.2.3", Modality="DX", PatientName="Secret^Name", PatientWeight=70)
    image = preset("xray", path)
    assert "ecret" not in str(image.meta)
    assert pydicom.dcmread(path).PatientName == "Secret^Name"
