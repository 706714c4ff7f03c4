"""Datalists and the sample images."""

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from image_files import preset, write_dicom, write_nifti, write_png
from PIL import Image
from pydicom.data import get_testdata_file

from biovfm_monai.anisotropy import spacing_of
from biovfm_monai.data import (
    ReadImaged,
    find_images,
    load_datalist,
    read_image,
    training_transform,
    write_samples,
)
from biovfm_monai.data import samples as sample_images
from biovfm_monai.data.find import survey
from biovfm_monai.errors import InputError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON .*Correct"),
        ('{"validation": [], "test": []}', "no list 'training', but validation, test"),
        ("[]", "has no sections"),
        ('{"training": []}', "no image found for 'training'"),
        ('{"training": [{"image": "a.png", "modality": "ct"}, {"label": 1}]}', "item 1 of 'training' has no \"image\""),
        ('{"training": [{"image": "a.png"}]}', "a.png: cannot tell the modality.*--modality"),
    ],
)
def test_a_wrong_datalist_is_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(InputError, match=f"{tmp_path}.*{message}"):
        load_datalist(tmp_path)


@pytest.mark.parametrize(("name", "message"), [("missing", "no such folder.*--dataset_dir"), (".", "no image found")])
def test_a_missing_and_an_empty_folder_are_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        load_datalist(tmp_path / name)


def test_paths_of_a_datalist_are_relative_to_its_folder_and_other_entries_stay(tmp_path):
    (tmp_path / "datalist.json").write_text('{"test": [{"image": "x/a.png", "modality": "oct", "label": 3}]}')
    expected = [{"image": str(tmp_path / "x/a.png"), "modality": "oct", "label": 3}]
    assert load_datalist(tmp_path, "test") == expected


def test_the_modality_is_the_nearest_folders(tmp_path):
    folder = tmp_path / "ct/Microscopy/plate 1"
    folder.mkdir(parents=True)
    write_png(folder / "a.png", np.eye(4, dtype=np.uint8))
    assert [item["modality"] for item in load_datalist(tmp_path)] == ["microscopy"]


def test_a_modality_is_given_to_images_that_tell_none_and_leaves_out_those_of_another(tmp_path, caplog):
    for name in ("ct/a.png", "mri/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(tmp_path / name, np.eye(4, dtype=np.uint8))
    with caplog.at_level("INFO"):
        items = load_datalist(tmp_path, modality="ct")
    assert [(Path(item["image"]).name, item["modality"]) for item in items] == [("c.png", "ct"), ("a.png", "ct")]
    assert "1 of 3 images are of another modality than ct" in caplog.text
    with pytest.raises(InputError, match=r"b\.png: not of modality 'oct' but mri"):
        load_datalist(tmp_path / "mri", modality="oct")


def test_several_modalities_are_had_at_once_and_each_must_be_there_and_told(tmp_path, caplog):
    for name in ("ct/a.png", "mri/b.png", "oct/c.png"):
        (tmp_path / name).parent.mkdir()
        write_png(tmp_path / name, np.eye(4, dtype=np.uint8))
    with caplog.at_level("INFO"):
        items = load_datalist(tmp_path, modality=["ct", "oct"])
    assert {item["modality"] for item in items} == {"ct", "oct"}
    assert "1 of 3 images are of another modality than ct or oct" in caplog.text
    with pytest.raises(InputError, match=r"not of modality 'pet', 'xray' but ct, mri, oct, as all\. Give another"):
        load_datalist(tmp_path, modality=["ct", "pet", "xray"])
    write_png(tmp_path / "d.png", np.eye(4, dtype=np.uint8))
    with pytest.raises(InputError, match=r"d\.png: cannot tell the modality"):
        load_datalist(tmp_path, modality=["ct", "oct"])
    assert len(load_datalist(tmp_path, modality=["ct"])) == len(load_datalist(tmp_path, modality="ct")) == 2


def test_the_dataset_folders_own_name_tells_the_modality_but_none_above_it(tmp_path):
    for dataset_dir in ("x/ct", "ct/x"):
        (tmp_path / dataset_dir / "y").mkdir(parents=True)
        write_png(tmp_path / dataset_dir / "y/a.png", np.eye(4, dtype=np.uint8))
    assert [item["modality"] for item in find_images(tmp_path / "x/ct")] == ["ct"]
    with pytest.raises(InputError, match=r"a\.png: cannot tell the modality.*--modality"):
        find_images(tmp_path / "ct/x")


def test_hidden_files_and_folders_and_files_that_are_no_image_are_left_out(tmp_path):
    for name in ("a.png", "._a.png", ".cache/b.png", "notes.txt", "x/c.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(tmp_path / name, np.eye(4, dtype=np.uint8), format="png")
    found = [item["image"] for item in find_images(tmp_path, "ct")]
    assert found == [str(tmp_path / "a.png"), str(tmp_path / "x/c.PNG")]


@pytest.fixture
def series(tmp_path):
    """Three slices, whose names are not in the order of their places."""
    for number, name in enumerate("acb"):
        write_dicom(tmp_path / f"series/{name}.dcm", "1.2.3", number, value=100 * number)
    return tmp_path / "series"


def test_a_folder_of_dicom_slices_is_one_item_with_the_distance_of_its_slices(series):
    (item,) = load_datalist(series.parent)
    assert (item["image"], item["modality"], item["spacing"]) == (str(series), "ct", [1, 1, 3])


def test_dicom_slices_are_stacked_by_place_in_hounsfield_units(series):
    assert preset("ct", series)[0, :, 0, 0].mul(2000).sub(1000).tolist() == [-1000, -800, -600]


def test_dicom_files_are_known_by_their_content_whatever_their_name(series):
    for path in series.iterdir():
        path.rename(path.with_name(f"1.2.840.{path.stem}"))
    (series / "DICOMDIR.txt").write_text("no image")
    (item,) = find_images(series)
    assert read_image(item["image"]).shape == (1, 8, 6, 3)


def test_dicom_series_that_share_a_folder_are_a_volume_each(series):
    for number, name in enumerate("fed"):
        write_dicom(series / f"{name}.dcm", "1.2.4", number, value=10 * number + 5)
    write_dicom(series / "single.dcm", "1.2.5", value=7)
    items = find_images(series)
    assert len(items) == 3
    volume = next(item for item in items if item["image"][0].endswith("f.dcm"))
    assert [Path(path).name for path in volume["image"]] == ["f.dcm", "e.dcm", "d.dcm"]
    assert volume["spacing"] == [1, 1, 3]
    for files in (volume["image"], volume["image"][::-1]):
        assert read_image(files)[0, 0, 0].tolist() == [-990, -970, -950]
    assert str(series / "single.dcm") in [item["image"] for item in items]


@pytest.mark.parametrize("name", ["rtplan.dcm", "test-SR.dcm", "waveform_ecg.dcm", "liver_1frame.dcm", "rtdose.dcm"])
def test_what_stands_beside_the_slices_and_is_no_image_is_left_out(series, name, caplog):
    expected = read_image(series)
    shutil.copy(get_testdata_file(name), series / name)
    with caplog.at_level("INFO"):
        (item,) = find_images(series)
    assert "left out 1 file(s) that are no images" in caplog.text
    assert item["image"] == str(series)
    assert torch.equal(read_image(series).as_tensor(), expected.as_tensor())


def test_a_datalist_names_the_slices_of_a_volume(series):
    names = sorted(f"series/{path.name}" for path in series.iterdir())
    (series.parent / "datalist.json").write_text(json.dumps({"training": [{"image": names, "modality": "ct"}]}))
    (item,) = load_datalist(series.parent)
    image = ReadImaged("image")(item)["image"]
    assert torch.equal(image.as_tensor(), read_image(series).as_tensor())
    (series.parent / names[1]).unlink()
    with pytest.raises(InputError, match=rf"{names[1]}: no such file"):
        ReadImaged("image")(item)


def test_all_slices_of_a_series_are_read_even_where_their_headers_differ(tmp_path):
    for number in range(6):
        write_dicom(
            tmp_path / f"{number}.dcm",
            "1.2.3",
            number,
            SliceThickness=3 if number < 4 else 5,
            SeriesDate=f"2020010{number}",
        )
    assert read_image(tmp_path).shape == (1, 8, 6, 6)


@pytest.mark.parametrize(
    ("places", "directions", "message"),
    [
        (
            [[0, 0, z] for z in (0, 3, 9, 12)],
            [[1, 0, 0, 0, 1, 0]] * 4,
            r"1\.dcm and 2\.dcm are 6\.000 mm apart.*Add the",
        ),
        (
            [[0, y, z] for y, z in ((0, 0), (1, 3), (3, 6))],
            [[1, 0, 0, 0, 1, 0]] * 3,
            r"shifted by 1\.000 to 2\.000 mm.*Split the series",
        ),
        ([[0, 4 * n, 3 * n] for n in range(3)], [[1, 0, 0, 0, 1, 0]] * 3, r"3\.000 mm apart are shifted by 4\.000 mm"),
        (
            [[0, 0, 0], [0, 0, 3]],
            [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]],
            r"0\.dcm and 1\.dcm .* different directions",
        ),
        ([[0, 0, 3]] * 3, [[1, 0, 0, 0, 1, 0]] * 3, "share a place"),
    ],
)
def test_slices_that_make_no_regular_volume_are_refused(tmp_path, places, directions, message):
    for number, (place, direction) in enumerate(zip(places, directions, strict=True)):
        write_dicom(tmp_path / f"{number}.dcm", "1.2.3", ImagePositionPatient=place, ImageOrientationPatient=direction)
    with pytest.raises(InputError, match=message):
        read_image(tmp_path)


@pytest.mark.parametrize("rows", [[0, 0.9483237, -0.3173047], [0, 0.9483237, 0.3173047]])
def test_a_series_of_a_tilted_gantry_is_read_on_the_slanting_grid_of_its_places(tmp_path, rows):
    for number in range(4):
        write_dicom(
            tmp_path / f"{number}.dcm", "1.2.3", value=number, ImagePositionPatient=[5, 7, 4 * number],
            ImageOrientationPatient=[1, 0, 0, *rows],
        )  # fmt: skip
    image = read_image(tmp_path)
    # In right, anterior, superior; the table moves along the body, not across the slices.
    expected = np.array([[-1, 0, 0, -5], [0, -rows[1], 0, -7], [0, rows[2], 4, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(image.affine, expected, atol=1e-6)
    assert image[0, 0, 0].tolist() == [-1000, -998, -996, -994]
    (item,) = find_images(tmp_path)
    assert item["spacing"] == pytest.approx([1, 1, 4], rel=1e-6)


@pytest.mark.parametrize("places", [(0, 3, 9, 12), (0, 3, 3, 6)])
def test_a_series_that_makes_no_regular_volume_is_set_aside_by_name(tmp_path, places):
    for number, place in enumerate(places):
        write_dicom(tmp_path / f"{number}.dcm", "1.2.3", ImagePositionPatient=[0, 0, place])
    (found,) = survey(tmp_path)
    assert found.items == []
    (one,) = found.rejected
    assert one.file == str(tmp_path)
    with pytest.raises(InputError) as caught:
        find_images(tmp_path)
    assert str(caught.value) == one.reason


def test_directions_of_a_series_are_volumes_of_their_own(tmp_path):
    for number in range(6):
        turned = [1, 0, 0, 0, 0, -1] if number % 2 else [1, 0, 0, 0, 1, 0]
        place = [0, float(number), 0] if number % 2 else [0, 0, float(number)]
        write_dicom(tmp_path / f"{number}.dcm", "1.2.3", ImagePositionPatient=place, ImageOrientationPatient=turned)
    items = find_images(tmp_path)
    assert [[Path(path).stem for path in item["image"]] for item in items] == [["0", "2", "4"], ["1", "3", "5"]]


def test_time_points_of_a_series_are_volumes_of_their_own_which_are_alike(tmp_path):
    for number in range(6):
        place = [0, 0, 3.0 * (number % 3)]
        write_dicom(
            tmp_path / f"{number}.dcm", "1.2.3", value=number, ImagePositionPatient=place, InstanceNumber=number
        )
    items = find_images(tmp_path)
    assert [[Path(path).stem for path in item["image"]] for item in items] == [["0", "1", "2"], ["3", "4", "5"]]
    assert [item["alike"] for item in items] == [2] * 2
    assert items[1]["shape"] == [8, 6, 3]


def test_the_frames_of_a_film_stand_for_themselves(tmp_path):
    frames = np.arange(4 * 48, dtype=np.int16)
    write_dicom(tmp_path / "a.dcm", "1.2.3", Modality="US", NumberOfFrames=4, PixelData=frames.tobytes())
    (item,) = find_images(tmp_path)
    assert (item["shape"], item["anisotropy"], "spacing" in item) == ([8, 6, 4], 5, False)
    prepared = preset("ultrasound", tmp_path / "a.dcm")
    assert prepared.shape == (1, 4, 6, 8)
    assert spacing_of(prepared)[0] == pytest.approx(1e8)


def test_files_of_a_series_without_places_are_an_image_each(tmp_path):
    for number in range(3):
        write_dicom(tmp_path / f"us/{number}.dcm", "1.2.3", Modality="US", ImagePositionPatient=None)
    assert [item["modality"] for item in find_images(tmp_path)] == ["ultrasound"] * 3
    with pytest.raises(InputError, match="not the slices of one volume"):
        read_image(tmp_path / "us")


def test_linked_folders_are_looked_through_whole_and_once(tmp_path):
    (tmp_path / "far/deep").mkdir(parents=True)
    write_png(tmp_path / "far/deep/a.png", np.eye(4, dtype=np.uint8))
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds/ct").symlink_to(tmp_path / "far")
    (tmp_path / "far/loop").symlink_to(tmp_path / "far")
    assert [item["image"] for item in find_images(tmp_path / "ds")] == [str(tmp_path / "ds/ct/deep/a.png")]


def test_dicom_files_of_a_series_each_are_an_item_each(tmp_path):
    files = [str(write_dicom(tmp_path / f"{i}.dcm", f"1.2.{i}")) for i in range(3)]
    assert [item["image"] for item in find_images(tmp_path)] == files


def test_the_patients_identifier_appears_neither_in_an_item_nor_with_the_image(series):
    for path in (series, series / "a.dcm"):
        (item,) = find_images(path)
        assert "4711" not in f"{item} {read_image(path).meta} {training_transform(1)(item)}"


def test_slices_of_one_patient_share_a_subject_and_those_of_nobody_have_none(tmp_path):
    for number, patient in enumerate(["x", "x", "y", ""]):
        write_dicom(tmp_path / f"{number}.dcm", f"1.2.{number}", PatientID=patient)
    a, b, c, d = find_images(tmp_path)
    assert a["subject"] == b["subject"] != c["subject"]
    assert "subject" not in d


def test_a_dicom_file_of_a_modality_without_name_takes_its_folders(tmp_path):
    write_dicom(tmp_path / "mri/a.dcm", "1.2.3", Modality="OT")
    assert load_datalist(tmp_path)[0]["modality"] == "mri"


# Samples


def slab_slices(folder, origin):
    """Numbers of the brain's slices that are in the slabs, from the slabs' own geometry."""
    slabs = [nib.load(path) for path in sorted((folder / "mri").glob("mni152_slices*.nii.gz"))]
    return [range(z := round(slab.affine[2, 3] - origin), z + slab.shape[2]) for slab in slabs]


def test_writing_the_samples_again_changes_nothing(samples):
    before = {path: path.stat().st_mtime_ns for path in samples.rglob("*")}
    assert write_samples(samples) == str(samples)
    assert {path: path.stat().st_mtime_ns for path in samples.rglob("*")} == before


def test_the_samples_have_two_training_sections_and_two_labelled_ones_of_files_that_exist(samples):
    sections = json.loads((samples / "datalist.json").read_text())
    assert set(sections) == {"training", "mixed", "place_training", "place_test"}
    items = [item for section in sections.values() for item in section]
    assert [item["image"] for item in items if not (samples / item["image"].split("::")[0]).is_file()] == []


@pytest.mark.parametrize(("section", "count"), [("place_training", 200), ("place_test", 80)])
def test_the_classes_of_the_probe_are_balanced(samples, section, count):
    labels = Counter(item["label"] for item in load_datalist(samples, section))
    assert labels == dict.fromkeys(sample_images.PLACES, count)


def test_the_slabs_leave_room_for_held_out_slices(samples):
    slabs = slab_slices(samples, 0)
    assert min(b[0] - a[-1] - 1 for a, b in pairwise(slabs)) > 2 * sample_images._GAP


def test_the_thick_slices_of_the_samples_are_slices_of_the_slabs(samples):
    shown = {z for slab in slab_slices(samples, 0) for z in slab}
    thick = [nib.load(path) for path in sorted((samples / "mri").glob("mni152_thick*.nii.gz"))]
    numbers = [round(v.affine[2, 3] + z * v.affine[2, 2]) for v in thick for z in range(v.shape[2])]
    assert len(numbers) == 40
    assert set(numbers) <= shown
    assert {round(float(v.header.get_zooms()[2])) for v in thick} == {15}


def test_no_test_crop_comes_from_a_slice_within_two_of_a_training_slab(tmp_path, monkeypatch):
    volume = np.zeros((20, 21, 50))
    volume[2:-2, 2:-2, 2:-2] = 1
    brain = {"image": str(tmp_path / "brain.nii.gz"), "modality": "mri"}
    monkeypatch.setattr(sample_images, "sample_datalist", lambda: [brain])
    monkeypatch.setattr(sample_images, "_CROPS", {"place_training": 6, "place_test": 6})
    write_nifti(tmp_path / "brain.nii.gz", volume)
    slabs = slab_slices(tmp_path / write_samples(tmp_path / "first"), 30)
    near = [z for z in range(50) if any(abs(z - s) <= 2 for slab in slabs for s in slab)]
    volume[:, :, near] *= 1e-4
    write_nifti(tmp_path / "brain.nii.gz", volume)
    folder = tmp_path / write_samples(tmp_path / "second")
    bright = {p: np.asarray(Image.open(p)).max() > 128 for p in folder.glob("place_*/*.png")}
    assert slab_slices(folder, 30) == slabs
    assert [p.name for p, is_bright in bright.items() if p.parent.name == "place_test" and not is_bright] == []
    assert not all(bright.values())


@pytest.mark.parametrize("content", ['{"training": 3}', '{"training": [{"image": 7}]}', '{"training": [7]}'])
def test_a_datalist_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(InputError, match=r"datalist\.json: "):
        load_datalist(tmp_path)


def test_a_folder_without_datalist_has_no_test_section(tmp_path):
    with pytest.raises(InputError, match="all its images are 'training'"):
        load_datalist(tmp_path, "test")


def test_a_folder_with_other_files_is_not_overwritten_by_the_samples(tmp_path):
    (tmp_path / "mine.png").write_text("precious")
    with pytest.raises(InputError, match="holds files but no datalist"):
        write_samples(tmp_path)
    assert (tmp_path / "mine.png").read_text() == "precious"


def test_a_sheared_nifti_has_the_spacing_of_its_header(tmp_path):
    affine = np.array([[1.0, 0.3, 0, 0], [0, 2.0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1]])
    (tmp_path / "mri").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), affine), tmp_path / "mri/a.nii.gz")
    (item,) = find_images(tmp_path)
    assert item["spacing"] == pytest.approx(np.linalg.norm(affine[:3, :3], axis=0), rel=1e-5)


def test_an_item_of_a_datalist_without_modality_takes_its_folders(tmp_path):
    (tmp_path / "datalist.json").write_text('{"training": [{"image": "mri/a.nii.gz"}]}')
    assert load_datalist(tmp_path)[0]["modality"] == "mri"
