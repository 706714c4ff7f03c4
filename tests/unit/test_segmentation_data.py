"""Label maps found, read and checked; predictions brought back to the file's grid; a labelled brain that ships."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import DataLoader, MetaTensor, decollate_batch
from monai.transforms import Compose, ResampleToMatchd, SaveImaged
from PIL import Image

from biovfm_monai.data import (
    TISSUES,
    ByModalityd,
    PreparedImaged,
    ReadLabeld,
    RestoreGridd,
    load_segmentation,
    read_image,
    write_brain,
)
from biovfm_monai.errors import InputError

SIZE = (20, 12, 16)


def oblique():
    """Anisotropic, rotated, and left-handed: its determinant is below 0."""
    turn = np.array(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.3, 0.25).GetMatrix()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, 0.9, 3.0])
    affine[:3, 3] = 11, -7, 30
    assert np.linalg.det(affine) < 0
    return affine


def blob(size=SIZE):
    """A bright box off centre, in float so that no preset takes it for eight bits."""
    values = np.random.default_rng(0).uniform(0, 0.1, size).astype(np.float32)
    values[3:11, 2:8, 9:14] += 1
    return values


def write(folder, values, name="a.nii.gz", affine=None):
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, oblique() if affine is None else affine), folder / name)
    return folder / name


def prepared(image, label, spacing=None, **options):
    steps = [PreparedImaged("image", "mri", spacing=spacing), ReadLabeld("label", 2, **options)]
    return Compose(steps)({"image": str(image), "label": str(label)})


@pytest.mark.parametrize("spacing", [None, [2.0, 1.0, 1.0]])
def test_what_is_found_in_a_prepared_oblique_left_handed_thick_volume_lies_over_it_in_its_file(tmp_path, spacing):
    path = write(tmp_path / "in", blob())
    steps = Compose(
        [
            RestoreGridd("pred", mode="nearest"),
            SaveImaged(
                "pred",
                output_dir=tmp_path / "out",
                output_postfix="seg",
                resample=False,
                separate_folder=False,
                print_log=False,
            ),
        ]
    )
    loader = DataLoader([PreparedImaged("image", "mri", spacing=spacing)({"image": str(path)})], batch_size=1)
    (batch,) = loader
    assert batch["image"].shape[2:] != SIZE
    (sample,) = decollate_batch(batch)
    steps({**sample, "pred": (sample["image"] > 0).float().as_tensor()})
    found, truth = sitk.ReadImage(str(tmp_path / "out/a_seg.nii.gz")), sitk.ReadImage(str(path)) > 0.5
    assert found.GetSize() == truth.GetSize()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(truth, name)(), atol=1e-4)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    truth.CopyInformation(found)
    overlap.Execute(sitk.Cast(found, sitk.sitkUInt8), sitk.Cast(truth, sitk.sitkUInt8))
    assert overlap.GetDiceCoefficient() > (0.999 if spacing is None else 0.9)


def test_a_label_map_follows_its_image_to_the_prepared_grid(tmp_path):
    image = write(tmp_path / "images", blob())
    label = write(tmp_path / "labels", (blob() > 0.5).astype(np.uint8))
    sample = prepared(image, label, spacing=[2.0, 1.0, 1.0])
    sample = ResampleToMatchd("label", "image", mode="nearest", padding_mode="zeros")(sample)
    assert sample["label"].shape == sample["image"].shape
    bright = (sample["image"] > 0).float()
    both = 2 * (bright * sample["label"]).sum() / (bright.sum() + sample["label"].sum())
    assert both > 0.9


def test_an_image_is_prepared_as_in_pretraining(tmp_path):
    path = write(tmp_path, blob())
    ours = PreparedImaged("image", "mri")({"image": str(path), "modality": "written by somebody"})
    theirs = ByModalityd("image")({"image": read_image(path), "modality": "mri"})["image"]
    torch.testing.assert_close(ours["image"].as_tensor(), (theirs.as_tensor() - 0.5) / 0.5)
    assert ours["modality"] == "written by somebody"


def moved(folder):
    affine = oblique()
    affine[0, 3] += 5
    return write(folder, np.ones(SIZE, np.uint8), affine=affine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write(f, np.full(SIZE, 3, np.uint8)), r"a\.nii\.gz: holds 3; classes are 0 to 1.*--out_channels"),
        (lambda f: write(f, blob()), r"a\.nii\.gz: holds .*, \.\.\.; classes"),
        (lambda f: write(f, np.zeros(SIZE, np.uint8)), r"a\.nii\.gz: is empty"),
        (lambda f: write(f, np.ones((20, 12, 15), np.uint8)), r"has size \[20, 12, 15\].*\[20, 12, 16\]"),
        (moved, r"a\.nii\.gz: its header puts it up to 5 mm from its image"),
        (lambda f: f / "none.nii.gz", "no such file"),
    ],
)
def test_a_label_map_that_does_not_belong_to_its_image_is_refused(tmp_path, make, message):
    image = write(tmp_path / "images", blob())
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it
        prepared(image, make(tmp_path / "labels"))
    assert isinstance(caught.value.__cause__, InputError)
    with pytest.raises(InputError, match=message):
        raise caught.value.__cause__


def test_a_label_map_of_background_alone_can_be_allowed(tmp_path):
    image, label = write(tmp_path, blob()), write(tmp_path / "labels", np.zeros(SIZE, np.uint8))
    assert prepared(image, label, needed=False)["label"].sum() == 0


def test_an_image_of_fewer_channels_or_no_volume_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.nii\.gz: has 1 channel.*takes 4.*--in_channels 1"):
        PreparedImaged("image", "mri", in_channels=4)({"image": str(write(tmp_path, blob()))})
    flat = write(tmp_path / "flat", blob((20, 12, 1))[..., 0])
    with pytest.raises(InputError, match=r"a\.nii\.gz: is an image of 2 axes, the network takes those of 3"):
        PreparedImaged("image", "mri")({"image": str(flat)})


def decathlon(folder, count=10, pair=("imagesTr", "labelsTr")):
    for number in range(count):
        for name in pair:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"case_{number:02d}.nii.gz").touch()
    return folder


@pytest.mark.parametrize("pair", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_folders_of_images_and_labels_are_shared_out_by_subject(tmp_path, pair):
    found = [load_segmentation(decathlon(tmp_path, pair=pair), part) for part in ("training", "validation", "test")]
    assert [len(items) for items in found] == [6, 2, 2]
    assert {Path(item["image"]).name for items in found for item in items} == {
        f"case_{n:02d}.nii.gz" for n in range(10)
    }
    assert all(Path(item["label"]).name == Path(item["image"]).name for items in found for item in items)


def test_the_decathlons_list_is_read_and_its_images_without_labels_are_left_out(tmp_path):
    decathlon(tmp_path)
    pairs = [{k: f"./{k}sTr/case_{n:02d}.nii.gz" for k in ("image", "label")} for n in range(10)]
    (tmp_path / "dataset.json").write_text(
        json.dumps({"name": "x", "labels": {"0": "b"}, "training": pairs, "test": ["./imagesTs/t.nii.gz"]})
    )
    assert len(load_segmentation(tmp_path, "training")) == 6
    assert all("imagesTr" in item["image"] for item in load_segmentation(tmp_path, "test"))


def test_images_of_one_subject_stay_together_and_a_share_of_subjects_is_part_of_a_larger_one(tmp_path):
    decathlon(tmp_path, 40)
    items = [
        {
            "image": f"imagesTr/case_{n:02d}.nii.gz",
            "label": f"labelsTr/case_{n:02d}.nii.gz",
            "subject": f"s{n // 2:02d}",
        }
        for n in range(40)
    ]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items}))
    subjects = [{i["subject"] for i in load_segmentation(tmp_path, p)} for p in ("training", "validation", "test")]
    assert sum(len(part) for part in subjects) == 20 == len(set.union(*subjects))
    tenth, half = (load_segmentation(tmp_path, "training", fraction) for fraction in (0.1, 0.5))
    assert len({item["subject"] for item in tenth}) == 1
    assert len(tenth) == 2
    assert {item["image"] for item in tenth} < {item["image"] for item in half}


@pytest.mark.parametrize(
    ("make", "section", "message"),
    [
        (lambda f: f.mkdir(), "training", "has neither a datalist.json, nor a dataset.json, nor folders"),
        (lambda f: decathlon(f, 4), "training", r"4 labelled subject\(s\) are too few to share out"),
        (decathlon, "testing", "no images for 'testing', but training, validation, test"),
        (lambda f: (decathlon(f), (f / "labelsTr/case_00.nii.gz").unlink()), "training", "that is no file"),
    ],
)
def test_a_folder_without_the_label_maps_asked_for_is_refused(tmp_path, make, section, message):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        load_segmentation(tmp_path / "data", section)


def test_for_inference_a_folder_of_images_is_enough(tmp_path):
    path = write(tmp_path / "mri", blob())
    assert [item["image"] for item in load_segmentation(tmp_path / "mri", "test", labelled=False)] == [str(path)]


def test_the_labelled_brain_has_three_classes_and_no_slice_in_two_parts(tmp_path):
    folder = write_brain(tmp_path / "brain")
    assert write_brain(folder) == folder
    ranges = []
    for part, count in (("training", 3), ("validation", 1), ("test", 2)):
        items = load_segmentation(folder, part)
        assert len(items) == count
        for item in items:
            image, label = nib.load(item["image"]), nib.load(item["label"])
            assert np.array_equal(np.unique(label.dataobj), range(len(TISSUES)))
            values = np.asarray(image.dataobj).astype(float)
            means = [values[np.asarray(label.dataobj) == number].mean() for number in range(3)]
            assert means[0] < means[1] < means[2]
            ranges.append((image.affine[1, 3], image.affine[1, 3] + image.shape[1]))
    ranges.sort()
    assert all(end + 4 == start for (_, end), (start, _) in pairwise(ranges))
    assert isinstance(PreparedImaged("image", "mri")({"image": items[0]["image"]})["image"], MetaTensor)


@pytest.mark.parametrize(
    ("modality", "scale", "given", "words"),
    [
        ("mri", 1, {"modality": "ct"}, "its modality is 'ct', the network is one of 'mri'"),
        ("ct", 1, {}, "to 1.09922 seem to be no Hounsfield units, in which air has -1000"),
        ("mri", -1000, {}, "values from -1099.22 to -0.0190002 seem to be Hounsfield units"),
    ],
)
def test_a_volume_of_another_modality_is_named_with_its_numbers(tmp_path, caplog, modality, scale, given, words):
    path = write(tmp_path, scale * blob())
    PreparedImaged("image", modality)({"image": str(path), **given})
    assert words in caplog.text
    assert "a.nii.gz" in caplog.text


@pytest.mark.parametrize(
    ("spacing", "warned"),
    [
        ([1.0, 1.0, 1.0], True),
        ([3.0, 0.9, 0.9], False),
        ([2.2, 0.8, 0.8], False),
        (None, False),
        ([None, 0.8, 0.8], False),
    ],
)
def test_a_volume_of_another_spacing_is_named_with_its_numbers(tmp_path, caplog, spacing, warned):
    PreparedImaged("image", "mri", spacing=spacing)({"image": str(write(tmp_path, blob()))})
    assert ("voxels of 0.8 x 0.9 x 3 mm; the network is one of 1 x 1 x 1 mm" in caplog.text) == warned
    assert caplog.text == "" or warned


def photo(folder, name="a"):
    """A bright box off centre on a dark disc, which a camera has put beside the middle of a black picture."""
    y, x = np.mgrid[:600, :800]
    disc, box = (x - 380) ** 2 + (y - 310) ** 2 < 250**2, np.zeros((600, 800), bool)
    box[200:300, 250:430] = True
    values = np.stack([60 * disc + 150 * (box & disc)] * 3, axis=-1).astype(np.uint8)
    for kind, array in (("images", values), ("labels", (box * 255).astype(np.uint8))):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / f"{name}.png")
    return {"image": str(folder / f"images/{name}.png"), "label": str(folder / f"labels/{name}.png")}


def test_what_is_found_in_a_cropped_and_shrunken_photograph_lies_over_it_in_its_file(tmp_path):
    read = [
        PreparedImaged("image", "fundus", in_channels=3, spatial_dims=2),
        ReadLabeld("label", 2, values=[0, 255]),
    ]
    sample = Compose(read)(photo(tmp_path))
    assert sample["image"].shape[:2] == (3, 1)
    assert max(sample["image"].shape[2:]) < 520
    onto = ResampleToMatchd("label", "image", mode="nearest", padding_mode="zeros")(sample)["label"]
    bright = (sample["image"][:1] > 0).float()
    assert 2 * (bright * onto).sum() / (bright.sum() + onto.sum()) > 0.98
    pred = torch.cat([-sample["image"][:1], sample["image"][:1]]).as_tensor()
    found = RestoreGridd("pred")({**sample, "pred": pred})["pred"].argmax(0)
    assert found.shape == (800, 600, 1)
    truth = sample["label"][0]
    assert 2 * (found * truth).sum() / (found.sum() + truth.sum()) > 0.98


def test_photographs_are_refused_by_a_network_of_volumes_and_the_other_way_round(tmp_path):
    with pytest.raises(InputError, match=r"a\.png: is an image of 2 axes, the network takes those of 3"):
        PreparedImaged("image", "fundus", in_channels=3)({"image": photo(tmp_path)["image"]})
    with pytest.raises(InputError, match=r"a\.nii\.gz: is an image of 3 axes, the network takes those of 2"):
        PreparedImaged("image", "mri", spatial_dims=2)({"image": str(write(tmp_path, blob()))})


def test_masks_of_single_objects_are_one_label_map(tmp_path):
    folder = tmp_path / "bowl/first"
    for number in range(3):
        mask = np.zeros((20, 30), np.uint8)
        mask[5 * number : 5 * number + 5] = 255
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
    (folder / "images").mkdir()
    Image.fromarray(np.full((20, 30), 9, np.uint8)).save(folder / "images/first.png")
    shutil.copytree(folder, tmp_path / "bowl/second")
    for name in ("third", "fourth", "fifth"):
        shutil.copytree(folder, tmp_path / "bowl" / name)
    (item,) = load_segmentation(tmp_path / "bowl", "validation")
    steps = [PreparedImaged("image", "pathology", spatial_dims=2), ReadLabeld("label", 2, values=[0, 255])]
    label = Compose(steps)(item)["label"]
    assert label.shape == (1, 30, 20, 1)
    assert label[0, :, :15].all()
    assert not label[0, :, 15:].any()


def test_label_maps_of_another_file_type_are_found_by_their_names(tmp_path):
    for number in range(5):
        photo(tmp_path, f"1.2.{number}")
        (tmp_path / f"images/1.2.{number}.png").rename(tmp_path / f"images/1.2.{number}.jpg")
    items = load_segmentation(tmp_path)
    assert [Path(item["label"]).name for item in items] == ["1.2.0.png", "1.2.1.png", "1.2.2.png"]


def test_numbers_that_stand_for_no_class_are_listed_and_two_classes_need_two_numbers(tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it
        prepared(write(tmp_path, blob()), write(tmp_path / "l", np.full(SIZE, 3, np.uint8)), values=[0, 255])
    with pytest.raises(InputError, match=r"holds 3; classes are \[0, 255\].*--label_values"):
        raise caught.value.__cause__
    with pytest.raises(InputError, match=r"label_values \[0\] must be 2 different numbers"):
        ReadLabeld("label", 2, values=[0])


def test_slices_can_keep_their_distance_while_their_pixels_are_resampled(tmp_path):
    image = PreparedImaged("image", "mri", spacing=[None, 1.5, 1.5])({"image": str(write(tmp_path, blob()))})["image"]
    assert image.pixdim.tolist() == pytest.approx([3.0, 1.5, 1.5])
    assert image.shape[1] == 16
