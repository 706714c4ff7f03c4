"""The ViT's options, its rotary positions, its features, and images of several kinds through one set of weights."""

import copy
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch.nn import functional as F

from biovfm_monai.errors import InputError
from biovfm_monai.networks import (
    Attention,
    DropPath,
    ViT,
    blocks,
    encode_packed,
    interpolate_grid,
    rotary_angles,
    rotate,
    spad_vit_base,
    spad_vit_large,
)

OPTIONS = {
    "registers": {"reg_tokens": 4},
    "layer scale": {"init_values": 0.5},
    "drop path": {"drop_path_rate": 0.5},
    "swiglu": {"swiglu_mlp": True},
    "swiglu with inner norm": {"swiglu_mlp": True, "scale_mlp": True},
    "no bias": {"qkv_bias": False},
    "no key bias": {"k_bias": False},
    "qk-norm": {"qk_norm": True},
    "no final norm": {"final_norm": False},
    "no class token": {"class_token": False},
    "learned grid": {"pos_embed": "learn"},
    "learned grid with the class token's place": {"pos_embed": "learn", "no_embed_class": False},
    "rope": {"pos_embed": "none", "rope": "index"},
    "rope in mm": {"pos_embed": "none", "rope": "mm"},
    "normalised rope": {"pos_embed": "none", "rope": "normalised", "reg_tokens": 2},
    "rope of a reference": {"rope": "index", "ref_feat_shape": (2, 2)},
    "spad": {"swiglu_mlp": True, "scale_mlp": True, "k_bias": False, "pos_embed": "learn", "rope": "index"},
}  # fmt: skip


def tiny(size=(16, 32, 32), patch=8, channels=1, **options):
    torch.manual_seed(0)
    return ViT(channels, size, patch, **{"embed_dim": 24, "depth": 2, "num_heads": 3, **options})


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def options(request):
    return request.param


def test_every_parameter_has_a_gradient_with_every_option(options):
    encoder = tiny(**options)
    encoder(torch.randn(2, 1, 16, 32, 32)).square().mean().backward()
    # Without an added term a key's bias moves no softmax, so only its gradient's existence is asked for.
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_prefix_tokens_come_first_and_are_counted(options):
    encoder = tiny(**options)
    assert encoder(torch.randn(2, 1, 16, 32, 32)).shape == (2, encoder.num_prefix_tokens + 32, 24)


def test_an_encoder_with_any_option_is_rebuilt_from_its_arguments(options):
    encoder = tiny(**options).eval()
    again = ViT(**encoder.arguments).eval()
    again.load_state_dict(encoder.state_dict())
    image = torch.randn(1, 1, 16, 32, 32)
    assert torch.equal(again(image), encoder(image))


def test_keeping_all_tokens_in_another_order_permutes_the_output(options):
    encoder = tiny(**options).eval()
    image, order = torch.randn(2, 1, 16, 32, 32), torch.stack([torch.randperm(32), torch.randperm(32)])
    n = encoder.num_prefix_tokens
    whole, shuffled = encoder(image), encoder(image, keep=order)
    expected = torch.stack([tokens[n:][index] for tokens, index in zip(whole, order, strict=True)])
    torch.testing.assert_close(shuffled[:, n:], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled[:, :n], whole[:, :n], rtol=1e-4, atol=1e-5)


def test_a_photo_a_volume_of_one_slice_and_the_slice_repeated_give_the_same_tokens(options):
    encoder = tiny((16, 32, 32), 16, **options).eval()
    photo = torch.randn(2, 1, 32, 48)
    expected = encoder(photo)
    torch.testing.assert_close(encoder(photo[:, :, None], anisotropy=5), expected)
    for anisotropy, depth in enumerate((16, 8, 4, 2, 1)):
        repeated = photo[:, :, None].expand(-1, -1, depth, -1, -1)
        torch.testing.assert_close(encoder(repeated, anisotropy=anisotropy), expected, rtol=1e-4, atol=1e-4)


def test_the_spacing_of_an_image_sets_its_degree_of_anisotropy(options):
    encoder = tiny(**options).eval()
    image = torch.randn(1, 1, 4, 32, 32)
    expected = encoder(image, anisotropy=2, spacing=[4.5, 1.0, 1.0])
    torch.testing.assert_close(encoder(image, spacing=[4.5, 1.0, 1.0]), expected)
    affine = torch.diag(torch.tensor([4.5, 1.0, 1.0, 1.0])).double()
    tokens = encoder(MetaTensor(image, affine=affine))
    torch.testing.assert_close(tokens, expected)
    assert type(tokens) is torch.Tensor


def test_packed_images_of_several_sizes_equal_each_on_its_own(options):
    encoder = tiny(**options).eval()
    shapes = [(1, 1, 16, 32, 32), (1, 1, 40, 24), (2, 1, 24, 40), (1, 1, 4, 16, 48), (1, 1, 40, 24)]
    images, anisotropy = [torch.randn(shape) for shape in shapes], [0, None, None, 2, None]
    packed = encode_packed(encoder, images, anisotropy)
    for image, degree, tokens in zip(images, anisotropy, packed, strict=True):
        torch.testing.assert_close(tokens, encoder(image, degree), rtol=1e-5, atol=1e-5)


def one_kernel(q, k, v, ends_q, ends_k, longest_q, longest_k):
    """What `varlen_attn` of torch documents, slowly: T x heads x head_dim in and out, sequences at cumulative ends."""
    assert q.dtype == k.dtype == v.dtype
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert longest_q == longest_k == int(ends_q.diff().max())
    parts = []
    for a, b in pairwise(ends_q):
        rows = [x[a:b].transpose(0, 1) for x in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*rows).transpose(0, 1))
    return torch.cat(parts)


def test_packed_images_in_one_kernel_equal_each_on_its_own(options, monkeypatch):
    encoder = tiny(**options)
    images = [torch.randn(1, 1, 16, 32, 32), torch.randn(3, 1, 40, 24)]
    expected = [encoder.eval()(image) for image in images]
    weights = [torch.randn_like(tokens) for tokens in expected]

    def gradients(given):
        return torch.autograd.grad(
            sum((t * w).sum() for t, w in zip(given, weights, strict=True)), encoder.parameters()
        )

    calls = []
    monkeypatch.setattr(blocks, "_flash_takes", lambda v: True)
    monkeypatch.setattr(blocks, "varlen_attn", lambda *given: calls.append(given) or one_kernel(*given))
    packed = encode_packed(encoder, images)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(encoder.blocks)
    torch.testing.assert_close(gradients(packed), gradients(expected), rtol=1e-4, atol=1e-4)


def test_the_one_kernel_is_for_gpus():
    assert not blocks._flash_takes(torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16))


def test_the_one_kernel_of_torch_is_called_as_it_wants():
    q = torch.empty(1, 3, 20, 8, device="meta")
    v = torch.empty(1, 3, 20, 8, device="meta", dtype=torch.bfloat16)
    attended = blocks._flash_within(q, q, v, [12, 4, 4])
    assert (attended.shape, attended.dtype) == (v.shape, v.dtype)


def test_checkpointed_blocks_give_the_same_gradients(options):
    encoder = tiny(**{**options, "drop_path_rate": 0.0})
    again, image = copy.deepcopy(encoder), torch.randn(2, 1, 16, 32, 32)
    again.grad_checkpointing = True
    for one in (encoder, again):
        one(image).square().mean().backward()
    for a, b in zip(encoder.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_scripted_encoder_gives_the_same_tokens_of_volumes_thick_slices_and_photos(options):
    encoder = tiny(**options).eval()
    scripted = torch.jit.script(encoder)
    image = torch.randn(2, 1, 16, 32, 40)
    for arguments in ((image,), (image[:, :, :4], 2), (image[:, :, 0],)):
        torch.testing.assert_close(scripted(*arguments), encoder(*arguments), rtol=1e-5, atol=1e-5)


def test_an_encoder_is_one_graph_for_the_compiler(options):
    encoder = tiny(**options)
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    image = torch.randn(2, 1, 16, 32, 40)
    encoder.eval()
    thick, spacing = image[:, :, :4], [4.5, 1.0, 1.0]
    torch.testing.assert_close(compiled(thick, spacing=spacing), encoder(thick, 2, spacing=spacing))
    encoder.train()
    encoder.grad_checkpointing = True
    compiled(image).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("rope", ["none", "mm"])
def test_a_compiled_encoder_takes_one_spacing_after_another(rope):
    encoder = tiny(rope=rope, pos_embed="none").eval()
    torch.compiler.reset()
    compiled, image = torch.compile(encoder, fullgraph=True, backend="eager"), torch.randn(1, 1, 4, 16, 16)
    for depth in (4.0, 4.5, 5.5, 6.25, 7.0):
        spacing = [depth, 1.0, 1.0]
        torch.testing.assert_close(compiled(image, spacing=spacing), encoder(image, spacing=spacing))


def test_an_encoder_in_half_precision_gives_tokens_in_it(options):
    encoder = tiny(**options).eval().to(torch.bfloat16)
    tokens = encoder(torch.randn(1, 1, 16, 32, 32, dtype=torch.bfloat16))
    assert tokens.dtype == torch.bfloat16
    assert tokens.isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler does not quote its own path, which has a space")
def test_a_compiled_spatially_adaptive_encoder_has_the_same_tokens(run, tmp_path):
    code = """
import torch
from biovfm_monai.networks import spad_vit_tiny
encoder, image = spad_vit_tiny(1, (16, 32, 32), depth=1).eval(), torch.randn(2, 1, 4, 32, 32)
with torch.no_grad():
    tokens = torch.compile(encoder, fullgraph=True)(image, 2)
    torch.testing.assert_close(tokens, encoder(image, 2), rtol=1e-4, atol=1e-4)
"""
    # In a process of its own, since the compiler leaves files in the temporary folder that it starts with.
    result = run("-c", code, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_features_of_the_last_block_are_the_tokens_as_a_map(options):
    encoder = tiny(**options).eval()
    image = torch.randn(2, 1, 16, 32, 40)
    first, last = encoder.features(image, blocks=[0, -1])
    expected = encoder(image)[:, encoder.num_prefix_tokens :]
    assert first.shape == last.shape == (2, 24, 2, 4, 5)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), expected)
    assert not torch.allclose(first, last)


@pytest.mark.parametrize("blocks", [[], [2], [-3], [1, 0], [0, -2]])
def test_features_of_blocks_that_are_not_there_are_refused(blocks):
    with pytest.raises(InputError, match="ascending numbers of the encoder's 2 blocks"):
        tiny().features(torch.randn(1, 1, 16, 32, 32), blocks)


@pytest.mark.parametrize(("preset", "millions"), [(spad_vit_base, 96.3), (spad_vit_large, 317.6)])
def test_spad_presets_and_their_head_for_masked_image_modelling_have_the_published_size(preset, millions):
    with torch.device("meta"):
        encoder = preset()
    width = encoder.embed_dim
    head = (width + 1) * width + (width + 1) * 1024 + 2 * width
    count = sum(p.numel() for p in encoder.parameters())
    assert (count + head) / 1e6 == pytest.approx(millions, abs=0.1)


# Rotary positions


def test_rotary_angles_at_depth_zero_are_those_of_eva02_in_2d():
    angles = rotary_angles((3, 4, 5), 64, "index").view(3, 4, 5, 32)
    frequency = 10000 ** (-2 * torch.arange(16) / 32)
    for y in range(4):
        for x in range(5):
            torch.testing.assert_close(angles[0, y, x], torch.cat([y * frequency, x * frequency]), rtol=1e-5, atol=1e-6)


def test_rotary_angles_follow_the_formula_in_depth_and_no_two_places_share_them():
    angles = rotary_angles((5, 10, 10), 64, "index")
    depth = 2333 ** (-(2 * torch.arange(16) + 1) / 32)
    torch.testing.assert_close(angles.view(5, 10, 10, 32)[3, 0, 0], (3 * depth).repeat(2), rtol=1e-5, atol=1e-6)
    turned = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert torch.pdist(turned).min() > 1e-3


def test_normalised_angles_do_not_change_when_an_image_is_seen_finer_in_the_same_place():
    coarse, fine = rotary_angles((1, 1, 1), 16, "normalised"), rotary_angles((1, 3, 3), 16, "normalised")
    torch.testing.assert_close(fine.view(3, 3, 8)[1, 1], coarse[0])
    corner = rotary_angles((1, 2, 2), 16, "normalised")[0]
    expected = 2 * torch.pi * -0.5 * 100 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(corner, expected.repeat(2), rtol=1e-5, atol=1e-5)


def test_turned_queries_and_keys_meet_by_their_distance_only():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    angles = rotary_angles((4, 4, 4), 16, "index").view(4, 4, 4, 8)

    def meet(a, b):
        turned = [rotate(x, angles[p].cos(), angles[p].sin()) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(meet((0, 1, 2), (1, 1, 0)), meet((2, 2, 3), (3, 2, 1)), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(meet((0, 1, 2), (1, 1, 0)), meet((0, 1, 2), (0, 1, 0)))


def test_positions_in_mm_turn_by_the_distance_in_the_body():
    encoder = tiny(patch=(8, 8, 8), pos_embed="none", rope="mm")

    def angles(shape, spacing=None, anisotropy=None):
        patches = encoder.patchify(torch.zeros(1, 1, *shape), anisotropy, spacing)
        return encoder.embed(patches)[1][0, 1:].view(*patches.grid_size, 4)

    fine, thick = angles((32, 32, 32), [1.0, 1.0, 1.0]), angles((8, 32, 32), [4.0, 2.0, 2.0])
    torch.testing.assert_close(thick[1, 1, 1], fine[2, 2, 2])
    torch.testing.assert_close(angles((16, 32, 32), anisotropy=1), fine)


def test_rotary_positions_need_pairs_on_both_axes():
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_angles((1, 2, 2), 6, "index")


# Parts


def test_a_learned_grid_is_resampled_like_an_image():
    grid = torch.randn(1, 3, 1, 4, 4)
    expected = F.interpolate(grid[:, :, 0], size=(6, 7), mode="bicubic")
    torch.testing.assert_close(interpolate_grid(grid, (1, 6, 7))[:, :, 0], expected)
    deep = interpolate_grid(grid.expand(-1, -1, 2, -1, -1), (5, 4, 4))
    torch.testing.assert_close(deep, grid.expand(-1, -1, 5, -1, -1))


def test_a_grid_of_the_same_size_stays_bit_for_bit():
    grid = torch.randn(1, 3, 2, 4, 4)
    assert torch.equal(interpolate_grid(grid, (2, 4, 4)), grid)


@pytest.mark.parametrize("lengths", [None, [5, 2, 3]])
def test_drop_path_leaves_whole_images_out_and_keeps_the_mean(lengths):
    drop, x = DropPath(0.25), torch.ones(1 if lengths else 3, 10 if lengths else 4, 2)
    assert torch.equal(drop.eval()(x, lengths), x)
    drop.train()
    outcomes = [drop(x, lengths) for _ in range(2000)]
    assert torch.stack(outcomes).mean().item() == pytest.approx(1, abs=0.05)
    for outcome in outcomes[:50]:
        for part in outcome[0].split(lengths) if lengths else outcome:
            assert part.unique().tolist() in ([0.0], [pytest.approx(4 / 3)])


@pytest.mark.parametrize("rope", ["none", "index"])
@pytest.mark.parametrize("packed", [False, True])
def test_images_that_keep_a_branch_are_as_if_alone_and_it_is_left_out_as_often_as_stated(packed, rope):
    encoder = tiny(depth=1, rope=rope, final_norm=False)
    block = encoder.blocks[0]
    image = torch.randn(3, 1, 16, 32, 32)
    x, angles = encoder.embed(encoder.patchify(image))
    turn = None if angles is None else (angles.cos()[:, None], angles.sin()[:, None])
    with torch.no_grad():
        attended = block.attn(block.norm1(x), turn)
        possible = {}
        for a in (0, 4 / 3):
            middle = x + a * attended
            for m in (0, 4 / 3):
                possible[a, m] = middle + m * block.mlp(block.norm2(middle))
        lengths = [x.shape[1]] * 3 if packed else None
        if packed and turn is not None:
            turn = tuple(table.repeat(1, 1, 3, 1) for table in turn)
        block.drop_path.rate = 0.25
        seen = []
        for _ in range(400):
            made = block(x.flatten(0, 1)[None] if packed else x, turn, lengths).view_as(x)
            for n in range(3):
                seen.append(min(possible, key=lambda pair: (possible[pair][n] - made[n]).abs().max()))
                torch.testing.assert_close(made[n], possible[seen[-1]][n], rtol=1e-4, atol=1e-4)
    assert np.mean([[a > 0, m > 0] for a, m in seen], axis=0) == pytest.approx(0.75, abs=0.05)


def test_a_branch_left_out_for_all_images_has_gradients_of_zero():
    block = tiny(depth=1).blocks[0]
    block.drop_path.rate = 1 - 1e-9
    x = torch.randn(2, 5, 24)
    made = block(x)
    assert torch.equal(made, x)
    made.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_attention_without_key_bias_equals_one_whose_key_bias_is_zero():
    bare, full = Attention(12, 3, k_bias=False), Attention(12, 3)
    torch.nn.init.normal_(bare.qv_bias)
    full.load_state_dict({
        "qkv.weight": bare.qkv.weight, "proj.weight": bare.proj.weight, "proj.bias": bare.proj.bias,
        "qkv.bias": torch.cat([bare.qv_bias[0], torch.zeros(12), bare.qv_bias[1]]),
    })  # fmt: skip
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(bare(x), full(x))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"pos_embed": "sine"}, "pos_embed must be one of sincos, learn, none, got 'sine'"),
        ({"rope": "3d"}, "rope must be one of .*, got '3d'"),
        ({"global_pool": "mean"}, "global_pool must be one of avg, max, token, got 'mean'"),
        ({"num_heads": 5}, "num_heads 5 must divide embed_dim 24"),
        ({"num_heads": -3}, "num_heads must be a whole number above 0, got -3"),
        ({"num_heads": 3.0}, r"num_heads must be a whole number above 0, got 3\.0"),
        ({"num_heads": "abc"}, "num_heads must be a whole number above 0, got 'abc'"),
        ({"channels": True}, "in_channels must be a whole number above 0, got True"),
        ({"rope": "index", "num_heads": 4}, "heads of a multiple of 4 numbers, got 6"),
        ({"embed_dim": 27}, "even embed_dim of at least 6, got 27"),
        ({"ref_feat_shape": 10}, "ref_feat_shape must be two or three numbers of tokens, got 10"),
        ({"reg_tokens": -1}, "reg_tokens must be a whole number, got -1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be at least 0 and below 1, got 1\.0"),
    ],
)
def test_arguments_that_make_no_encoder_are_refused(argument, message):
    with pytest.raises(InputError, match=message):
        tiny(**argument)


@pytest.mark.parametrize("anisotropy", [None, 2])
@pytest.mark.parametrize(
    "spacing", [[float("nan"), 1, 1], [0.0, 1, 1], [-4.0, 1, 1], [4.0, 3, 1], [float("inf"), 1, 1], []]
)
def test_a_spacing_that_means_nothing_is_refused_whatever_it_is_for(anisotropy, spacing):
    with pytest.raises(InputError, match="spacing"):
        tiny(rope="mm")(torch.zeros(1, 1, 16, 32, 32), anisotropy, spacing=spacing)


def test_images_of_several_spacings_make_a_batch_once_their_degree_is_given():
    affines = torch.stack([torch.diag(torch.tensor([d, 1.0, 1.0, 1.0])).double() for d in (4.0, 6.0)])
    batch = MetaTensor(torch.randn(2, 1, 4, 16, 16), affine=affines[0])
    batch.affine = affines
    with pytest.raises(InputError, match="or give anisotropy"):
        tiny()(batch)
    assert tiny()(batch, anisotropy=2).shape == (2, 9, 24)


def test_the_affine_of_a_slice_is_its_volumes_and_is_not_read():
    encoder, volume = tiny((32, 32), rope="mm").eval(), torch.randn(1, 1, 4, 32, 32)
    affine = torch.diag(torch.tensor([4.0, 0.3, 0.3, 1.0])).double()
    one = MetaTensor(volume, affine=affine)[:, :, 2]
    torch.testing.assert_close(encoder(one), encoder(volume[:, :, 2]))


def test_the_spacing_of_a_volume_has_three_numbers():
    with pytest.raises(InputError, match=r"spacing \[1\.0, 1\.0\] of a volume must be three numbers"):
        tiny()(torch.zeros(1, 1, 16, 32, 32), spacing=[1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_an_image_of_whole_numbers_is_refused(dtype):
    with pytest.raises(InputError, match="must be of floating-point numbers"):
        tiny()(torch.zeros(1, 1, 16, 32, 32, dtype=dtype))


def test_a_2d_encoder_refuses_a_volume_and_says_what_to_do():
    with pytest.raises(InputError, match=r"cannot read 4 slices at once.*inflate"):
        tiny((32, 32))(torch.zeros(1, 1, 4, 32, 32))


def test_patches_that_cannot_be_halved_so_often_are_refused():
    encoder = tiny((28, 28, 28), 14)
    assert encoder(torch.zeros(1, 1, 28, 28, 28)).shape == (1, 9, 24)
    with pytest.raises(InputError, match="patches 14 deep cannot be halved 2 times"):
        encoder(torch.zeros(1, 1, 12, 28, 28), anisotropy=2)


@pytest.mark.parametrize(
    ("size", "patch"), [(64, 8), ((64,), 8), ((60, 60), 8), ((64, 64), 0), ((4, 4), 8), ((0, 8), 8)]
)
def test_sizes_that_are_no_multiples_of_the_patch_are_refused_with_an_example(size, patch):
    with pytest.raises(InputError, match=r"multiples of patch_size .* Give --img_size such as \[64,64\]"):
        tiny(size, patch)


@pytest.mark.parametrize("options", [{"pos_embed": "sincos"}, {"pos_embed": "learn", "class_token": False}])
def test_a_position_for_a_class_token_without_a_learned_grid_or_without_the_token_is_refused(options):
    with pytest.raises(InputError, match="no_embed_class False needs class_token and pos_embed 'learn'"):
        tiny(no_embed_class=False, **options)
