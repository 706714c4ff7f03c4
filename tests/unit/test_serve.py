"""Bundles on files without a server: geometry, names, DICOM in and out, what cannot be used is set aside by name."""

import csv
import json

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT
from image_files import write_dicom
from monai.bundle import ConfigParser
from PIL import Image

from biovfm_monai import cli
from biovfm_monai.checkpoints import load_encoder, save_encoder
from biovfm_monai.data import read_image
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import classify_files, embed, embed_files, open_bundle, segment_files, transform_of
from biovfm_monai.networks import Embedder, vit_tiny
from biovfm_monai.shipped import copy_bundle

THRESHOLD = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1}


def change(root, **keys):
    path = root / "configs/inference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def save(root, weights):
    (root / "models").mkdir()
    torch.save({"model": weights}, root / "models/model.pt")
    return root


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """The brain bundle with a convolution that calls bright voxels class 1, and never says class 2."""
    root = copy_bundle("brain_mri_segmentation", tmp_path_factory.mktemp("bundles"))
    inferer = {"_target_": "monai.inferers.SimpleInferer"}
    change(root, network_def=THRESHOLD, inferer=inferer, modality="ct", spacing=None, device="cpu")
    weights = {"weight": torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1, 1, 1), "bias": torch.tensor([0.0, 0.0, -9.0])}
    return save(root, weights)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The chest bundle with an encoder of two blocks, weights as they are drawn."""
    root = copy_bundle("chest_xray_classification", tmp_path_factory.mktemp("bundles"))
    encoder = json.loads((root / "configs/inference.json").read_text())["encoder"]
    change(
        root, encoder={**encoder, "depth": 2, "embed_dim": 48, "num_heads": 3}, classes=["mass", "node"], device="cpu"
    )
    with pytest.raises(InputError, match=r"no such file\. Train first"):
        open_bundle(root)
    parser = ConfigParser()
    parser.read_config(str(root / "configs/inference.json"))
    return save(root, parser.get_parsed_content("network_def").state_dict())


def oblique():
    """Anisotropic, rotated, and left-handed."""
    turn = np.array(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.3, 0.25).GetMatrix()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, 0.9, 3.0])
    affine[:3, 3] = 11, -7, 30
    return affine


def write_volume(path, affine=None, size=(20, 18, 8), box=(3, 12)):
    values = np.full(size, -1000, np.float32)
    values[box[0] : box[1], 4:14, 2:6] = 900
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def write_series(folder, slices=5):
    """A CT series; slices 1 and 2 are bright. Its files' names do not sort as its slices do."""
    for number in range(slices):
        rows = np.zeros((6, 8), np.int16)
        if number in (1, 2):
            rows[1:4, 2:7] = 900
        tags = {
            "PixelData": rows.tobytes(), "PatientName": "A^B", "PatientBirthDate": "", "PatientSex": "",
            "AccessionNumber": "1", "StudyDate": "20200101", "StudyTime": "", "ReferringPhysicianName": "",
            "StudyID": "1", "SeriesNumber": 1, "InstanceNumber": number + 1, "FrameOfReferenceUID": "1.2.3",
            "SliceThickness": 3,
        }  # fmt: skip
        write_dicom(folder / f"{(number * 3) % slices}.dcm", "1.2.9", number, **tags)
    return folder


def test_a_label_map_lies_over_an_oblique_left_handed_volume(segmenter, tmp_path):
    path = write_volume(tmp_path / "case.nii.gz", oblique())
    assert segment_files(segmenter, [path], tmp_path / "out") == (1, [])
    found, truth = nib.load(tmp_path / "out/case_seg.nii.gz"), nib.load(path)
    np.testing.assert_allclose(found.affine, truth.affine, atol=1e-5)
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(truth.dataobj) > 0)
    itk, itk_truth = sitk.ReadImage(str(tmp_path / "out/case_seg.nii.gz")), sitk.ReadImage(str(path))
    np.testing.assert_allclose(itk.GetDirection(), itk_truth.GetDirection(), atol=1e-5)
    sheet = np.asarray(Image.open(tmp_path / "out/case_overlay.png")).astype(int)
    plain, shown = (np.ptp(half, axis=-1).max() for half in np.array_split(sheet[16:], 2, axis=1))
    assert plain < 60 < shown
    assert not (tmp_path / "out/set_aside.csv").exists()


def test_a_label_map_lies_over_a_dicom_series(segmenter, tmp_path):
    series = write_series(tmp_path / "series")
    assert segment_files(segmenter, [series], tmp_path / "out") == (1, [])
    found, image = nib.load(tmp_path / "out/series_seg.nii.gz"), read_image(series)
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-5)
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(image[0]) > 0)
    assert np.asarray(found.dataobj).sum() == 2 * 15


TILT = np.deg2rad(18.5)
TURN = np.array([[1, 0, 0], [0, np.cos(TILT), -np.sin(TILT)]])
TILTED_SIZE = (48, 40, 12)


def tilted_places():
    """From voxels of the tilted series to mm in DICOM's axes, by PS3.3 C.7.6.2: the table moves along z alone."""
    affine = np.eye(4)
    affine[:3, :3] = np.stack([1.2 * TURN[0], 1.5 * TURN[1], (0, 0, 4)], axis=1)
    affine[:3, 3] = -20, 13, 100
    return affine


def ball(places):
    """Which places lie within 15 mm of the middle of the tilted series."""
    middle = tilted_places() @ [*((n - 1) / 2 for n in TILTED_SIZE), 1]
    return np.linalg.norm(places - middle[:3], axis=-1) < 15


def write_tilted(folder):
    grid = np.stack(np.meshgrid(*map(np.arange, TILTED_SIZE), indexing="ij"), axis=-1)
    affine = tilted_places()
    inside = ball(grid @ affine[:3, :3].T + affine[:3, 3])
    for number in range(TILTED_SIZE[2]):
        tags = {
            "Rows": TILTED_SIZE[1], "Columns": TILTED_SIZE[0], "PixelSpacing": [1.5, 1.2],
            "ImageOrientationPatient": TURN.round(8).flatten().tolist(),
            "ImagePositionPatient": [-20, 13, 100 + 4 * number],
            "PixelData": (900 * inside[..., number].T.astype(np.int16)).tobytes(),
            **dict.fromkeys(("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"), ""),
            **dict.fromkeys(("AccessionNumber", "StudyID", "SeriesNumber"), "1"),
            "ReferringPhysicianName": "", "InstanceNumber": number + 1, "FrameOfReferenceUID": "1.2.3",
            "SliceThickness": 4,
        }  # fmt: skip
        write_dicom(folder / f"{number}.dcm", "1.2.9", number, **tags)
    return inside


def on_scanner_axes(voxels, affine):
    """Resampled by SimpleITK to a grid of the scanner's axes, through a transform, as its own images do not slant."""
    image = sitk.GetImageFromArray(voxels.astype(np.float32).T)
    back = np.linalg.inv(affine)
    slant = sitk.AffineTransform(back[:3, :3].flatten().tolist(), back[:3, 3].tolist())
    grid = sitk.Image(70, 60, 64, sitk.sitkUInt8)
    grid.SetOrigin((-30, -5, 80))
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, slant, sitk.sitkLinear, 0.0, sitk.sitkFloat32)).T > 0.5


def test_a_label_map_lies_over_a_series_of_a_tilted_gantry_in_voxels_and_in_the_world(segmenter, tmp_path):
    inside = write_tilted(tmp_path / "series")
    assert segment_files(segmenter, [tmp_path / "series"], tmp_path / "out") == (1, [])
    found = nib.load(tmp_path / "out/series_seg.nii.gz")
    affine = np.diag([-1, -1, 1, 1]) @ found.affine
    np.testing.assert_allclose(affine, tilted_places(), atol=1e-4)
    label = np.asarray(found.dataobj) > 0

    def overlap(one, other):
        return 2 * (one & other).sum() / (one.sum() + other.sum())

    assert overlap(label, inside) > 0.95
    straight = on_scanner_axes(label, affine)
    grid = np.stack(np.meshgrid(*map(np.arange, straight.shape), indexing="ij"), axis=-1)
    expected = ball(grid + np.array([-30, -5, 80]))
    assert overlap(straight, expected) > 0.93
    assert overlap(straight, on_scanner_axes(inside, tilted_places())) > 0.95
    # Were the shear forgotten, as in a grid of right angles, the ball would lie some voxels off.
    upright = affine.copy()
    upright[:3, 2] = 4 * np.cos(TILT) * np.cross(*TURN)
    assert overlap(on_scanner_axes(label, upright), expected) < 0.8


def test_a_dicom_segmentation_has_the_series_study_and_its_frames_in_place(segmenter, tmp_path):
    pytest.importorskip("highdicom")
    series = write_series(tmp_path / "series")
    assert segment_files(segmenter, [series], tmp_path / "out", dicom_seg=True) == (1, [])
    made, source = pydicom.dcmread(tmp_path / "out/series_seg.dcm"), pydicom.dcmread(series / "0.dcm")
    assert (made.Modality, made.StudyInstanceUID) == ("SEG", source.StudyInstanceUID)
    assert [one.SegmentLabel for one in made.SegmentSequence] == ["grey matter", "white matter"]
    places = [
        float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in made.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(places) == [3, 6]
    assert np.array_equal(made.pixel_array[0][1:4, 2:7], np.ones((3, 5)))
    assert made.pixel_array.sum() == 2 * 15


def test_what_cannot_be_used_is_set_aside_by_name_and_the_others_are_done(segmenter, tmp_path):
    good = [write_volume(tmp_path / name / "scan.nii.gz") for name in ("a", "b")]
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    huge = write_volume(tmp_path / "huge.nii.gz", size=(64, 64, 64))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photo.png")
    names = ("broken.nii.gz", "huge.nii.gz", "photo.png", "gone.nii.gz")
    done, aside = segment_files(
        segmenter, [good[0], *(tmp_path / name for name in names), good[1]], tmp_path / "out", memory=0.01
    )
    assert done == 2
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {"scan_seg.nii.gz", "scan_2_seg.nii.gz"}
    reasons = {one.file.rpartition("/")[2]: one.reason for one in aside}
    assert {*reasons} == {*names}
    assert "64 x 64 x 64 voxels need about" in reasons[huge.name]
    assert "there are 0.01" in reasons[huge.name]
    with (tmp_path / "out/set_aside.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == [one.file for one in aside]


def test_probabilities_stand_under_the_classes_names(classifier, tmp_path):
    rng = np.random.default_rng(0)
    for n in range(2):
        Image.fromarray(rng.integers(0, 255, (30, 24), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    Image.fromarray(rng.integers(0, 255, (9, 9, 4), dtype=np.uint8), "RGBA").save(tmp_path / "3.png")
    out = tmp_path / "out/found.csv"
    done, aside = classify_files(classifier, [tmp_path], out)
    assert done == 2
    assert {one.file.rpartition("/")[2] for one in aside} == {"2.png", "3.png"}
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"].rpartition("/")[2] for row in rows] == ["0.png", "1.png"]
    sample = open_bundle(classifier)({"image": str(tmp_path / "1.png")})
    assert [float(rows[1][name]) for name in ("mass", "node")] == pytest.approx(sample["pred"].tolist(), abs=1e-5)
    line = cli.classify(str(classifier), str(tmp_path / "0.png"), out=str(out), classes=["x", "y"])
    assert line == f"{out}: ready, 1 image(s)."
    assert out.read_text().startswith("image,x,y")
    with pytest.raises(InputError, match=r"no image could be used\. .*2\.png"):
        cli.classify(str(classifier), str(tmp_path / "2.png"), out=str(out))


def test_images_that_cannot_be_embedded_are_set_aside_by_name_and_the_others_are_done(tmp_path):
    encoder = tmp_path / "encoder.safetensors"
    save_encoder(vit_tiny(1, (16, 16), 8, depth=1), encoder, {"mean": 0.5, "std": 0.5})
    rng = np.random.default_rng(0)
    for name in ("xray/a.png", "xray/b.png", "mri/c.png", "d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 16), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "xray/a.png").write_bytes(b"no image")
    out = tmp_path / "found.npz"
    done, aside = embed_files([tmp_path, tmp_path / "gone.png"], encoder, out, "xray")
    assert done == 2
    reasons = {one.file.rpartition("/")[2]: one.reason for one in aside}
    assert {*reasons} == {"a.png", "c.png", "gone.png"}
    assert "not of modality 'xray' but mri. Give" in reasons["c.png"]
    with np.load(out) as found:
        assert [name.rpartition("/")[2] for name in found["files"]] == ["d.png", "b.png"]
        expected = embed(
            Embedder(load_encoder(encoder)),
            [transform_of(encoder)({"image": str(tmp_path / "xray/b.png"), "modality": "xray"})],
        )
        np.testing.assert_allclose(found["embeddings"][1], expected[0], atol=1e-6)
    with (tmp_path / "found-set_aside.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == [one.file for one in aside]
    line = cli.embed(str(tmp_path / "d.png"), str(tmp_path / "mri"), encoder=str(encoder), out=str(out))
    assert line.startswith(f"{out}: ready, 1 image(s).\nset aside: {tmp_path}/d.png: cannot tell the modality")
    with pytest.raises(InputError, match=r"no image could be used\. .*a\.png"):
        cli.embed(str(tmp_path / "xray/a.png"), encoder=str(encoder), out=str(out))


def test_a_dicom_segmentation_of_a_tilted_gantry_has_each_slices_place(segmenter, tmp_path):
    pytest.importorskip("highdicom")
    inside = write_tilted(tmp_path / "series")
    assert segment_files(segmenter, [tmp_path / "series"], tmp_path / "out", dicom_seg=True) == (1, [])
    made = pydicom.dcmread(tmp_path / "out/series_seg.dcm")
    for frame, pixels in zip(made.PerFrameFunctionalGroupsSequence, made.pixel_array, strict=True):
        x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
        assert (x, y) == (-20, 13)
        expected = inside[..., round((z - 100) / 4)].T
        assert (pixels.astype(bool) != expected).mean() < 0.01


@pytest.mark.parametrize(
    ("overrides", "words"), [({"clases": ["a"]}, "has no key 'clases'"), ({"classes": ["a"]}, "do not fit the network")]
)
def test_a_wrong_choice_is_named_and_no_random_network_answers(classifier, tmp_path, overrides, words):
    with pytest.raises(InputError, match=words):
        classify_files(classifier, [tmp_path], tmp_path / "out.csv", overrides)


def test_a_folder_that_is_no_bundle_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no such file\. Give the folder of a bundle"):
        segment_files(ROOT, [tmp_path], tmp_path / "out")
