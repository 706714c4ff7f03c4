"""What adapts to the spacing of slices: the degree of anisotropy, convolutions, resampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from biovfm_monai.errors import InputError
from biovfm_monai.networks import (
    AdaptiveConv3d,
    AdaptiveConvTranspose3d,
    PatchEmbed,
    adaptive_downsample,
    adaptive_upsample,
    anisotropy_of,
    draw_anisotropy,
    halved,
    pending,
    spacing_of,
)


@pytest.mark.parametrize(
    ("depth", "degree"),
    [(0.3, 0), (1.0, 0), (1.99, 0), (1.9999, 1), (2.0, 1), (3.99, 1), (5.0, 2), (8.0, 3), (16.0, 4), (1e8, 5)],
)
@pytest.mark.parametrize("plane", [1.0, 0.25])
def test_the_degree_counts_doublings_from_the_plane_to_the_slices(depth, degree, plane):
    assert anisotropy_of((depth * plane, plane, plane)) == degree


def test_the_finer_side_of_a_pixel_counts_and_an_image_without_depth_is_2d():
    assert anisotropy_of((2.1, 1.4, 1.0)) == 1
    assert anisotropy_of((0.5, 0.5)) == 5


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ((0.0, 1.0, 1.0), "must be two or three positive numbers"),
        ((1.0, math.nan, 1.0), "must be two or three positive numbers"),
        ((1.0, math.inf, 1.0), "must be two or three positive numbers"),
        ((-1.0, 1.0, 1.0), "must be two or three positive numbers"),
        ((1.0,), "must be two or three positive numbers"),
        ((5.0, 1.0, 2.0), r"1\.0 mm high and 2\.0 mm wide\. Resample"),
    ],
)
def test_a_spacing_that_means_nothing_is_refused(spacing, message):
    with pytest.raises(InputError, match=message):
        anisotropy_of(spacing)


def test_a_drawn_degree_is_either_neighbour_in_proportion_to_its_nearness():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_anisotropy((2**1.3, 1, 1), generator) for _ in range(2000)]
    assert set(drawn) == {1, 2}
    assert sum(drawn) / 2000 == pytest.approx(1.3, abs=0.04)
    assert {draw_anisotropy((1, 1, 1), generator) for _ in range(100)} == {0}
    assert {draw_anisotropy((1, 1), generator) for _ in range(100)} == {5}


def test_spacing_comes_from_the_affine_of_a_metatensor_and_from_nothing_else():
    affine = torch.tensor([[0, 0, 0.7, 1], [0, 0.7, 0, 2], [-5.0, 0, 0, 3], [0, 0, 0, 1]])
    image = MetaTensor(torch.zeros(1, 4, 8, 8), affine=affine)
    assert spacing_of(image) == pytest.approx((5.0, 0.7, 0.7))
    assert spacing_of(torch.zeros(1, 4, 8, 8)) is None


def test_images_of_different_spacing_make_no_batch():
    batch = MetaTensor(torch.zeros(2, 1, 4, 8, 8), affine=torch.stack([torch.eye(4), torch.eye(4) * 2]))
    batch.is_batch = True
    with pytest.raises(InputError, match="images of one spacing"):
        spacing_of(batch)


# Depth stride and grid of PUMIT's shape table, tokenizer crop (4, 8) and encoder crop (5, 10) in tokens of 16 pixels.
TABLE = [(0, 16), (1, 8), (2, 4), (3, 2), (4, 1), (5, 1)]


@pytest.mark.parametrize(("anisotropy", "depth"), TABLE)
def test_the_shape_table_of_the_paper_holds(anisotropy, depth):
    tokens = 1 if anisotropy == 5 else 4
    stem = [AdaptiveConv3d(1, 2, 4, 4), AdaptiveConv3d(2, 2, 2, 2), AdaptiveConv3d(2, 2, 2, 2), AdaptiveConv3d(2, 2, 3)]
    x, n = torch.zeros(1, 1, tokens * depth, 128, 128), 0
    for layer, halvings in zip(stem, (2, 1, 1, 0), strict=True):
        x = layer(x, pending(anisotropy, n))
        n += halvings
    assert x.shape[2:] == (tokens, 8, 8)
    assert PatchEmbed(1, (16, 16, 16), 8).stride(anisotropy) == (depth, 16, 16)
    ups = [AdaptiveConvTranspose3d(2, 2, 2), AdaptiveConvTranspose3d(2, 2, 2), AdaptiveConvTranspose3d(2, 1, 4)]
    for layer, halvings in zip(ups, (1, 1, 2), strict=True):
        x = layer(x, halved(anisotropy, n))
        n -= halvings
    assert x.shape[2:] == (tokens * depth, 128, 128)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 5), st.booleans())
def test_a_collapsed_convolution_equals_the_full_one_on_the_slices_repeated(stride, pending, bias):
    conv = AdaptiveConv3d(2, 3, stride, stride, bias)
    depth = max(stride >> pending, 1)
    x = torch.randn(1, 2, 2 * depth, 8, 8)
    full = conv(x.repeat_interleave(stride // depth, dim=2))
    torch.testing.assert_close(conv(x, pending), full, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_three_acts_in_the_plane_while_pending_and_in_space_after():
    conv = AdaptiveConv3d(1, 1, 3)
    impulse = torch.zeros(1, 1, 5, 5, 5)
    impulse[0, 0, 2, 2, 2] = 1
    for pending_now, slices in ((1, 1), (0, 3)):
        assert (conv(impulse, pending_now) != 0).sum() == 9 * slices


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_gradient_in_bf16_is_that_in_float32_to_its_precision(depth):
    convolution, x = AdaptiveConv3d(16, 16, 3), torch.randn(4, 16, depth, 4, 4)
    target = torch.randn(4, 16, depth, 4, 4)
    found = []
    for enabled in (False, True):
        # What is freed here is what memory never written would show.
        freed = [torch.full((16 * 16 * 27,), math.nan) for _ in range(50)]
        freed.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = (convolution(x) * target).sum()
        found.append(torch.autograd.grad(loss, convolution.weight)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.3)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 4))
def test_a_collapsed_transposed_convolution_gives_the_mean_of_the_full_ones_slices(stride, halved):
    conv = AdaptiveConvTranspose3d(2, 3, stride)
    depth = min(1 << halved, stride)
    x = torch.randn(1, 2, 2, 3, 3)
    full = conv(x, 10)
    expected = full.unflatten(2, (2 * depth, stride // depth)).mean(3)
    torch.testing.assert_close(conv(x, halved), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("anisotropy", "halvings"), [(0, 1), (2, 1), (5, 4), (1, 3)])
def test_resampling_down_and_up_keeps_the_shape_and_a_constant(anisotropy, halvings):
    x = torch.full((1, 2, 4, 8, 8), 3.0)
    down = adaptive_downsample(x, pending(anisotropy, halvings - 1))
    assert down.shape[2:] == ((2, 4, 4) if halvings > anisotropy else (4, 4, 4))
    torch.testing.assert_close(adaptive_upsample(down, halved(anisotropy, halvings)), x)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 4), (5, 1), (1, 2), (3, 3)])
def test_kernels_that_cannot_collapse_are_refused(kernel, stride):
    with pytest.raises(ValueError, match="power of two"):
        AdaptiveConv3d(1, 1, kernel, stride)
