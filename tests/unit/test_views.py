"""What is drawn for views, and that what is drawn is what is done."""

import re

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.color import hed2rgb, rgb2hed
from skimage.exposure import adjust_gamma
from torch.nn import functional as F

from biovfm_monai.data import (
    NATURAL,
    POLICIES,
    MultiCrop,
    Policy,
    RandomResizedCrop,
    geometric,
    modalities,
    views,
    with_chances,
)
from biovfm_monai.data.intensity import Changes, apply_changes, chances, draw_changes
from biovfm_monai.draws import forked
from biovfm_monai.errors import InputError

CPU = torch.device("cpu")


def changed(image, **values):
    """One image with some changes and no other."""
    still = {
        "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "stain": [1.0, 1.0, 1.0], "gamma": 1.0,
        "inverted": False, "blur": 0.0, "pixel": 1.0, "noise": 0.0, "solarise": False, "seed": 3,
    }  # fmt: skip
    changes = Changes(**{name: torch.tensor([value]) for name, value in (still | values).items()})
    return apply_changes(image[None].clone(), changes)[0]


@pytest.fixture
def grey():
    return torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def colour():
    return torch.rand(3, 1, 20, 24, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1


# Each change is what its name says.


def test_brightness_is_a_factor_and_contrast_is_about_the_mean(grey):
    torch.testing.assert_close(changed(grey, brightness=1.2), (1.2 * grey).clamp(0, 1))
    torch.testing.assert_close(changed(grey, contrast=0.7), grey.mean() + 0.7 * (grey - grey.mean()))


def test_gamma_is_a_power_of_the_image_or_of_its_inverse(grey):
    torch.testing.assert_close(changed(grey, gamma=1.4).numpy(), adjust_gamma(grey.numpy(), 1.4))
    torch.testing.assert_close(changed(grey, gamma=0.8, inverted=True), 1 - (1 - grey) ** 0.8)


def test_blur_is_a_gaussian_in_the_plane_alone(grey):
    expected = gaussian_filter(grey.numpy(), (0, 0, 1.3, 1.3), mode="nearest", truncate=3.2)
    np.testing.assert_allclose(changed(grey, blur=1.3), expected, atol=1e-4)


def test_wider_pixels_lose_detail_and_keep_the_mean(grey):
    coarse = changed(grey, pixel=2.0)
    assert coarse.std() < 0.7 * grey.std()
    assert abs(coarse.mean() - grey.mean()) < 0.01
    ramp = torch.linspace(0, 1, 24).expand(1, 1, 20, 24)
    torch.testing.assert_close(changed(ramp, pixel=2.0)[..., 4:-4], ramp[..., 4:-4], atol=1e-3, rtol=0)


def test_noise_has_the_stated_deviation_and_comes_from_the_seed():
    half = torch.full((1, 1, 100, 100), 0.5)
    noisy = changed(half, noise=0.05)
    assert (noisy - half).std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(noisy, changed(half, noise=0.05))
    assert not torch.equal(noisy, changed(half, noise=0.05, seed=4))


def test_solarising_inverts_what_is_bright(grey):
    torch.testing.assert_close(changed(grey, solarise=True), torch.where(grey < 0.5, grey, 1 - grey))


def test_saturation_is_about_grey_and_hue_keeps_luminance_and_comes_round(colour):
    luminance = (torch.tensor([0.299, 0.587, 0.114])[:, None, None, None] * colour).sum(0)
    torch.testing.assert_close(changed(colour, saturation=0.0), luminance.expand(3, -1, -1, -1), atol=1e-3, rtol=0)
    middle = 0.5 + 0.3 * (colour - 0.5)
    turned = changed(middle, hue=0.1)
    assert (turned - middle).abs().max() > 0.01
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None, None]
    torch.testing.assert_close((weights * turned).sum(0), (weights * middle).sum(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(changed(middle, hue=1.0), middle, atol=1e-4, rtol=0)


def test_colour_changes_leave_grey_in_colour_grey():
    image = torch.rand(1, 1, 8, 8).expand(3, -1, -1, -1)
    made = changed(image, saturation=1.3, hue=0.2, brightness=0.9)
    torch.testing.assert_close(made, (0.9 * image), atol=1e-3, rtol=0)


def test_noise_leaves_grey_in_colour_grey():
    image = torch.full((3, 1, 16, 16), 0.5)
    made = changed(image, noise=0.2)
    assert made.std() > 0.1
    assert torch.equal(made, made[:1].expand(3, -1, -1, -1))


def test_stains_are_made_stronger_one_by_one(colour):
    pixels = colour[:, 0].permute(1, 2, 0).numpy()
    stains = rgb2hed(pixels)
    made = changed(colour, stain=[1.2, 0.9, 1.0])[:, 0].permute(1, 2, 0)
    # scikit-image sets stains below zero to zero; where there are none, it is the same.
    whole = np.abs(hed2rgb(stains) - pixels).max(-1) < 1e-3
    expected = hed2rgb(stains * [1.2, 0.9, 1.0])
    assert whole.sum() > 20
    assert np.abs(made.numpy() - expected)[whole].mean() < 0.02


def test_what_is_not_changed_stays_as_it_is(grey, colour):
    for image in (grey, colour):
        assert torch.equal(changed(image), image)


# What is drawn


def test_changes_come_with_the_stated_probability_and_strength():
    policy = Policy(
        brightness=(0.3, 0.2), contrast=(0.4, 0.1), saturation=(0.5, 0.3), hue=(0.6, 0.05), grey=0.2, stain=(0.7, 0.15),
        gamma=(0.2, 1.5), blur=(0.5, 2.0), low_resolution=(0.1, 3.0), noise=(0.9, 0.04), solarise=0.25,
    )  # fmt: skip
    drawn = draw_changes(chances([policy] * 4000), torch.arange(4000))
    limits = {
        "brightness": (0.3, 0.8, 1.2, 1), "contrast": (0.4, 0.9, 1.1, 1), "hue": (0.6, -0.05, 0.05, 0),
        "gamma": (0.2, 1 / 1.5, 1.5, 1), "blur": (0.5, 0.1, 2.0, 0), "pixel": (0.1, 1.0, 3.0, 1),
        "noise": (0.9, 0.0, 0.04, 0),
    }  # fmt: skip
    for name, (probability, low, high, still) in limits.items():
        values = getattr(drawn, name)
        of = values[values != still]
        assert len(of) / 4000 == pytest.approx(probability, abs=0.03), name
        assert low <= of.min() < low + 0.1 * (high - low), name
        assert high - 0.1 * (high - low) < of.max() <= high + 1e-6, name
    assert (drawn.saturation == 0).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert ((drawn.stain != 1).all(1)).float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert drawn.solarise.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert drawn.inverted.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(drawn.inverted, drawn.solarise)[0, 1]) < 0.06
    assert np.abs(np.corrcoef(drawn.stain[(drawn.stain != 1).all(1)].T) - np.eye(3)).max() < 0.06


def test_an_image_gets_the_same_views_in_any_batch():
    image, keys = torch.rand(5, 3, 1, 40, 40), torch.arange(5) + 7
    names = ["pathology", "ct", "fundus", "xray", "mri"]
    view = RandomResizedCrop((16, 16), policy=with_chances(POLICIES, blur=0.7, noise=0.7, contrast=0.9))
    together = view({"image": image.clone(), "key": keys, "modality": names}, CPU)["image"]
    for n in range(5):
        alone = view({"image": image[n : n + 1].clone(), "key": keys[n : n + 1], "modality": names[n : n + 1]}, CPU)
        torch.testing.assert_close(alone["image"][0], together[n])


def test_what_is_drawn_can_be_done_again():
    image = torch.rand(4, 3, 1, 40, 40)
    view = RandomResizedCrop((16, 16), policy=NATURAL)
    drawn = view.draw(image)
    assert torch.equal(view.apply(image, drawn), view.apply(image, drawn))


def test_making_views_leaves_the_images_as_they_were():
    image = torch.rand(4, 3, 1, 16, 16)
    before = image.clone()
    RandomResizedCrop((16, 16), policy=NATURAL)({"image": image}, CPU)
    MultiCrop([RandomResizedCrop((16, 16), policy=NATURAL)] * 2)({"image": image}, CPU)
    assert torch.equal(image, before)


# Policies


def test_each_modality_has_a_policy():
    assert set(POLICIES) == set(modalities.__all__)


def test_no_chest_is_mirrored_or_stood_on_its_head():
    xray = POLICIES["xray"]
    assert xray.flip == xray.vertical_flip == 0
    assert xray.rotation <= 15


@pytest.mark.parametrize(
    "name", sorted(set(POLICIES) - {"pathology", "microscopy", "fundus", "dermoscopy", "endoscopy"})
)
def test_grey_modalities_have_no_colour_to_change(name):
    policy = POLICIES[name]
    assert policy.saturation[0] == policy.hue[0] == policy.stain[0] == policy.grey == 0


def test_geometric_policies_keep_every_number():
    image = torch.full((6, 1, 1, 20, 20), 0.37)
    view = RandomResizedCrop((8, 8), policy=geometric(), mean=0, std=1)
    made = view({"image": image, "modality": ["ct", "mri", "xray", "fundus", "pathology", "oct"]}, CPU)["image"]
    torch.testing.assert_close(made, torch.full_like(made, 0.37))


@pytest.mark.parametrize("modality", [None, ["ct", "thermography"]])
def test_a_modality_without_policy_is_refused(modality):
    with pytest.raises(InputError, match=r"need a batch with \"modality\"|no policy for thermography"):
        RandomResizedCrop((8, 8), policy=POLICIES).draw(torch.zeros(2, 1, 1, 8, 8), modality=modality)


def test_a_chance_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="no change sharpness"):
        with_chances(POLICIES, sharpness=1.0)


# Several views


@pytest.mark.parametrize(
    ("size", "small", "image"), [((16, 16), (8, 8), (1, 24, 24)), ((8, 16, 16), (4, 8, 8), (12, 24, 24))]
)
def test_several_views_are_cut_from_each_image(size, small, image):
    view = MultiCrop([RandomResizedCrop(size)] * 2, RandomResizedCrop(small, scale=(0.05, 0.3)), num_local=3)
    batch = view({"image": torch.rand(2, 1, *image).half(), "key": torch.arange(2), "modality": ["ct"] * 2}, CPU)
    assert batch["global_crops"].shape == (2, 2, 1, *size)
    assert batch["local_crops"].shape == (3, 2, 1, *small)
    assert "image" not in batch
    assert batch["modality"] == ["ct"] * 2
    views = [*batch["global_crops"]]
    assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize(
    ("size", "small", "image"), [((16, 16), (8, 8), (1, 24, 24)), ((8, 16, 16), (4, 8, 8), (12, 24, 24))]
)
@pytest.mark.parametrize("at_once", [1, 2**20])
def test_several_views_are_those_that_are_made_one_by_one(size, small, image, at_once, monkeypatch):
    images, keys, names = torch.rand(3, 3, *image), torch.arange(3), ["pathology", "ct", "mri"]
    large, local = (
        RandomResizedCrop(size, policy=POLICIES),
        RandomResizedCrop(small, scale=(0.05, 0.3), policy=POLICIES),
    )
    alone = [
        view({"image": images, "key": forked(keys, number), "modality": names}, CPU)["image"]
        for number, view in enumerate([large] * 2 + [local] * 3)
    ]
    monkeypatch.setattr(views, "_AT_ONCE", at_once)
    batch = MultiCrop([large] * 2, local, num_local=3)({"image": images, "key": keys, "modality": names}, CPU)
    torch.testing.assert_close([*batch["global_crops"], *batch["local_crops"]], alone)


@pytest.mark.parametrize("size", [(16, 16), (16, 96), (8, 16, 16), (8, 16, 96)])
def test_what_a_turned_view_shows_beyond_the_source_is_its_mirror_image(size):
    depth = 1 if len(size) == 2 else 12
    image = torch.rand(4, 1, depth, 24, size[-1] * 3 // 2)
    view = RandomResizedCrop(size, scale=(0.8, 1.0), policy=Policy(rotation=180.0), mean=0, std=1)
    drawn = view.draw(image, keys=torch.arange(4))
    assert (drawn.maps[:, :, :-1].abs().sum(2) + drawn.maps[:, :, -1].abs()).max() > 1.1
    grid = F.affine_grid(drawn.maps, [4, 1, *size], align_corners=False)
    source = image[:, :, 0] if len(size) == 2 else image
    expected = F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(view.apply(image, drawn), expected, rtol=1e-4, atol=1e-4)


def test_views_of_thick_slices_have_fewer_slices_and_small_ones_too():
    view = MultiCrop([RandomResizedCrop((16, 16, 16))] * 2, RandomResizedCrop((8, 8, 8)), num_local=2)
    batch = view({"image": torch.rand(2, 1, 4, 16, 16), "anisotropy": torch.tensor([2, 2])}, CPU)
    assert batch["global_crops"].shape == (2, 2, 1, 4, 16, 16)
    assert batch["local_crops"].shape == (2, 2, 1, 2, 8, 8)


def test_a_batch_without_a_degree_of_anisotropy_is_of_degree_0_and_one_of_several_is_refused():
    view, image = RandomResizedCrop((8, 8, 8)), torch.rand(2, 1, 8, 16, 16)
    assert view({"image": image, "anisotropy": None}, CPU)["image"].shape == (2, 1, 8, 8, 8)
    with pytest.raises(InputError, match=r"degrees of anisotropy \[0, 1\]\. Put one degree into a batch"):
        view({"image": image, "anisotropy": torch.tensor([0, 1])}, CPU)


def test_depth_has_a_share_of_its_own():
    view = RandomResizedCrop((8, 8, 8), scale=(0.25, 0.25), depth_scale=(0.5, 0.75))
    maps = view.draw(torch.zeros(300, 1, 8, 8, 8)).maps.abs()
    torch.testing.assert_close(maps[:, :2, :2].diagonal(dim1=1, dim2=2), torch.full((300, 2), 0.5))
    assert 0.5 - 1e-6 <= maps[:, 2, 2].min() < 0.51
    assert 0.74 < maps[:, 2, 2].max() <= 0.75 + 1e-6


@pytest.mark.parametrize("size", [(4, 16, 16), (16, 16, 16), (64, 16, 16)])
def test_the_plane_of_a_view_with_a_depth_of_its_own_does_not_depend_on_how_deep_the_image_is(size):
    view, image = RandomResizedCrop((8, 8, 8), (1, 1), depth_scale=(1, 1)), torch.zeros(1, 1, *size)
    for drawn in (view.draw(image), view.still(image)):
        torch.testing.assert_close(drawn.maps[:, :, :3].abs(), torch.eye(3)[None])


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: RandomResizedCrop((0, 8)), "img_size (0, 8) must be 1 or more"),
        (lambda: RandomResizedCrop((8, 8), scale=(0, 1)), "scale (0, 1) must be above 0, and at most 1"),
        (lambda: RandomResizedCrop((8, 8), scale=(1.0, 0.3)), "scale (1.0, 0.3) must be two numbers, the lower one"),
        (lambda: RandomResizedCrop((8, 8), scale=(0.3, 2.0)), "scale (0.3, 2.0) must be above 0, and at most 1"),
        (lambda: RandomResizedCrop((8, 8), ratio=(-1, 1)), "ratio (-1, 1) must be above 0"),
        (lambda: RandomResizedCrop((8, 8), std=0), "std 0 must be above 0"),
        (lambda: RandomResizedCrop((8, 8, 8), depth_scale=(0.5, 1.5)), "depth_scale (0.5, 1.5) must be above 0"),
        (lambda: MultiCrop([RandomResizedCrop((8, 8))], RandomResizedCrop((4, 4)), -1), "num_local -1 must be 0 or"),
        (lambda: Policy(flip=1.5), "flip 1.5 must be 0 or more, and at most 1"),
        (lambda: Policy(rotation=-5), "rotation -5 must be 0 or more"),
        (lambda: Policy(blur=(2.0, 1.0)), "blur 2.0 must be 0 or more, and at most 1"),
        (lambda: Policy(noise=(0.5, -1.0)), "the size of noise -1.0 must be 0.0 or more"),
        (lambda: Policy(gamma=(0.5, 0.0)), "the size of gamma 0.0 must be 1.0 or more"),
        (lambda: RandomResizedCrop((8.5, 8)), "img_size (8.5, 8) must be a whole number, 1 or more"),
        (lambda: RandomResizedCrop(8), "img_size 8 must be two or three numbers"),
        (lambda: Policy(gamma=0.5), "gamma 0.5 must be a probability and a size"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_with_their_rule(make, rule):
    with pytest.raises(InputError, match=f"^{re.escape(rule)}"):
        make()


def test_a_policy_may_come_as_the_lists_of_a_configuration():
    assert Policy(blur=[0.5, 1.0]) == Policy(blur=(0.5, 1.0))


def test_views_larger_than_the_images_are_interpolated():
    ramp = torch.linspace(0, 1, 40).expand(1, 1, 1, 40, 40)
    view = RandomResizedCrop((96, 96), mean=0.0, std=1.0).still_view(ramp)
    expected = torch.nn.functional.interpolate(ramp[:, :, 0], (96, 96), mode="bilinear")
    torch.testing.assert_close(view, expected)


@pytest.mark.parametrize("views", [[], [RandomResizedCrop((8, 8)), RandomResizedCrop((8, 16))]])
def test_large_views_of_no_or_several_sizes_are_refused(views):
    with pytest.raises(InputError, match="must be one or more, of one size"):
        MultiCrop(views)


@pytest.mark.parametrize(("large", "small"), [((8, 16, 16), (8, 8)), ((16, 16), (8, 8, 8))])
def test_small_views_of_other_axes_than_the_large_ones_are_refused(large, small):
    rule = f"local_view of size {list(small)} must have as many axes as global_views, which are {list(large)}. Correct"
    with pytest.raises(InputError, match=re.escape(rule)):
        MultiCrop([RandomResizedCrop(large)], RandomResizedCrop(small))


def test_eight_bits_are_shown_as_their_share_of_255():
    image = torch.randint(0, 256, (2, 3, 1, 20, 20), dtype=torch.uint8)
    for view in (RandomResizedCrop((8, 8)), MultiCrop([RandomResizedCrop((8, 8))] * 2)):
        made, expected = (view({"image": one, "key": torch.arange(2)}, CPU) for one in (image, (image / 255).half()))
        name = "image" if "image" in made else "global_crops"
        assert torch.equal(made[name], expected[name])


def test_ranges_may_be_of_any_kind_of_number():
    given = RandomResizedCrop(np.array([8, 8]), scale=np.array([0.2, 1.0]), ratio=(np.float32(0.75), np.float64(1.5)))
    assert given({"image": torch.zeros(1, 1, 1, 8, 8)}, CPU)["image"].shape == (1, 1, 8, 8)
