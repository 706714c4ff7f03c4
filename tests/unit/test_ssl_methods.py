"""Methods, losses and masks against slow implementations of the papers' formulas, and what must hold of each."""

import itertools
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from biovfm_monai.draws import Use, random_keys, uniform
from biovfm_monai.errors import InputError
from biovfm_monai.losses import info_nce, sigreg
from biovfm_monai.losses.sigreg import _directions
from biovfm_monai.methods import IJEPA, MAE, BarlowTwins, LeJEPA, MoCoV3, SimMIM, SPADTokenizer, VICReg
from biovfm_monai.methods.teacher import rising
from biovfm_monai.networks import ViT, block_mask, sincos_positions
from biovfm_monai.networks.masking import block_size, context_and_targets, cube_mask

GRIDS = [(1, 14, 14), (1, 7, 12), (6, 6, 6), (3, 14, 14)]


def encoder(size=(32, 32), **options):
    return ViT(1, size, 8, embed_dim=24, depth=2, num_heads=3, **options)


def moco(network=None, **options):
    return MoCoV3(network or encoder(), hidden_dim=32, projection_dim=16, **options)


def ijepa(network=None, **options):
    return IJEPA(network or encoder(), predictor_embed_dim=24, predictor_depth=1, **options)


def lejepa(network=None, **options):
    return LeJEPA(network or encoder(), projector_dims=(32, 8), num_slices=64, **options)


def barlow(network=None, **options):
    return BarlowTwins(network or encoder(), projector_dims=(32, 32, 12), **options)


def vicreg(network=None, **options):
    return VICReg(network or encoder(), projector_dims=(32, 32, 12), **options)


def crops(views=2, n=4, size=(32, 32)):
    return torch.randn(n, 1, *size) + 0.3 * torch.randn(views, n, 1, *size)


# InfoNCE


def slow_info_nce(queries, keys, temperature):
    """Minus the logarithm of the own key's share of all exponentials, one query at a time."""
    queries, keys = queries.double().numpy(), keys.double().numpy()
    losses = []
    for number, query in enumerate(queries):
        cosines = [query @ key / np.linalg.norm(query) / np.linalg.norm(key) for key in keys]
        exponentials = [math.exp(cosine / temperature) for cosine in cosines]
        losses.append(-math.log(exponentials[number] / sum(exponentials)))
    return 2 * temperature * sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_info_nce_equals_the_formula(temperature):
    queries, keys = torch.randn(6, 10), 5 * torch.randn(6, 10)
    expected = slow_info_nce(queries, keys, temperature)
    assert float(info_nce(queries, keys, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_info_nce_is_finite_in_half_precision_at_a_low_temperature(dtype):
    """MONAI's ContrastiveLoss gives NaN here: exp(1 / 0.05) is more than float16 can hold."""
    rows = torch.randn(8, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = info_nce(rows, rows.detach().flip(1), 0.05)
    loss.backward()
    expected = slow_info_nce(rows.detach(), rows.detach().flip(1), 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert rows.grad.isfinite().all()
    assert rows.grad.any()


@pytest.mark.parametrize("scale", [0.0, 1e-7, 6e4])
def test_info_nce_takes_rows_of_any_length(scale):
    rows = (torch.randn(4, 8).sign() * scale).half().requires_grad_()
    info_nce(rows, rows.detach(), 0.05).backward()
    assert rows.grad.isfinite().all()


# SIGReg


def epps_pulley(x, last):
    """N * integral of |empirical - normal characteristic function|^2 * exp(-t^2 / 2), numerically."""

    def integrand(t):
        return abs(np.exp(1j * t * x).mean() - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2)

    return len(x) * quad(integrand, -last, last, limit=200)[0]


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_sigreg_of_one_dimension_equals_the_numerical_integral(scale):
    x = scale * torch.randn(40, 1, dtype=torch.float64)
    # In one dimension each direction is 1 or -1, which give the same statistic.
    found = sigreg(x, torch.tensor(0), num_slices=3, knots=2001)
    assert float(found) == pytest.approx(epps_pulley(x[:, 0].numpy(), 3), rel=1e-4)
    assert float(sigreg(x, torch.tensor(0), num_slices=3)) == pytest.approx(float(found), rel=5e-2)


def test_sigreg_of_several_dimensions_is_the_mean_over_directions():
    rows, key = torch.randn(30, 5) * torch.arange(1.0, 6), torch.tensor(3)
    directions = _directions(key, 500, 5)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(500))
    # Of points that are uniform on the sphere, each coordinate has the variance 1 / 5, and no two vary together.
    torch.testing.assert_close(directions.T @ directions / 500, torch.eye(5) / 5, rtol=0, atol=0.04)
    projected = rows.double() @ _directions(key, 20, 5).double().T
    expected = np.mean([epps_pulley(x, 3) for x in projected.T.numpy()])
    assert float(sigreg(rows, key, 20, knots=2001)) == pytest.approx(expected, rel=1e-3)


def test_the_gradient_of_sigreg_is_the_slope_of_the_statistic():
    rows, key = 0.3 + 1.5 * torch.randn(20, 3, dtype=torch.float64), torch.tensor(3)
    directions = _directions(key, 5, 3).double().numpy()

    def statistic(rows):
        return np.mean([epps_pulley(rows.numpy() @ direction, 3) for direction in directions])

    sigreg(rows.requires_grad_(), key, 5, knots=1001).backward()
    step = 1e-3 * torch.randn_like(rows)
    slope = (statistic(rows.detach() + step) - statistic(rows.detach() - step)) / 2
    assert (rows.grad * step).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_sigreg_is_least_for_normal_rows_and_grows_with_what_is_not():
    # Of N normal numbers the expectation is the integral of (1 - exp(-t^2)) exp(-t^2 / 2).
    expected = quad(lambda t: (1 - math.exp(-(t**2))) * math.exp(-(t**2) / 2), -3, 3)[0]
    found = [float(sigreg(torch.randn(200, 16), torch.tensor(key), 64)) for key in range(100)]
    assert sum(found) / 100 == pytest.approx(expected, rel=0.05)
    key, normal = torch.tensor(7), torch.randn(512, 16)
    constant, line = normal * 0, normal[:, :1].expand(-1, 16)
    for rows in (constant, line, 0.5 * normal, 2 * normal, normal + 1):
        assert float(sigreg(rows, key)) > 10 * expected


def test_sigreg_leads_collapsed_rows_to_a_normal_distribution():
    rows = (0.1 * torch.randn(128, 4)).requires_grad_()
    optimizer = torch.optim.Adam([rows], 0.05)
    for step in range(150):
        optimizer.zero_grad()
        sigreg(rows, torch.tensor(step), num_slices=32).backward()
        optimizer.step()
    assert rows.mean(0).abs().max() < 0.1
    torch.testing.assert_close(rows.detach().T.cov(), torch.eye(4), rtol=0, atol=0.2)


def test_directions_change_with_the_key_and_stay_with_it():
    rows = torch.randn(16, 8)
    first, again, other = (float(sigreg(rows, torch.tensor(n), num_slices=4)) for n in (1, 1, 2))
    assert first == again != other


def test_sigreg_is_float32_under_autocast():
    rows = torch.randn(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sigreg(rows, torch.tensor(1))
    assert torch.equal(found, sigreg(rows, torch.tensor(1)))


# Masks


@pytest.mark.parametrize("grid", GRIDS)
def test_a_block_mask_hides_exactly_as_many_tokens(grid):
    length = math.prod(grid)
    for count in (0, 1, length // 3, length - 1, length):
        assert (block_mask(random_keys(50), grid, count).sum(1) == count).all()
    counts = torch.arange(5)
    assert torch.equal(block_mask(random_keys(5), grid, counts).sum(1), counts)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_block_is_a_box_but_for_its_last_side(grid):
    for mask in block_mask(random_keys(50), grid, math.prod(grid) // 4, num_blocks=1).view(-1, *grid):
        places = mask.nonzero()
        box = [range(int(low), int(high) + 1) for low, high in zip(places.amin(0), places.amax(0), strict=True)]
        missing = [(z, y, x) for z in box[0] for y in box[1] for x in box[2] if not mask[z, y, x]]
        sides = [{place[axis] for place in missing} for axis in range(3)]
        assert not missing or any(side <= {span[0], span[-1]} for side, span in zip(sides, box, strict=True))


def test_a_block_mask_is_what_boxes_that_grow_together_cover_first():
    (depth, height, width), keys = (3, 8, 10), random_keys(8)
    tokens = np.array(list(itertools.product(range(depth), range(height), range(width))), float)
    for mask, drawn in zip(block_mask(keys, (depth, height, width), 70), uniform(keys, 20, Use.BLOCK), strict=True):
        hidden, scale = [], 0.0
        while len(hidden) < 70:
            scale += 0.0005
            covered = np.zeros(len(tokens), bool)
            for z, y, x, size, shape in drawn.double().view(4, 5).tolist():
                side, aspect = scale * 4 ** (size - 0.5), (10 / 3) ** (shape - 0.5)
                half = np.array([side * depth / math.sqrt(height * width), side * aspect, side / aspect])
                centre = np.array([math.floor(z * depth), y * height - 0.5, x * width - 0.5])
                covered |= (np.abs(tokens - centre) <= half).all(1)
            hidden += [token for token in covered.nonzero()[0].tolist() if token not in hidden]
        assert set(hidden[:70]) == set(mask.nonzero()[:, 0].tolist())


def test_block_masks_are_clustered():
    def neighbours(mask):
        return float((mask[..., 1:] & mask[..., :-1]).sum() / mask.sum())

    keys = random_keys(100)
    blocks = block_mask(keys, (1, 14, 14), 60).view(-1, 14, 14)
    scattered = cube_mask(keys, (1, 14, 14), (1, 1, 1), 60 / 196)[0].view(-1, 14, 14)
    assert neighbours(blocks) > 2 * neighbours(scattered)


def test_a_mask_depends_on_its_own_key_alone():
    keys = random_keys(6)
    for draw in (
        lambda k: block_mask(k, (3, 8, 8), 50),
        lambda k: cube_mask(k, (2, 8, 8), (2, 2, 2), 0.6)[0],
        lambda k: context_and_targets(k, (1, 14, 14), (1, 13, 13), (1, 6, 5), 4)[0],
        lambda k: context_and_targets(k, (1, 14, 14), (1, 13, 13), (1, 6, 5), 4)[1],
    ):
        assert torch.equal(draw(keys)[3:5], draw(keys[3:5]))
        assert not torch.equal(draw(keys)[3], draw(keys)[4])


def test_more_tokens_than_there_are_cannot_be_hidden():
    with pytest.raises(ValueError, match="count must be 0 to 16"):
        block_mask(random_keys(1), (1, 4, 4), 17)


def test_cubes_are_hidden_whole_and_in_their_share():
    mask, hidden = cube_mask(random_keys(20), (4, 12, 12), (2, 2, 2), 0.6)
    cubes = mask.view(20, 2, 2, 6, 2, 6, 2).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).float().mean(-1)
    assert set(cubes.unique().tolist()) == {0.0, 1.0}
    # As many as the paper's code: the share, rounded up.
    assert (cubes.flatten(1).sum(1) == math.ceil(0.6 * 72)).all()
    assert torch.equal(mask.nonzero()[:, 1].view(20, -1), hidden)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("aspect", [0.75, 1.5])
def test_block_sizes_keep_to_their_share(grid, aspect):
    length = math.prod(grid)
    assert math.prod(block_size(grid, 0.2, aspect, math.floor)) <= 0.2 * length
    assert math.prod(block_size(grid, 0.15, aspect, math.floor)) >= 0.1 * length
    depth, height, width = block_size(grid, 0.85, 1.0, math.ceil)
    assert depth * height * (width - 1) < 0.85 * length <= depth * height * width
    assert block_size(grid, 1.0, 1.0, math.ceil) == grid


@pytest.mark.parametrize("grid", GRIDS)
def test_targets_are_boxes_outside_of_the_context(grid):
    context, target = block_size(grid, 0.9, 1.0, math.ceil), block_size(grid, 0.17, 1.2, math.floor)
    keep, targets = context_and_targets(random_keys(30), grid, context, target, 4)
    assert keep.shape == (30, math.prod(context) - 4 * math.prod(target))
    assert targets.shape == (30, 4, math.prod(target))
    for visible, hidden in zip(keep.tolist(), targets, strict=True):
        assert not set(visible) & set(hidden.flatten().tolist())
        assert visible == sorted(set(visible))
        for block in hidden:
            places = torch.stack(torch.unravel_index(block, grid))
            assert tuple((places.amax(1) - places.amin(1) + 1).tolist()) == target
            assert len(set(block.tolist())) == math.prod(target)
    spread = [torch.stack(torch.unravel_index(keep, grid))[axis].flatten() for axis in range(3)]
    assert all(int(s.max() - s.min() + 1) == n for s, n in zip(spread, grid, strict=True))


# MoCo v3


def test_moco_v3_equals_the_formula():
    method, views = moco(encoder(global_pool="token")), crops()
    with torch.no_grad():  # else the teacher would still be the student
        for p in (*method.teacher.parameters(), *method.teacher_projector.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    queries = [method.predictor(method.projector(method.encoder(view)[:, 0])) for view in views]
    keys = [method.teacher_projector.network(method.teacher.network(view)[:, 0]) for view in views]
    expected = sum(slow_info_nce(queries[n].detach(), keys[1 - n].detach(), 0.2) for n in (0, 1))
    assert method({"global_crops": views})["loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "teacher", "student", "momentum"),
    [
        (moco, "teacher", "encoder", rising(0.99, 1, 0.3)),
        (moco, "teacher_projector", "projector", rising(0.99, 1, 0.3)),
        (ijepa, "teacher", "encoder", 0.996 + 0.004 * 0.3),
    ],
)  # fmt: skip
def test_a_teacher_is_the_moving_average_of_its_student(make, teacher, student, momentum):
    method = make()
    teacher, student = method.get_submodule(teacher), method.get_submodule(student)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn_like(p))
    before = [p.clone() for p in teacher.parameters()]
    method.after_step(0.3)
    for own, other, was in zip(teacher.parameters(), student.parameters(), before, strict=True):
        torch.testing.assert_close(own, momentum * was + (1 - momentum) * other)
    before = [p.clone() for p in teacher.parameters()]
    method.after_step(1.0)
    assert all(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))


@pytest.mark.parametrize("make", [moco, ijepa])
def test_a_teacher_has_no_gradient_and_no_drop_path(make):
    method = make(encoder(drop_path_rate=0.9)).train()
    assert not any(module.training for module in method.teacher.modules())
    method({"image": torch.randn(4, 1, 32, 32), "global_crops": crops()})["loss"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())


def test_the_patch_embedding_of_moco_v3_is_frozen_unless_asked_otherwise():
    assert not any(p.requires_grad for p in moco().encoder.patch_embed.parameters())
    assert all(p.requires_grad for p in moco(freeze_patch_embed=False).encoder.parameters())


def test_moco_v3_has_the_published_heads():
    with torch.device("meta"):
        method = MoCoV3(encoder())
    rows = [tuple(p.shape) for p in [*method.projector.parameters(), *method.predictor.parameters()] if p.ndim == 2]
    assert rows == [(4096, 24), (4096, 4096), (256, 4096), (4096, 256), (256, 4096)]


# Barlow Twins


@pytest.mark.parametrize("weight", [5e-3, 0.7])
def test_barlow_twins_equals_the_formula(weight):
    method, views = barlow(redundancy_weight=weight), crops(n=6)
    found = method({"global_crops": views})
    first, second = (
        method.projector[:-1](method.encoder(view)[:, 1:].mean(1)).double().detach().numpy() for view in views
    )
    invariance = redundancy = 0.0
    for i in range(12):
        for j in range(12):
            one, other = first[:, i] - first[:, i].mean(), second[:, j] - second[:, j].mean()
            # Of numbers that hardly vary, eps in the batch norm counts.
            lengths = math.sqrt((one**2 + 1e-5).sum() * (other**2 + 1e-5).sum())
            correlation = sum(a * b for a, b in zip(one, other, strict=True)) / lengths
            invariance += (1 - correlation) ** 2 if i == j else 0
            redundancy += correlation**2 if i != j else 0
    assert found["invariance"].item() == pytest.approx(invariance, rel=1e-3)
    assert found["redundancy"].item() == pytest.approx(redundancy, rel=1e-3)
    assert found["loss"].item() == pytest.approx(invariance + weight * redundancy, rel=1e-3)


def test_barlow_twins_loses_nothing_on_equal_views_of_uncorrelated_numbers():
    method = barlow()
    # Rows of a Hadamard matrix without its constant column: mean 0, variance 1, no two columns correlated.
    rows = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(1, 13)] for i in range(16)])
    method.encoder.forward = lambda images, degree: rows.repeat(2, 1)[:, None]
    method.encoder.num_prefix_tokens, method.projector = 0, torch.nn.Identity()
    assert method({"global_crops": crops(n=16)})["loss"].item() == pytest.approx(0, abs=1e-9)


def test_barlow_twins_has_the_published_projector():
    with torch.device("meta"):
        method = BarlowTwins(encoder())
    assert [tuple(p.shape) for p in method.projector.parameters()] == [
        (8192, 24), (8192,), (8192,), (8192, 8192), (8192,), (8192,), (8192, 8192),
    ]  # fmt: skip


# VICReg


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.5, 3.0, 7.0)])
def test_vicreg_equals_the_formula(weights):
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    method, views = vicreg(**dict(zip(names, weights, strict=True))), crops(n=6)
    # Some numbers vary enough, and some do not.
    method.projector[-1].weight.data.mul_(torch.linspace(0.1, 4, 12)[:, None])
    found = method({"global_crops": views})
    first, second = (method.projector(method.encoder(view)[:, 1:].mean(1)).double().detach().numpy() for view in views)
    invariance = sum(
        sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) for one, other in zip(first, second, strict=True)
    ) / (6 * 12)
    variance = covariance = 0.0
    for rows in (first, second):
        apart = rows - rows.mean(0)
        for i in range(12):
            deviation = math.sqrt(sum(row[i] ** 2 for row in apart) / 5 + 1e-4)
            variance += max(0.0, 1 - deviation) / 12
            for j in range(12):
                of_pair = sum(row[i] * row[j] for row in apart) / 5
                covariance += of_pair**2 / 12 if i != j else 0
    expected = {"invariance": invariance, "variance": variance, "covariance": covariance}
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term, rel=1e-4)
    total = sum(weight * term for weight, term in zip(weights, expected.values(), strict=True))
    assert found["loss"].item() == pytest.approx(total, rel=1e-4)


def test_vicreg_has_the_published_expander_and_weights():
    with torch.device("meta"):
        method = VICReg(encoder())
    assert [tuple(p.shape) for p in method.projector.parameters() if p.ndim == 2] == [
        (8192, 24), (8192, 8192), (8192, 8192),
    ]  # fmt: skip
    assert method.weights == (25, 25, 1)


# SimMIM


@pytest.mark.parametrize(("size", "degree"), [((48, 32), 5), ((16, 32, 32), 0), ((8, 32, 32), 1)])
def test_simmim_equals_the_formula(size, degree):
    volume = len(size) == 3
    method = SimMIM(encoder((16, 32, 32) if volume else size), 0.6, mask_size=16)
    image, key = torch.randn(3, 1, *size), random_keys(3)
    loss = method({"image": image, "key": key, "anisotropy": degree})["loss"]
    network, depth = method.encoder, 8 >> degree if volume else 1
    patches = network.patchify(image, degree)
    d, h, w = patches.grid_size
    mask = cube_mask(key, patches.grid_size, (2 if volume else 1, 2, 2), 0.6)[0]
    positions = sincos_positions(patches.grid_size, 24, len(size))
    errors = []
    for number in range(3):
        embedded = network.patch_embed(patches.voxels[number : number + 1], degree)[0]
        rows = [method.mask_token[0, 0] if mask[number, i] else embedded[i] for i in range(d * h * w)]
        x = torch.stack([network.cls_token[0, 0], *(row + place for row, place in zip(rows, positions, strict=True))])
        pixels = method.head(network.encode(x[None])[0][0, 1:])
        for i in mask[number].nonzero().flatten().tolist():
            # A thick slice stands for as many thin ones.
            found = pixels[i].view(depth, -1, 64).mean(1).flatten()
            errors.append((found - patches.voxels[number, i]).abs().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_simmim_sees_masked_pixels_as_targets_only():
    method, key = SimMIM(encoder(), 0.5, mask_size=8), random_keys(1)
    image = torch.randn(1, 1, 32, 32, requires_grad=True)
    method({"image": image, "key": key})["loss"].backward()
    mask = cube_mask(key, (1, 4, 4), (1, 1, 1), 0.5)[0][0]
    gradient = image.grad.view(4, 8, 4, 8).transpose(1, 2).flatten(0, 1)
    # That of a mean of absolute differences by its targets.
    torch.testing.assert_close(gradient[mask].abs(), torch.full((8, 8, 8), 1 / (8 * 64)))
    assert gradient[~mask].flatten(1).any(1).all()


# I-JEPA


@pytest.mark.parametrize("size", [(48, 48), (16, 48, 48)])
def test_ijepa_equals_the_formula(size):
    method = ijepa(encoder(size))
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    image, key = torch.randn(2, 1, *size), random_keys(2)
    loss = method({"image": image, "key": key})["loss"]
    patches = method.encoder.patchify(image)
    keep, targets = context_and_targets(key, patches.grid_size, *method._sizes(patches), 4)
    places = sincos_positions(patches.grid_size, 24, len(size))
    errors = []
    for number in range(2):
        one = image[number : number + 1]
        truth = method.teacher.network(one)[0, 1:]
        truth = (truth - truth.mean(1, keepdim=True)) / (truth.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        context = method.predictor_embed(method.encoder(one, keep=keep[number : number + 1])[0])
        context = [context[0], *(context[1 + row] + places[i] for row, i in enumerate(keep[number].tolist()))]
        for block in targets[number].tolist():
            x = torch.stack([*context, *(method.mask_token[0, 0] + places[i] for i in block)])[None]
            for layer in method.predictor_blocks:
                x = layer(x)
            found = method.predictor_pred(method.predictor_norm(x))[0, -len(block) :]
            gap = (found - truth[block]).abs()
            errors.append(torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_the_blocks_of_ijepa_change_size_from_step_to_step_and_go_on_from_a_state():
    method = ijepa(encoder((112, 112)))
    patches = method.encoder.patchify(torch.randn(1, 1, 112, 112))
    sizes = []
    for _ in range(10):
        sizes.append(method._sizes(patches))
        method.after_step(0.0)
    assert len(set(sizes)) > 5
    other = ijepa(encoder((112, 112)))
    other.load_state_dict(method.state_dict())
    assert other._sizes(patches) == method._sizes(patches)


# LeJEPA


def test_lejepa_equals_the_formula():
    method = lejepa(sigreg_weight=0.3)
    method.step += 5
    batch = {"global_crops": crops(2), "local_crops": crops(3, size=(16, 16))}
    found = method(batch)
    embedded = [method.encoder(view)[:, 1:].mean(1) for part in batch.values() for view in part]
    z = method.projector(torch.cat(embedded)).view(5, 4, 8)
    invariance = [((z[view, n] - (z[0, n] + z[1, n]) / 2) ** 2).mean() for view in range(5) for n in range(4)]
    spread = [sigreg(z[view], torch.tensor(5), 64) for view in range(5)]
    expected = 0.7 * sum(invariance) / 20 + 0.3 * sum(spread) / 5
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)


def test_lejepa_looks_along_other_directions_in_each_step_and_goes_on_from_a_state():
    method, batch = lejepa(), {"global_crops": crops()}
    first = method(batch)["sigreg"]
    method.after_step(0.5)
    second = method(batch)["sigreg"]
    other = lejepa()
    other.load_state_dict(method.state_dict())
    assert first != second == other(batch)["sigreg"]


# All of them

ALL = [moco, barlow, vicreg, lejepa, ijepa, lambda network: SimMIM(network, mask_size=16)]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    "options",
    [{"rope": "normalised", "pos_embed": "none"}, {"pos_embed": "learn", "reg_tokens": 2}, {"class_token": False}],
)
def test_encoders_of_other_kinds_are_trained(make, options):
    network = ViT(1, (32, 32), 8, embed_dim=24, depth=2, num_heads=2, **options)
    make(network)({"image": torch.randn(4, 1, 32, 32), "global_crops": crops()})["loss"].backward()
    assert [
        n for n, p in network.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    ] == []


@pytest.mark.parametrize("make", ALL)
def test_a_state_is_tensors_alone(make):
    """So that it can be written as safetensors."""
    assert all(isinstance(value, torch.Tensor) for value in make(encoder()).state_dict().values())


# Mistakes


@pytest.mark.parametrize(("make", "views"), [(moco, 1), (moco, 3), (barlow, 1), (vicreg, 3), (lejepa, 1)])
def test_a_wrong_number_of_views_is_refused(make, views):
    with pytest.raises(InputError, match=rf"compares 2 .*the batch has {views}"):
        make()({"global_crops": crops(views)})


@pytest.mark.parametrize(("size", "make"), [((16, 16), ijepa), ((32, 32), SimMIM), ((48, 32), SimMIM)])
def test_a_grid_too_small_for_blocks_is_refused(size, make):
    with pytest.raises(InputError, match=r"grid of .* tokens .* Give"):
        make(encoder(size))({"image": torch.randn(1, 1, *size)})


def test_a_mask_that_cuts_patches_is_refused():
    with pytest.raises(InputError, match="mask_size 20 must be a multiple of the patch"):
        SimMIM(encoder(), mask_size=20)


def test_a_predictor_whose_heads_do_not_fit_is_refused():
    with pytest.raises(InputError, match=r"must divide .* Correct one"):
        IJEPA(encoder(), predictor_embed_dim=20)


@pytest.mark.parametrize(
    ("make", "options", "rule"),
    [
        (moco, {"momentum": -0.1}, "momentum -0.1 must be 0 or more, and at most 1"),
        (ijepa, {"momentum": 1.5}, "momentum 1.5 must be 0 or more, and at most 1"),
        (moco, {"temperature": 0}, "temperature 0 must be above 0"),
        (partial(MoCoV3, encoder()), {"hidden_dim": 0}, "widths [24, 0, 0, 256] must be 1 or more"),
        (partial(SimMIM, encoder()), {"mask_size": 0}, "mask_size 0 must be 1 or more"),
        (partial(MAE, encoder()), {"decoder_num_heads": 0}, "decoder_num_heads 0 must be 1 or more"),
        (partial(VICReg, encoder()), {"variance_weight": -1}, "variance_weight -1 must be 0 or more"),
        (partial(SPADTokenizer, None, None), {"gate": "low"}, "gate 'low' must be a number, 0 or more"),
        (moco, {"temperature": "low"}, "temperature 'low' must be a number, above 0"),
        (lejepa, {"sigreg_weight": float("nan")}, "sigreg_weight nan must be 0 or more"),
        (ijepa, {"num_targets": 0}, "num_targets 0 must be 1 or more"),
        (ijepa, {"num_targets": 2.5}, "num_targets 2.5 must be a whole number, 1 or more"),
        (ijepa, {"target_scale": (0.0, 0.2)}, "target_scale (0.0, 0.2) must be above 0, and at most 1"),
        (ijepa, {"context_scale": (1.0, 0.8)}, "context_scale (1.0, 0.8) must be two numbers, the lower one first"),
        (ijepa, {"target_aspect": 1.5}, "target_aspect 1.5 must be two numbers, the lower one first"),
    ],
)
def test_a_number_that_means_nothing_is_refused_with_its_rule(make, options, rule):
    with pytest.raises(InputError, match=rf"^{re.escape(rule)}.*\. Correct it\.$"):
        make(**options)


@pytest.mark.parametrize("ratio", [-0.5, 0, 1, 1.5])
@pytest.mark.parametrize("make", [MAE, partial(SimMIM, mask_size=8)])
def test_a_share_of_patches_that_cannot_be_hidden_is_refused(make, ratio):
    with pytest.raises(InputError, match=rf"mask_ratio {ratio} must be between 0 and 1\. Correct"):
        make(encoder(), mask_ratio=ratio)({"image": torch.randn(2, 1, 32, 32)})
