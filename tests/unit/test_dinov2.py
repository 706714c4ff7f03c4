"""DINOv2's losses against slow implementations of the papers' formulas, and what its teacher does."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biovfm_monai.errors import InputError
from biovfm_monai.losses.dino import koleo, prototype_usage, row_entropy, sinkhorn, soft_cross_entropy
from biovfm_monai.methods import DINOv2, LeJEPA
from biovfm_monai.methods.teacher import Teacher, rising
from biovfm_monai.networks import ViT


def vit(size=(32, 32), **options):
    return ViT(1, size, 8, embed_dim=24, depth=2, num_heads=3, **options)


def dino(size=(32, 32), **options):
    torch.manual_seed(0)
    return DINOv2(vit(size), **{"prototypes": 12, "hidden_dim": 24, "bottleneck_dim": 8, **options})


def crops(b=3, local=2, seed=1):
    torch.manual_seed(seed)
    batch = {"global_crops": torch.randn(2, b, 1, 32, 32), "key": torch.arange(b)}
    return batch | ({"local_crops": torch.randn(local, b, 1, 16, 16)} if local else {})


# Sinkhorn


def slow_sinkhorn(scores, temperature, iterations):
    q = np.exp(scores / temperature).T  # prototypes x images
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True) / len(q)
        q = q / q.sum(0, keepdims=True) / q.shape[1]
    return (q * q.shape[1]).T


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31), st.integers(2, 9), st.integers(2, 11), st.integers(1, 5), st.sampled_from([0.04, 0.07, 1])
)
def test_sinkhorn_is_that_of_the_paper(seed, n, k, iterations, temperature):
    scores = np.random.default_rng(seed).uniform(-1, 1, (n, k))
    found = sinkhorn(torch.tensor(scores, dtype=torch.float32), temperature, iterations)
    np.testing.assert_allclose(found, slow_sinkhorn(scores, temperature, iterations), rtol=2e-4, atol=1e-6)


def test_sinkhorn_uses_each_prototype_as_much_once_it_has_converged():
    shares = sinkhorn(torch.randn(60, 6) * 3, 1.0, 200)
    torch.testing.assert_close(shares.sum(0), torch.full((6,), 10.0), rtol=1e-3, atol=1e-3)


def test_sinkhorn_stands_large_scores_and_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        # The widest range that cosines have at the lowest temperature that is taken, all rows near one prototype.
        wide = (torch.eye(7)[:1] * 2 - 1 + torch.randn(5, 7) * 0.01).clamp(-1, 1).to(dtype)
        torch.testing.assert_close(sinkhorn(wide, 0.03).sum(1), torch.ones(5))
        scores = torch.randn(40, 60)
        with torch.autocast("cpu", dtype=dtype):
            shares = sinkhorn(scores, 0.04)
        assert torch.equal(shares, sinkhorn(scores, 0.04))
        torch.testing.assert_close(shares.sum(1), torch.ones(40))


# Spreading out


def test_koleo_is_minus_the_mean_logarithm_of_the_distance_to_the_nearest_neighbour():
    x = torch.randn(7, 5, requires_grad=True)
    unit = (x / x.norm(dim=1, keepdim=True)).detach().numpy()
    logs = [math.log(min(np.linalg.norm(a - b) for j, b in enumerate(unit) if i != j)) for i, a in enumerate(unit)]
    loss = koleo(x)
    assert loss.item() == pytest.approx(-np.mean(logs), rel=1e-5)
    assert torch.autograd.gradcheck(koleo, x.detach().double().requires_grad_(), eps=1e-3, atol=5e-3)


@pytest.mark.parametrize("rows", [torch.ones(4, 5), torch.zeros(3, 5), torch.randn(1, 5)])
def test_koleo_stands_equal_rows_and_one_alone(rows):
    rows.requires_grad_()
    loss = koleo(rows)
    loss.backward()
    assert loss.isfinite()
    assert rows.grad.isfinite().all()


# The losses of views and of patches


def slow_shares(method):
    """How class tokens (kind 0) and hidden patches (kind 1) are shared out, from step to step, by a head of theirs."""
    centers, queue = [0.0, 0.0], list(method.queue.clone())

    def shares(head, tokens, kind):
        embedded = head.embed(tokens)
        scores = head.likeness(embedded)
        if method.centering == "mean":
            found = ((scores - centers[kind]) / 0.04).softmax(1)
            centers[kind] = 0.9 * centers[kind] + 0.1 * scores.mean(0)
            return found
        if queue and kind == 0:
            whole_batches = torch.stack(queue[: len(queue) // len(tokens) * len(tokens)])
            queue[:] = [*embedded, *queue][: len(queue)]
            scores = torch.cat([scores, head.likeness(whole_batches)])
        return torch.tensor(slow_sinkhorn(scores.double().numpy(), 0.04, 3))[: len(tokens)]

    return shares


def slow_losses(method, batch, shares_of):
    """The losses, one view, image and patch after the other."""
    teacher = method.teacher.network
    large, small = batch["global_crops"], batch["local_crops"]
    views, b = large.shape[:2]
    with torch.no_grad():
        taught = [[teacher["encoder"](large[v, i][None])[0] for i in range(b)] for v in range(views)]
        classes = torch.stack([taught[v][i][0] for v in range(views) for i in range(b)])
        shares = shares_of(teacher["head"], classes, 0).unflatten(0, (views, b))
        patches = method.encoder.patchify(large.flatten(0, 1))
        hidden = method._hidden(batch, views, patches).unflatten(0, (views, b))
        picked = [(v, i, p) for v in range(views) for i in range(b) for p in range(16) if hidden[v, i, p]]
        name = "patch_head" if "patch_head" in teacher else "head"
        targets = shares_of(teacher[name], torch.stack([taught[v][i][1 + p] for v, i, p in picked]), 1)
        seen = {}
        for v in range(views):
            for i in range(b):
                pieces = method.encoder.patchify(large[v, i][None])
                voxels = pieces.voxels.clone()
                voxels[0, hidden[v, i]] = 0
                x, _ = method.encoder.embed(pieces._replace(voxels=voxels))
                x[0, 1:][hidden[v, i]] += method.mask_token
                seen[v, i] = method.encoder.encode(x)[0][0]
        views_seen = [[seen[v, i][0] for i in range(b)] for v in range(views)]
        views_seen += [[method.encoder(one[i][None])[0, 0] for i in range(b)] for one in small]

        def entropy(share, token, head):
            return -(share * (head(token[None])[0] / 0.1).log_softmax(0)).sum().item()

        pairs = [(t, s) for t in range(views) for s in range(len(views_seen)) if t != s]
        of_views = np.mean([entropy(shares[t, i], views_seen[s][i], method.head) for t, s in pairs for i in range(b)])
        spread = sum(koleo(torch.stack(tokens)).item() for tokens in views_seen[:views])
        of_patches = {}
        for (v, i, p), target in zip(picked, targets, strict=True):
            found = entropy(target, seen[v, i][1 + p], getattr(method, name))
            of_patches.setdefault((v, i), []).append(found)
        return of_views, sum(np.mean(values) for values in of_patches.values()) / (views * b), spread


@pytest.mark.parametrize(
    "options",
    [{}, {"separate_heads": True}, {"centering": "mean", "separate_heads": True}, {"centering": "mean"}, {"queue": 14}],
    ids=str,
)
def test_the_losses_of_two_steps_are_those_of_one_view_and_patch_after_the_other(options):
    weights = {"dino_weight": 0.7, "ibot_weight": 1.3, "koleo_weight": 0.2}
    method = dino(momentum=0.5, **weights, **options)
    shares = slow_shares(method)
    for step in range(2):
        with torch.no_grad():
            for parameter in method._student().parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            method.mask_token.normal_()
        method.after_step(0.0)
        batch = crops(seed=step)
        found, expected = method(batch), slow_losses(method, batch, shares)
        parts = [found[name].item() for name in ("dino", "ibot", "koleo")]
        assert parts == pytest.approx(expected, rel=1e-4)
        assert found["loss"].item() == pytest.approx(np.dot([0.7, 1.3, 0.2], expected), rel=1e-4)


def test_the_soft_cross_entropy_of_a_student_that_agrees_is_the_entropy():
    shares = torch.randn(4, 6).softmax(1)
    entropy = -(shares * shares.log()).sum(1)
    torch.testing.assert_close(soft_cross_entropy(shares, 0.1 * shares.log(), 0.1), entropy)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_as_many_patches_of_as_many_views_are_hidden_as_stated(probability):
    method = dino(mask_probability=probability, mask_ratio=(0.25, 0.5))
    batch = crops(b=300, local=0)
    count = method._hidden(batch, 2, method.encoder.patchify(batch["global_crops"].flatten(0, 1))).sum(1)
    assert (count > 0).float().mean().item() == pytest.approx(probability, abs=0.06)
    assert set(count.tolist()) <= {0, 4, 5, 6, 7}


# The teacher


def test_the_teacher_is_exactly_the_moving_average_and_gets_no_gradient():
    method = dino(momentum=0.9)
    before = {name: value.clone() for name, value in method.teacher.network.state_dict().items()}
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(torch.randn_like(p))
    method(crops())["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    method.after_step(0.5)
    keep = rising(0.9, 1.0, 0.5)
    assert keep == pytest.approx(0.95)
    student = method.encoder.state_dict()
    for name, value in method.teacher.network["encoder"].state_dict().items():
        torch.testing.assert_close(value, keep * before[f"encoder.{name}"] + (1 - keep) * student[name])


def test_a_teacher_leaves_no_branch_out():
    teacher = Teacher(vit(drop_path_rate=0.9))
    teacher.train()
    image = torch.randn(2, 1, 32, 32)
    assert torch.equal(teacher(image), teacher(image))


def test_the_teachers_temperature_rises_and_the_prototypes_stay_at_first():
    method = dino(freeze_last_layer=0.1)
    temperatures = []
    for progress in (0.0, 0.15, 0.3, 0.9):
        method.after_step(progress)
        temperatures.append(float(method._temperature()))
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    moved = []
    for progress in (0.0, 0.2):
        method.zero_grad()
        method.after_step(progress)
        method(crops())["loss"].backward()
        moved.append(bool(method.head.prototypes.grad.any()))
    assert moved == [False, True]


def test_the_center_is_the_moving_mean_of_the_teachers_scores():
    method, batch = dino(centering="mean"), crops(local=0)
    with torch.no_grad():
        scores = method.teacher.network["head"](
            method._teach(method.encoder.patchify(batch["global_crops"].flatten(0, 1)))[:, 0]
        )
    method(batch)
    torch.testing.assert_close(method.centers[0], 0.1 * scores.mean(0))


def test_a_step_that_hides_no_patch_leaves_their_center_where_it_is():
    method = dino(centering="mean", mask_probability=0.0)
    method.centers += torch.randn_like(method.centers)
    before = method.centers.clone()
    method(crops())
    assert torch.equal(method.centers[1], before[1])
    assert not torch.equal(method.centers[0], before[0])


def test_a_queue_holds_the_newest_class_tokens():
    method = dino(queue=8)
    old = method.queue.clone()
    method(crops(b=3, local=0))
    torch.testing.assert_close(method.queue[6:], old[:2])
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(8))
    method.eval()
    kept = method.queue.clone()
    method(crops(b=3, local=0))
    assert torch.equal(method.queue, kept)


# What cannot be


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dino(prototypes=1), r"prototypes 1 must be 2 or more"),
        (lambda: dino(prototypes=16.5), r"prototypes 16.5 must be a whole number, 2 or more"),
        (lambda: dino(prototypes="many"), r"prototypes 'many' must be a whole number, 2 or more"),
        (lambda: dino(hidden_dim=0), r"hidden_dim 0 must be 1 or more"),
        (lambda: dino(koleo_weight=math.nan), r"koleo_weight nan must be 0 or more"),
        (lambda: dino(queue=-1), r"queue -1 must be 0 or more\. Correct it"),
        (lambda: dino(queue=20, centering="mean"), r"has no use for a queue, which is 20\. Give queue 0"),
        (lambda: dino(momentum=-1), r"momentum -1 must be 0 or more, and at most 1"),
        (lambda: dino(teacher_temp=(0.01, 0.07)), r"teacher_temp \(0.01, 0.07\) must be 0.03 or more"),
        (lambda: dino(student_temp=0), r"student_temp 0 must be above 0"),
        (lambda: dino(warmup=0), r"warmup 0 must be above 0, and at most 1"),
        (lambda: dino(mask_probability=1.1), r"mask_probability 1.1 must be 0 or more, and at most 1"),
        (lambda: dino(mask_ratio=(0.5, 1.1)), r"mask_ratio \(0.5, 1.1\) must be 0 or more, and at most 1"),
        (lambda: dino(mask_ratio=(0.5, 0.1)), r"mask_ratio \(0.5, 0.1\) must be two numbers, the lower one first"),
        (lambda: dino(centering="none"), r"centering 'none' must be 'sinkhorn' or 'mean'"),
        (lambda: DINOv2(vit(class_token=False)), r"has none\. Build it with class_token=True"),
        (lambda: dino()({"image": torch.zeros(2, 1, 32, 32)}), r'has no "global_crops"\. Let .*MultiCrop'),
        (lambda: dino()({"global_crops": torch.zeros(1, 2, 1, 32, 32)}), r"there is one\. Give MultiCrop two"),
        (
            lambda: dino()(crops() | {"local_crops": torch.zeros(2, 3, 1, 12, 12)}),
            r"views of size \[12, 12\] do not divide into patches of \[8, 8\]\. Give --views::local_view::img_size in",
        ),
        (lambda: dino(queue=1)(crops(1)), r"as many images, and a step has 1\. Raise --batch_size"),
        (lambda: dino()(crops(1)), r"as many images, and a step has 1\. Raise --batch_size, give --method::queue"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(make, message):
    with pytest.raises(InputError, match=message):
        make()


def loss_of_volumes(method, degree, depth):
    """Of large views as deep as the patches of 8 are at a degree of anisotropy, and small ones of a depth."""
    large, small = torch.randn(2, 3, 1, max(8 >> degree, 1), 16, 16), torch.randn(1, 3, 1, depth, 8, 8)
    return method({"global_crops": large, "local_crops": small, "anisotropy": torch.full((3,), degree)})["loss"]


OF_VOLUMES = [lambda: dino((8, 16, 16)), lambda: LeJEPA(vit((8, 16, 16)), projector_dims=(8, 8), num_slices=4)]


@pytest.mark.parametrize("make", OF_VOLUMES)
@pytest.mark.parametrize(("degree", "depth"), [(0, 16), (1, 4), (2, 2), (3, 3), (5, 1)])
def test_small_views_are_as_shallow_as_thick_slices_make_patches(make, degree, depth):
    assert loss_of_volumes(make(), degree, depth).isfinite()


@pytest.mark.parametrize("make", OF_VOLUMES)
@pytest.mark.parametrize(("degree", "depth", "patch"), [(0, 4, 8), (0, 12, 8), (1, 2, 4), (2, 3, 2)])
def test_small_views_whose_depth_does_not_divide_are_refused_with_their_key(make, degree, depth, patch):
    message = (
        rf"small views of size \[{depth}, 8, 8\] do not divide into patches of \[{patch}, 8, 8\]\. Give "
        r"--views::local_view::img_size in multiples of \[8, 8, 8\]\."
    )
    with pytest.raises(InputError, match=message):
        loss_of_volumes(make(), degree, depth)


# What tells of a collapse


def slow_entropy(shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_teachers_entropy_and_the_prototypes_in_use_are_their_formulas(temperature):
    shares = (torch.randn(9, 5, dtype=torch.float64) / temperature).softmax(1)
    entropies = [slow_entropy(row) / math.log(5) for row in shares.tolist()]
    assert row_entropy(shares).tolist() == pytest.approx(entropies)
    likeliest = [row.index(max(row)) for row in shares.tolist()]
    used = [likeliest.count(prototype) / 9 for prototype in range(5)]
    assert prototype_usage(shares).item() == pytest.approx(math.exp(slow_entropy(used)) / 5)


def test_one_prototype_for_all_images_is_the_least_usage_and_one_for_each_all_of_it():
    assert prototype_usage(torch.eye(4)[:1].repeat(8, 1)).item() == pytest.approx(0.25)
    assert prototype_usage(torch.eye(4).repeat(2, 1)).item() == pytest.approx(1)
    torch.testing.assert_close(row_entropy(torch.eye(4)), torch.zeros(4))


@pytest.mark.parametrize("options", [{}, {"queue": 20}, {"centering": "mean"}])
def test_images_that_are_all_alike_to_the_teacher_use_one_prototype(options):
    method = dino(**options)
    with torch.no_grad():
        # Not quite alike: Sinkhorn would share them out over all prototypes.
        method.teacher.network["head"].layers[-1].weight.mul_(1e-3)
        method.teacher.network["head"].layers[-1].bias.fill_(1.0)
    assert method(crops(8))["prototype_usage"].item() == pytest.approx(1 / 12)
    assert dino(**options)(crops(8))["prototype_usage"] > 2 / 12


def test_what_tells_of_a_collapse_is_in_the_output():
    output = dino()(crops())
    assert 0 < output["teacher_entropy"] <= 1
    assert 1 / 12 <= output["prototype_usage"] <= 1
