"""Positions, patches, masks and the ViT."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import biovfm_monai
from biovfm_monai.draws import Use, random_keys, uniform
from biovfm_monai.errors import InputError
from biovfm_monai.networks import (
    Embedder,
    PatchEmbed,
    ViT,
    patchify,
    random_mask,
    sincos_positions,
    take_tokens,
    unpatchify,
    vit_base,
    vit_huge,
    vit_large,
    vit_small,
    vit_tiny,
)
from biovfm_monai.networks.blocks import _attend


def tiny(size=(32, 32), patch=8, channels=1, **options):
    return ViT(channels, size, patch, embed_dim=24, depth=2, num_heads=3, **options)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [(vit_tiny, 5.52), (vit_small, 21.67), (vit_base, 85.80), (vit_large, 303.30), (vit_huge, 630.76)],
)
def test_presets_have_the_published_parameter_counts(preset, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in preset(pos_embed="learn").parameters())
    assert round(count / 1e6, 2) == millions


@settings(deadline=None, max_examples=25)
@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 3))
def test_unpatchify_inverts_patchify(grid, patch, channels):
    image = torch.randn(2, channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    patches = patchify(image, patch)
    assert patches.shape == (2, grid[0] * grid[1] * grid[2], patch[0] * patch[1] * patch[2] * channels)
    assert torch.equal(unpatchify(patches, patch, grid), image)


def test_a_patch_holds_the_voxels_of_its_place():
    image = torch.arange(2 * 4 * 6.0).view(1, 1, 2, 4, 6)
    assert torch.equal(patchify(image, (2, 2, 3))[0, 1], image[0, 0, :, 0:2, 3:6].flatten())


@pytest.mark.parametrize("anisotropy", range(6))
def test_the_collapsed_kernel_equals_the_full_kernel_on_repeated_slices(anisotropy):
    embed = PatchEmbed(2, (16, 4, 4), 8)
    depth = embed.stride(anisotropy)[0]
    assert depth == [16, 8, 4, 2, 1, 1][anisotropy]
    thick = torch.randn(1, 2, depth, 4, 4)
    full = embed(patchify(thick.repeat_interleave(16 // depth, dim=2), (16, 4, 4)))
    collapsed = embed(patchify(thick, (depth, 4, 4)), anisotropy)
    torch.testing.assert_close(collapsed, full, rtol=1e-5, atol=1e-5)


def test_positions_in_2d_equal_the_formula_of_the_mae_paper():
    table = sincos_positions((1, 3, 5), 16, 2).view(3, 5, 16)
    for y in range(3):
        for x in range(5):
            angles = [position / 10000 ** (i / 4) for position in (x, y) for i in range(4)]
            expected = torch.tensor(angles, dtype=torch.float64).view(2, 4)
            expected = torch.cat([expected.sin(), expected.cos()], dim=1).flatten().float()
            torch.testing.assert_close(table[y, x], expected)


@pytest.mark.parametrize("width", [1024, 384, 26])
def test_positions_in_3d_take_any_even_width_and_are_distinct(width):
    table = sincos_positions((3, 4, 5), width, 3)
    assert table.shape == (60, width)
    assert torch.pdist(table).min() > 1e-3


def test_positions_refuse_an_odd_width():
    with pytest.raises(ValueError, match="even"):
        sincos_positions((1, 2, 2), 7, 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 300), st.integers(1, 99))
def test_a_mask_hides_exactly_its_share_and_no_token_is_lost(tokens, percent):
    keep, hidden = random_mask(random_keys(3), tokens, percent / 100)
    assert keep.shape[1] == min(max(tokens * (100 - percent) // 100, 1), tokens - 1)
    everything = torch.cat([keep, hidden], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(tokens).expand(3, -1))


def test_masks_of_one_batch_differ_and_follow_their_generator():
    draw = lambda: random_mask(torch.tensor([1, 2]), 64, 0.75)[0]  # noqa: E731
    keep = draw()
    assert torch.equal(keep, draw())
    assert not torch.equal(keep[0], keep[1])


def test_every_token_is_masked_equally_often():
    hidden = random_mask(random_keys(4000), 10, 0.7)[1]
    share = torch.bincount(hidden.flatten(), minlength=10) / 4000
    assert (share - 0.7).abs().max() < 0.04


@pytest.mark.parametrize(("tokens", "ratio"), [(1, 0.5), (4, 0.0), (4, 1.0)])
def test_masking_refuses_what_leaves_nothing_to_do(tokens, ratio):
    with pytest.raises(InputError, match=r"there is 1\. Give|mask_ratio .* must be"):
        random_mask(random_keys(1), tokens, ratio)


def test_take_tokens_equals_indexing():
    tokens, index = torch.randn(3, 7, 2), torch.randint(7, (3, 4))
    assert torch.equal(take_tokens(tokens, index), torch.stack([t[i] for t, i in zip(tokens, index, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_a_loop_over_heads_in_double_precision(dtype):
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    expected = [
        (qh @ kh.T / 8**0.5).softmax(-1) @ vh
        for qh, kh, vh in zip(q.double().flatten(0, 1), k.double().flatten(0, 1), v.double().flatten(0, 1), strict=True)
    ]
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(
        _attend(q, k, v).double(), torch.stack(expected).view(2, 3, 9, 8), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("size", [(32, 32), (16, 32, 32)])
def test_encoding_only_the_kept_tokens_equals_encoding_them_alone_in_full(size):
    encoder, image = tiny(size), torch.randn(2, 1, *size)
    tokens = torch.tensor(size).div(8).prod().item()
    everything = torch.arange(int(tokens)).expand(2, -1)
    torch.testing.assert_close(encoder(image, keep=everything), encoder(image))
    keep = everything[:, 1::3]
    patches = patchify(*(image[:, :, None], (1, 8, 8)) if len(size) == 2 else (image, (8, 8, 8)))
    x = encoder.patch_embed(patches) + sincos_positions((size[0] // 8 if len(size) == 3 else 1, 4, 4), 24, len(size))
    x = torch.cat([encoder.cls_token.expand(2, -1, -1), x[:, 1::3]], dim=1)
    for block in encoder.blocks:
        x = block(x)
    torch.testing.assert_close(encoder(image, keep=keep), encoder.norm(x))


def test_the_projection_equals_a_convolution():
    encoder, image = tiny(channels=3), torch.randn(2, 3, 32, 32)
    kernel = encoder.patch_embed.weight.view(24, 8, 8, 3).permute(0, 3, 1, 2)
    expected = F.conv2d(image, kernel, encoder.patch_embed.bias, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        encoder.patch_embed(patchify(image[:, :, None], (1, 8, 8))), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pos_embed", ["sincos", "learn"])
@pytest.mark.parametrize(("size", "used"), [((32, 32), (24, 48)), ((16, 32, 32), (8, 40, 24))])
def test_any_size_that_divides_by_the_patch_is_encoded(pos_embed, size, used):
    encoder = tiny(size, pos_embed=pos_embed)
    tokens = torch.tensor(used).div(8, rounding_mode="floor").prod()
    assert encoder(torch.randn(2, 1, *used)).shape == (2, 1 + tokens, 24)


def test_a_2d_image_is_read_as_a_volume_of_depth_one():
    encoder, image = tiny((16, 32, 32)), torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(encoder(image), encoder(image[:, :, None], anisotropy=5))


@pytest.mark.parametrize("size", [(32, 32), (16, 32, 32)])
@pytest.mark.parametrize("pos_embed", ["sincos", "learn"])
def test_every_parameter_of_the_encoder_gets_a_gradient(size, pos_embed):
    encoder = tiny(size, pos_embed=pos_embed)
    (encoder(torch.randn(2, 1, *size)) * torch.randn(24)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("image", "message"),
    [((1, 2, 32, 32), "1 channel"), ((1, 32, 32), "axes"), ((1, 1, 30, 32), "multiple of the patch")],
)
def test_a_wrong_image_is_refused_with_the_reason(image, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.randn(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (30, 32)}, "multiples of patch_size"),
        ({"img_size": (32,)}, "multiples of patch_size"),
        ({"num_heads": 5}, "divide embed_dim"),
        ({"pos_embed": "rotary"}, "pos_embed"),
    ],
)
def test_a_wrong_construction_is_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=message):
        ViT(
            **{
                "in_channels": 1,
                "img_size": (32, 32),
                "patch_size": 8,
                "embed_dim": 24,
                "depth": 1,
                "num_heads": 3,
                **options,
            }
        )


def test_the_embedding_of_a_volume_by_a_2d_encoder_is_the_mean_over_its_slices():
    network, volume = Embedder(tiny()).eval(), torch.randn(2, 1, 3, 32, 32)
    expected = torch.stack([network(volume[:, :, i]) for i in range(3)]).mean(0)
    torch.testing.assert_close(network(volume), expected)


@pytest.mark.parametrize(
    ("global_pool", "expected"),
    [("avg", lambda t: t[:, 3:].mean(1)), ("max", lambda t: t[:, 3:].amax(1)), ("token", lambda t: t[:, 0])],
)
def test_the_embedder_pools_as_its_encoder_says(global_pool, expected):
    encoder, image = tiny(reg_tokens=2, global_pool=global_pool).eval(), torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(Embedder(encoder)(image), expected(encoder(image)))


def test_pooling_by_a_class_token_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="needs class_token"):
        tiny(class_token=False, global_pool="token")


def test_the_embedder_can_be_scripted_by_tracing():
    network, image = Embedder(tiny()).eval(), torch.randn(1, 1, 32, 32)
    traced = torch.jit.trace(network, image)
    torch.testing.assert_close(traced(image), network(image))


def splitmix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniform_numbers_are_those_of_splitmix_in_whole_numbers_of_any_size():
    keys, golden = [0, 1, 2**62 - 1, 123456789], 0x9E3779B97F4A7C15
    expected = [
        [(splitmix((splitmix((key + 3 * golden) % 2**64) + n * golden) % 2**64) >> 40) / 2**24 for n in range(1, 6)]
        for key in keys
    ]
    assert uniform(torch.tensor(keys), 5, Use.CHANGE).tolist() == expected


def test_uniform_numbers_of_neighbouring_keys_and_uses_have_nothing_in_common():
    keys = torch.arange(4000)
    drawn = torch.cat([uniform(keys, 3, Use.VIEW), uniform(keys, 3, Use.MASK)], dim=1)
    assert 0 <= drawn.min() <= drawn.max() < 1
    torch.testing.assert_close(drawn.mean(0), torch.full((6,), 0.5), rtol=0, atol=0.02)
    both = torch.cat([drawn[1:], drawn[:-1]], dim=1)
    assert (torch.corrcoef(both.T) - torch.eye(12)).abs().max() < 0.06


@pytest.mark.parametrize("use", list(Use))
def test_no_two_places_of_the_code_take_the_same_random_numbers(use):
    sources = [path.read_text() for path in Path(biovfm_monai.__file__).parent.rglob("*.py")]
    assert sum(len(re.findall(rf"\bUse\.{use.name}\b", source)) for source in sources) == 1
