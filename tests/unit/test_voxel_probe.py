"""The probe of voxels: token maps, layers, Dice over windows, and all of it from a folder of images and label maps."""

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import DiceMetric
from monai.networks import one_hot
from PIL import Image

from biovfm_monai import cli
from biovfm_monai.checkpoints import save_encoder
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import VoxelProbe
from biovfm_monai.evaluation.report.scores import scores_of_json
from biovfm_monai.evaluation.voxel_probe import _cut, _dice
from biovfm_monai.evaluation.voxels import token_maps, train_voxel_layers
from biovfm_monai.networks import ViT, spad_vit_tiny


def vit(size=(16, 16, 16), patch=4, channels=1):
    torch.manual_seed(0)
    make = spad_vit_tiny if len(size) == 3 else ViT
    return make(channels, size, patch, embed_dim=24, depth=2, num_heads=2).eval()


def sample(shape=(1, 20, 30, 17), spacing=(1.0, 1.0, 1.0), classes=3):
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    labels = torch.randint(classes, (1, *shape[1:])).float()
    return {"image": MetaTensor(torch.randn(shape), affine=affine), "label": MetaTensor(labels, affine=affine)}


def scans(folder, count=10, size=(24, 40, 40), spacing=(1, 1, 1), seed=0, values=(0, 1, 2)):
    """Volumes with a bright and a dark ball on grey, and their label maps."""
    rng, grid = np.random.default_rng(seed), np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, label = rng.normal(100, 5, size), np.zeros(size, np.uint8)
        for place, value, shift in ((0.3, 1, 60), (0.7, 2, -60)):
            center = np.array(size) * place + rng.normal(0, 1, 3)
            ball = sum(((grid[a] - center[a]) * spacing[a]) ** 2 for a in range(3)) < 8**2
            image[ball] += shift
            label[ball] = values[value]
        affine = np.diag([*spacing, 1.0])
        for kind, data in (("images", image.astype(np.float32)), ("labels", label)):
            nibabel.save(nibabel.Nifti1Image(data, affine), folder / kind / f"scan{number:02}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(vit(), path, {"mean": 0.5, "std": 0.5})
    return path


def test_maps_are_the_encoders_tokens_and_raw_ones_its_patches_where_they_are():
    encoder, image = vit(), torch.randn(2, 1, 8, 16, 12)
    maps, raw = token_maps(encoder, image), token_maps(encoder, image, raw=True)
    assert torch.equal(maps, encoder.features(image, [-1])[0])
    assert raw.shape == (2, 64, 2, 4, 3)
    assert torch.equal(raw[1, :, 1, 2, 0], image[1, 0, 4:8, 8:12, :4].flatten())
    slices, volume = vit((16, 16)), torch.randn(2, 1, 3, 16, 16)
    of_slices = token_maps(slices, volume)
    assert of_slices.shape == (2, 24, 3, 4, 4)
    assert torch.equal(of_slices[1, :, 2], slices.features(volume[1:, :, 2], [-1])[0][0, :, 0])


def test_layers_trained_at_once_are_those_trained_one_by_one():
    windows = [
        (torch.randn(5, 6, 2, 3, 3).half(), torch.randint(3, (5, 4, 6, 6)).byte()),
        (torch.randn(3, 6, 1, 3, 3).half(), torch.randint(3, (3, 1, 6, 6)).byte()),
    ]
    windows[0][1][0, 0] = 255  # beyond the image
    both = train_voxel_layers(windows, 3, [1e-3, 1e-1], steps=5, batch_size=2)
    for rate, layer in zip([1e-3, 1e-1], both, strict=True):
        (alone,) = train_voxel_layers(windows, 3, [rate], steps=5, batch_size=2)
        assert all(torch.equal(x, y) for x, y in zip(layer.parameters(), alone.parameters(), strict=True))
    assert not torch.equal(both[0].linear.weight, both[1].linear.weight)


@pytest.mark.parametrize(
    ("encoder", "spacing", "grid"),
    [
        (vit(), (1.0, 1.0, 1.0), (4, 4, 4)), (vit(), (4.0, 1.0, 1.0), (16, 4, 4)),
        (vit((16, 16)), (1.0, 1.0, 1.0), (1, 4, 4)),
    ],
    ids=["volume", "thick slices", "slice by slice"],
)  # fmt: skip
def test_dice_over_windows_is_that_of_whole_images_without_what_was_added_to_them(encoder, spacing, grid):
    given = sample(spacing=spacing)
    cut = _cut(given, {"encoder": encoder}, False, torch.device("cpu"))
    assert cut.maps["encoder"].shape[2:] == grid
    (layer,) = train_voxel_layers([(cut.maps["encoder"], cut.classes)], 3, [0.1], steps=20)
    depth, height, width = cut.classes.shape[1:]
    counts = [-(-n // size) for n, size in zip((20, 30, 17), (depth, height, width), strict=True)]
    said = layer(cut.maps["encoder"], cut.classes.shape[1:]).argmax(1)
    whole = said.view(*counts, depth, height, width).permute(0, 3, 1, 4, 2, 5)
    whole = whole.reshape(counts[0] * depth, counts[1] * height, counts[2] * width)[:20, :30, :17]
    expected = DiceMetric(include_background=False, reduction="none")(
        one_hot(whole[None, None], 3), one_hot(given["label"].as_tensor()[None], 3)
    )
    np.testing.assert_allclose(_dice(layer, "encoder", [cut]), expected, rtol=1e-6)


def test_an_image_without_a_structure_has_no_dice_of_it():
    given = sample()
    given["label"][given["label"] == 2] = 0
    cut = _cut(given, {"encoder": vit()}, False, torch.device("cpu"))
    (layer,) = train_voxel_layers([(cut.maps["encoder"], cut.classes)], 3, [0.1], steps=2)
    assert np.isnan(_dice(layer, "encoder", [cut])).tolist() == [[False, True]]


def test_a_folder_of_scans_is_scored_from_the_command_line(encoder_file, tmp_path, monkeypatch, capsys):
    folder, out = scans(tmp_path / "scans", values=(0, 3, 7)), tmp_path / "probe.json"
    monkeypatch.setattr(
        "sys.argv",
        ["biovfm", "probe_voxels", str(folder), "--encoder", str(encoder_file), "--modality", "mri", "--out", str(out),
         "--steps", "150"],
    )  # fmt: skip
    cli.main()
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["benchmark"]["classes"] == 3
    assert written["benchmark"]["images"] == {"training": 6, "validation": 2, "test": 2}
    for contender, of in written["scores"].items():
        low, high = of["voxels"]["intervals"]["dice"]
        assert low <= of["voxels"]["dice"] <= high
        assert set(of["voxels"]["structures"]) == {"3", "7"}
        assert f"{contender:<12} voxels    Dice {of['voxels']['dice']:.4f}" in printed
    # Balls of another brightness are known by their pixels.
    assert written["scores"]["raw_pixels"]["voxels"]["dice"] > 0.6
    scores = {score.name: score for score in scores_of_json("run", "task", written)}
    assert any("dice" in name and score.low is not None for name, score in scores.items()), scores


def test_photographs_with_a_mask_of_each_object_are_scored(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(10):
        image, one = rng.integers(0, 50, (40, 50, 3), dtype=np.uint8), tmp_path / "set" / f"photo{number}"
        for kind in ("images", "masks"):
            (one / kind).mkdir(parents=True)
        for part, corner in enumerate(rng.integers(0, 24, (2, 2))):
            mask = np.zeros((40, 50), np.uint8)
            mask[corner[0] : corner[0] + 14, corner[1] + 10 * part : corner[1] + 10 * part + 14] = 255
            image[mask > 0] = rng.integers(200, 250, 3)
            Image.fromarray(mask).save(one / "masks" / f"{part}.png")
        Image.fromarray(image).save(one / "images" / "photo.png")
    path = tmp_path / "encoder.safetensors"
    save_encoder(vit((16, 16), channels=3), path, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]})
    scores = VoxelProbe(path, tmp_path / "set", "microscopy", steps=100).run()["scores"]
    assert scores["raw_pixels"]["voxels"]["dice"] > 0.7


def test_two_runs_find_the_same(encoder_file, tmp_path):
    folder = scans(tmp_path / "scans")
    first, again = (VoxelProbe(encoder_file, folder, "mri", steps=10).run() for _ in range(2))
    assert first == again


def test_what_cannot_be_scored_is_refused(encoder_file, tmp_path, monkeypatch):
    folder = scans(tmp_path / "scans")
    monkeypatch.setattr("biovfm_monai.evaluation.voxel_probe.machine_memory", lambda: 1e-4)
    with pytest.raises(InputError, match=r"scan\d\d\.nii\.gz: up to it, tokens take .* Give fewer images"):
        VoxelProbe(encoder_file, folder, "mri").run()
    with pytest.raises(InputError, match="all label maps of the training part are empty"):
        VoxelProbe(encoder_file, scans(tmp_path / "empty", values=(0, 0, 0)), "mri").run()
    with pytest.raises(InputError, match="so no label maps"):
        VoxelProbe(encoder_file, tmp_path / "nothing", "mri")


def datalist(folder, **changed):
    """Ten scans by section, each of a subject of its own."""
    where = {"training": range(6), "validation": (6, 7), "test": (8, 9)}
    sections = {
        section: [
            {
                "image": f"images/scan{n:02}.nii.gz", "label": f"labels/scan{n:02}.nii.gz", "modality": "mri",
                "subject": f"s{n}",
            }
            for n in numbers
        ]
        for section, numbers in where.items()
    }  # fmt: skip
    for section, (number, item) in changed.items():
        sections[section][number] |= item
    (folder / "datalist.json").write_text(json.dumps(sections))
    return folder


@pytest.mark.parametrize(
    ("section", "number", "item", "message"),
    [
        ("test", 0, {"subject": "s1"}, "a subject is in both the training and the test part, there with .*scan08"),
        ("validation", 1, {"image": "images/scan00.nii.gz"}, "an image is in both the training and the validation"),
    ],
)
def test_parts_that_share_a_patient_are_refused(encoder_file, tmp_path, section, number, item, message):
    folder = datalist(scans(tmp_path / "scans"), **{section: (number, item)})
    with pytest.raises(InputError, match=message):
        VoxelProbe(encoder_file, folder, "mri")


@pytest.mark.parametrize(("section", "number"), [("validation", 6), ("test", 8)])
def test_a_part_without_structures_is_refused(encoder_file, tmp_path, section, number):
    folder = datalist(scans(tmp_path / "scans"))
    for scan in (number, number + 1):
        empty = nibabel.Nifti1Image(np.zeros((24, 40, 40), np.uint8), np.eye(4))
        nibabel.save(empty, folder / f"labels/scan{scan:02}.nii.gz")
    with pytest.raises(InputError, match=f"all label maps of the {section} part are empty"):
        VoxelProbe(encoder_file, folder, "mri").run()


def test_tokens_that_are_not_finite_are_refused_with_the_image(tmp_path):
    encoder = vit()
    with torch.no_grad():
        encoder.norm.weight[0] = float("nan")
    save_encoder(encoder, tmp_path / "encoder.safetensors", {"mean": 0.5, "std": 0.5})
    with pytest.raises(InputError, match=r"scan\d\d\.nii\.gz: tokens of encoder are NaN or infinite"):
        VoxelProbe(tmp_path / "encoder.safetensors", scans(tmp_path / "scans"), "mri").run()


def test_scans_of_which_some_have_a_subject_are_scored_and_one_patient_gives_no_interval(encoder_file, tmp_path):
    folder = datalist(scans(tmp_path / "scans"), test=(0, {"subject": None}))
    found = VoxelProbe(encoder_file, folder, "mri", steps=5).run()["scores"]["encoder"]["voxels"]
    assert np.isfinite(found["intervals"]["dice"]).all()
    folder = datalist(folder, test=(0, {"subject": "s9"}))
    found = VoxelProbe(encoder_file, folder, "mri", steps=5).run()["scores"]["encoder"]["voxels"]
    assert np.isnan(found["intervals"]["dice"]).all()
