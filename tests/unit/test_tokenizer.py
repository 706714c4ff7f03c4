"""The visual tokenizer, its training, and masked modelling of its tokens, against slow implementations and formulas."""

import json
import math

import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from torch import nn

from biovfm_monai.checkpoints import encoder_info, load_encoder, load_tokenizer, save_encoder, save_tokenizer
from biovfm_monai.data import RandomCropDataset, training_transform
from biovfm_monai.draws import random_keys
from biovfm_monai.engines import EncoderHandler, PretrainingTrainer, parameter_groups
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation import TokenizerProbe, transform_of
from biovfm_monai.losses.adversarial import hinge_loss
from biovfm_monai.losses.perceptual import perceptual_loss
from biovfm_monai.losses.quantiser import code_entropy, code_usage
from biovfm_monai.methods import MaskedTokenModeling, SPADTokenizer
from biovfm_monai.networks import EncoderFeatures, PatchDiscriminator, SoftTokenizer, ViT, random_mask

SMALL = {"in_channels": 1, "widths": (8, 16), "strides": (4, 2), "num_codes": 16, "norm_groups": 4}


def small(**options):
    return SoftTokenizer(**(SMALL | options))


def encoder(size=(16, 32, 32), **options):
    return ViT(
        **({"in_channels": 1, "img_size": size, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3} | options)
    )


def count(*parts):
    return sum(p.numel() for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters()))


# The network


def test_tokenizer_and_discriminator_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        net, judge = SoftTokenizer(), PatchDiscriminator()
    parts = {
        "all": count(net),
        "encoder": count(net.narrow, net.norms, net.encoder_blocks),
        "codes": count(net.logits, net.codebook),
        "decoder": count(net.decoder_blocks, net.widen, net.refine),
        "discriminator": count(judge),
    }
    millions = {name: round(number / 1e6, 2) for name, number in parts.items()}
    assert millions == {"all": 34.25, "encoder": 15.50, "codes": 1.05, "decoder": 17.71, "discriminator": 11.53}


@pytest.mark.parametrize(
    ("degree", "depth", "grid"), [(0, 64, 4), (1, 32, 4), (2, 16, 4), (3, 8, 4), (4, 4, 4), (5, 1, 1)]
)
def test_the_grid_is_nearly_isotropic_at_every_degree_and_decoding_gives_the_size_back(degree, depth, grid):
    net = SoftTokenizer(1, (4, 4, 4), num_codes=5, norm_groups=2)
    image = torch.randn(1, 1, depth, 128, 128)
    logits = net(image, degree)
    assert logits.shape == (1, 5, grid, 8, 8)
    assert net.decode(logits.softmax(1), degree).shape == image.shape


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_thick_slices_have_the_tokens_of_the_slices_repeated(degree):
    net = small()
    thick = torch.randn(2, 1, 16 >> degree, 16, 16)
    torch.testing.assert_close(
        net(thick, degree), net(thick.repeat_interleave(1 << degree, 2), 0), rtol=1e-4, atol=1e-5
    )


def test_how_thick_slices_are_is_known_by_their_affine():
    net, affine = small(), torch.diag(torch.tensor([5.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.randn(2, 1, 4, 16, 16), affine=affine.expand(2, 4, 4))
    torch.testing.assert_close(net(image), net(image.as_tensor(), 1))
    torch.testing.assert_close(net(image, 2), net(image.as_tensor(), 2))


def test_a_2d_image_is_a_volume_of_depth_1_and_degree_5():
    net, image = small(), torch.randn(2, 1, 16, 24)
    torch.testing.assert_close(net(image), net(image[:, :, None], 5))
    torch.testing.assert_close(net(MetaTensor(image)), net(image))


@pytest.mark.parametrize("degree", [0, 2, 5])
def test_the_discriminator_halves_three_times_whatever_the_degree(degree):
    judge = PatchDiscriminator(1, (4, 4, 4), norm_groups=2)
    image = torch.randn(1, 1, max(32 >> degree, 1), 32, 32)
    depth = {0: 4, 2: 4, 5: 1}[degree]
    assert judge(image, degree).shape == (1, 1, depth, 4, 4)


def test_what_is_decoded_is_the_mean_of_the_codes_under_the_probabilities():
    net = small()
    seen = []
    net.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    p = torch.randn(2, 16, 2, 3, 4).softmax(1)
    net.decode(p, 0)
    expected = torch.zeros(2, 16, 2, 3, 4)
    for b, z, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 3, 4))).tolist():
        for k in range(16):
            expected[b, :, z, y, x] += p[b, k, z, y, x] * net.codebook[k].detach()
    torch.testing.assert_close(seen[0], expected)


def test_the_codebook_starts_small_and_does_not_decay():
    net = small()
    assert net.codebook.abs().max() <= 1 / 16
    decaying, free = parameter_groups(net)
    assert any(p is net.codebook for p in free["params"])
    assert any(p is net.logits.weight for p in decaying["params"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 1}, "num_codes must be at least 2, got 1"),
        ({"strides": (4, 3)}, r"strides \[4, 3\] must be powers of two"),
        ({"strides": (4,)}, r"one for each of widths \[8, 16\]"),
        ({"norm_groups": 3}, "norm_groups 3 must divide"),
    ],
)
def test_sizes_that_make_no_tokenizer_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("image", "degree", "message"),
    [
        (torch.zeros(1, 3, 16, 16), None, "takes 1 channel"),
        (torch.zeros(1, 16, 16), None, "4 or 5 axes"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), None, "torch.uint8"),
        (torch.zeros(1, 1, 16, 20), None, "multiple of the token"),
        (torch.zeros(1, 1, 4, 16, 16), 0, r"\[4, 16, 16\] must be a multiple of the token \(8, 8, 8\)"),
        (torch.zeros(1, 1, 4, 16, 16), 6, "anisotropy must be 0"),
    ],
)
def test_images_it_cannot_read_are_refused(image, degree, message):
    with pytest.raises(InputError, match=message):
        small()(image, degree)


# Losses of the quantiser


def test_usage_and_entropy_equal_the_formulas():
    p = torch.randn(3, 5, 2, 4, dtype=torch.double).softmax(1)
    used, entropy = [0.0] * 5, 0.0
    for b in range(3):
        for z in range(2):
            for y in range(4):
                for k in range(5):
                    used[k] += p[b, k, z, y].item() / 24
                    entropy -= p[b, k, z, y].item() * math.log(p[b, k, z, y].item()) / 24
    assert code_usage(p.log()).item() == pytest.approx(sum(u * math.log(u) for u in used), rel=1e-5)
    assert code_entropy(p.log()).item() == pytest.approx(entropy, rel=1e-5)


def test_usage_is_least_where_all_codes_are_used_alike_however_sure_each_token_is():
    even, sure = torch.zeros(8, 8, 4).log_softmax(1), (1e4 * torch.eye(8)[..., None]).log_softmax(1)
    for log_p in (even, sure):
        assert code_usage(log_p).item() == pytest.approx(-math.log(8))
    assert code_usage(torch.randn(8, 8, 4).log_softmax(1)) > -math.log(8)
    assert code_usage(sure[:1]).item() == pytest.approx(0, abs=1e-6)


def test_entropy_is_0_where_each_token_is_one_code_and_largest_where_it_is_all_of_them():
    assert code_entropy((1e4 * torch.eye(8)[..., None]).log_softmax(1)) == 0
    assert code_entropy(torch.zeros(2, 8, 4).log_softmax(1)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("term", [code_usage, code_entropy])
def test_terms_are_finite_float32_with_finite_gradients_where_probabilities_underflow(term, dtype):
    logits = torch.tensor([[3e4, 0.0, -3e4], [3e4, 3e4, -3e4]], dtype=dtype, requires_grad=True)
    value = term(logits[..., None].log_softmax(1))
    value.backward()
    assert value.dtype is torch.float32
    assert value.isfinite()
    assert logits.grad.isfinite().all()


# Training of the tokenizer


def volumes(n=2, depth=8):
    return {"image": torch.rand(n, 1, depth, 16, 16) * 2 - 1, "key": random_keys(n)}


def judge():
    return PatchDiscriminator(1, (8, 16), norm_groups=4)


def gradients(value, module):
    return torch.autograd.grad(value, [*module.parameters()], retain_graph=True, allow_unused=True)


def test_the_loss_is_the_terms_in_the_published_proportions():
    method = SPADTokenizer(small(), judge(), EncoderFeatures(encoder()), gate=math.inf)
    out = method(volumes())
    weights = {"l1": 1, "perceptual": 2, "usage": 0.03, "entropy": 1, "adversarial": 3e-3, "discriminator": 1}
    assert out.keys() == {"loss", *weights}
    torch.testing.assert_close(out["loss"], sum(weight * out[name] for name, weight in weights.items()))


def test_terms_equal_their_formulas():
    method, data = SPADTokenizer(small(), judge(), gate=math.inf), volumes()
    out, net = method(data), method.encoder
    p = net(data["image"], 0).softmax(1)
    decoded = net.decode(p, 0)
    real, fake = method.discriminator(data["image"], 0), method.discriminator(decoded, 0)
    torch.testing.assert_close(out["l1"], (decoded - data["image"]).abs().mean())
    torch.testing.assert_close(out["entropy"], -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(
        out["discriminator"], ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    )
    torch.testing.assert_close(out["adversarial"], -fake.mean())


def test_each_player_has_the_gradient_of_its_own_loss_alone():
    method, data = SPADTokenizer(small(), judge(), gate=math.inf), volumes()
    out = method(data)
    assert gradients(out["discriminator"], method.encoder) == (None,) * len([*method.encoder.parameters()])
    assert gradients(out["adversarial"], method.discriminator) == (None,) * len([*method.discriminator.parameters()])
    net, rival = method.encoder, method.discriminator
    decoded = net.decode(net(data["image"], 0).softmax(1), 0)
    own = hinge_loss(rival(data["image"], 0), rival(decoded.detach(), 0))
    generator = out["l1"] + 0.03 * out["usage"] + out["entropy"] - 3e-3 * rival(decoded, 0).mean()
    for player, loss in ((rival, own), (net, generator)):
        for found, expected in zip(gradients(out["loss"], player), gradients(loss, player), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Brightness(nn.Module):
    """A discriminator that is right about bright images."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1e3))

    def forward(self, image, anisotropy):
        return self.factor * (image.mean((1, 2, 3, 4)) - 5)


def test_the_adversarial_term_counts_while_the_discriminator_wins_now_and_on_average():
    method, bright = SPADTokenizer(small(), Brightness()), {"image": torch.full((2, 1, 16, 16), 10.0)}
    opened = [bool(method(bright)["adversarial"]) for _ in range(15)]
    # From 0.1, a tenth less each time: 0.1 * 0.9^13 is above 0.025, 0.1 * 0.9^14 is not.
    assert opened == [False] * 13 + [True] * 2
    assert method.discriminator_loss.item() == pytest.approx(0.1 * 0.9**15)
    assert method({"image": torch.zeros(2, 1, 16, 16)})["adversarial"] == 0
    assert method.discriminator_loss > 1
    assert method(bright)["adversarial"] == 0
    # Right on average, and not now: one loss of 2 leaves a small average below the gate.
    method.gate, method.discriminator_loss = 0.5, torch.tensor(0.0)
    assert method({"image": torch.full((2, 1, 16, 16), 4.999)})["adversarial"] == 0
    assert 0 < method.discriminator_loss < 0.5


def test_the_gate_is_state_that_evaluation_does_not_move():
    method = SPADTokenizer(small(), judge())
    assert method.state_dict()["discriminator_loss"].item() == pytest.approx(0.1)
    method.eval()(volumes())
    assert method.discriminator_loss.item() == pytest.approx(0.1)
    method.train()(volumes())
    assert method.discriminator_loss > 0.1


def test_without_discriminator_and_perceptual_network_their_terms_are_left_out():
    out = SPADTokenizer(small(), None)(volumes())
    assert out.keys() == {"loss", "l1", "usage", "entropy"}


def test_the_perceptual_distance_is_that_of_feature_vectors_summed_over_layers():
    one, other = ([torch.randn(2, 3, 4, 5), torch.randn(2, 6, 2, 2)] for _ in range(2))
    expected = 0.0
    for f, g in zip(one, other, strict=True):
        cells = [(b, y, x) for b in range(2) for y in range(f.shape[2]) for x in range(f.shape[3])]
        for b, y, x in cells:
            expected += ((f[b, :, y, x] - g[b, :, y, x]) ** 2).sum().item() / len(cells)
    assert perceptual_loss(one, other).item() == pytest.approx(expected, rel=1e-5)
    assert perceptual_loss(one, one) == 0


def test_of_an_encoder_vectors_of_unit_length_are_compared():
    vit, image = encoder((16, 24)), torch.randn(2, 1, 16, 24)
    maps = EncoderFeatures(vit, blocks=[0, 2])(image)
    for found, raw in zip(maps, vit.features(image, [0, 2]), strict=True):
        for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 3))).tolist():
            vector = raw[b, :, 0, y, x]
            torch.testing.assert_close(found[b, :, 0, y, x], vector / vector.square().sum().sqrt())


def seen_slices(method, data):
    """The slices that the perceptual network is shown, real ones first."""
    seen = []
    handle = method.perceptual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method(data)
    handle.remove()
    return seen


def test_at_most_24_slices_of_each_volume_are_compared_and_the_key_says_which():
    method = SPADTokenizer(small(), None, EncoderFeatures(encoder((16, 16))))
    data = volumes(2, 32)
    data["image"] = data["image"] * 0 + torch.arange(64.0).view(2, 1, 32, 1, 1) / 64
    real, decoded = seen_slices(method, data)
    assert real.shape == decoded.shape == (48, 1, 16, 16)
    numbers = (real[:, 0, 0, 0] * 64).round().int()
    assert len(set(numbers[:24].tolist())) == 24
    assert numbers[:24].max() < 32 <= numbers[24:].min()
    assert torch.equal(seen_slices(method, data)[0], real)
    assert not torch.equal(seen_slices(method, data | {"key": random_keys(2)})[0], real)


def test_the_perceptual_term_is_that_of_the_slices_and_only_the_tokenizer_learns_from_it():
    features = EncoderFeatures(encoder((16, 16)), blocks=[0, 2])
    method, data = SPADTokenizer(small(), None, features), volumes()
    out = method(data)
    net = method.encoder
    decoded = net.decode(net(data["image"], 0).softmax(1), 0)
    slices = [x.transpose(1, 2).flatten(0, 1) for x in (decoded, data["image"])]
    torch.testing.assert_close(out["perceptual"], perceptual_loss(*map(features, slices)))
    out["perceptual"].backward()
    assert net.codebook.grad.any()
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())
    assert not method.train().perceptual.encoder.training


def test_images_of_several_degrees_in_one_batch_are_refused():
    with pytest.raises(InputError, match="Put one degree into a batch"):
        SPADTokenizer(small(), None)(volumes() | {"anisotropy": torch.tensor([0, 1])})


# Masked modelling of its tokens


def sure(**options):
    """A tokenizer that is sure of its tokens."""
    net = small(**options)
    net.logits.weight.data.mul_(10)
    return net


@pytest.mark.parametrize(("tokens", "visible"), [(500, 225), (100, 45)])
def test_masks_have_the_published_shares(tokens, visible):
    ratio = MaskedTokenModeling(encoder(), small()).mask_ratio
    keep, hidden = random_mask(random_keys(3), tokens, ratio)
    assert keep.shape == (3, visible)
    assert hidden.shape == (3, tokens - visible)


def slow_loss(method, image, degree, keep, hidden):
    """The text, one image at a time, its tokens in their own order; cross-entropy and its part that can be learned."""
    net, first = method.encoder, method.mask_layer
    logits = method.tokenizer.network(image, degree).flatten(2)
    losses, gaps = [], []
    for number in range(image.shape[0]):
        patches = net.patchify(image[number : number + 1], degree)
        x, angles = net.embed(patches)
        turn = None if angles is None else (angles.cos()[:, None], angles.sin()[:, None])
        shown = [0, *(1 + keep[number]).tolist()]
        part = x[:, shown]
        for block in net.blocks[:first]:
            part = block(part, None if turn is None else (turn[0][:, :, shown], turn[1][:, :, shown]))
        places = net.positions(patches.grid_size, x.device)
        full = method.mask_token.expand(1, x.shape[1], -1).clone()
        if turn is None:
            full[:, 1:] += places
        full[:, shown] = part
        for block in net.blocks[first:]:
            full = block(full, turn)
        predicted = method.head(net.norm(full))[0, 1:]
        for i in hidden[number].tolist():
            q, p = logits[number, :, i].softmax(0), predicted[i].softmax(0)
            losses.append(-(q * p.log()).sum())
            gaps.append((q * (q / p).log()).sum())
    return torch.stack(losses).mean(), torch.stack(gaps).mean()


@pytest.mark.parametrize("mask_layer", [0, 2, -1])
@pytest.mark.parametrize("rope", ["index", "none"])
@pytest.mark.parametrize(("degree", "size"), [(0, (16, 16, 24)), (2, (8, 16, 24)), (5, (1, 32, 24))])
def test_the_loss_equals_the_slow_implementation(degree, size, rope, mask_layer):
    method = MaskedTokenModeling(encoder(rope=rope, pos_embed="learn"), sure(), mask_layer=mask_layer)
    image, keys = torch.randn(2, 1, *size), random_keys(2)
    tokens = math.prod(size) // math.prod(method.encoder.patch_embed.stride(degree))
    out = method({"image": image, "key": keys, "anisotropy": degree})
    loss, kl = slow_loss(method, image, degree, *random_mask(keys, tokens, 0.55))
    torch.testing.assert_close(out["loss"], loss)
    torch.testing.assert_close(out["kl"], kl)


@pytest.mark.parametrize("image", [torch.randn(3, 1, 32, 32), torch.randn(2, 1, 16, 16, 16)])
def test_always_predicting_the_mean_soft_token_has_the_marginal_entropy_as_loss(image):
    method, keys = MaskedTokenModeling(encoder(rope="none"), sure()), random_keys(len(image))
    out = method({"image": image, "key": keys})
    grid = method.tokenizer.network(image).flatten(2).softmax(1)
    hidden = random_mask(keys, grid.shape[2], 0.55)[1]
    tokens = torch.cat([grid[n][:, hidden[n]].T for n in range(len(image))])
    always = -(tokens * tokens.mean(0).log()).sum(1).mean()
    torch.testing.assert_close(out["marginal_entropy"], always)
    assert not out["marginal_entropy"].requires_grad


@pytest.mark.parametrize("rope", ["index", "none"])
def test_predictions_differ_by_place_though_mask_tokens_are_alike(rope):
    method = MaskedTokenModeling(encoder(rope=rope), small())
    seen = []
    method.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method({"image": torch.randn(1, 1, 32, 32)})
    assert torch.pdist(seen[0][0]).min() > 1e-4


def test_the_tokenizer_is_a_frozen_copy_in_evaluation_mode():
    net = small()
    method = MaskedTokenModeling(encoder(), net).train()
    method(volumes())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.tokenizer.parameters())
    assert not method.tokenizer.network.training
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "mask_layer", "message"),
    [
        ({"strides": (4, 4)}, 0, r"tokens are 16 voxels wide, and the encoder's patches, \(8, 8, 8\), must be as wide"),
        ({"in_channels": 3}, 0, "takes 3 channel.*--in_channels 3"),
        ({}, 3, "mask_layer 3 must be"),
        ({}, -4, "mask_layer -4 must be"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_encoder_is_refused(options, mask_layer, message):
    with pytest.raises(InputError, match=message):
        MaskedTokenModeling(encoder(), small(**options), mask_layer=mask_layer)


# Files


def test_a_missing_tokenizer_file_is_named_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(
        InputError, match=r"nowhere\.safetensors: no such .*spad_tokenizer_pretraining/configs/train\.json"
    ):
        load_tokenizer(tmp_path / "nowhere.safetensors")


def test_a_tokenizer_from_a_file_that_does_not_fit_is_named_by_it(tmp_path):
    save_tokenizer(small(strides=(4, 4)), tmp_path / "tokenizer.safetensors")
    with pytest.raises(InputError, match=r"/tokenizer\.safetensors: its tokens are 16 .* Give --patch_size 16"):
        MaskedTokenModeling(encoder(), load_tokenizer(tmp_path / "tokenizer.safetensors"))


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path):
    net, image, path = small(), torch.randn(1, 1, 8, 16, 16), tmp_path / "tokenizer.safetensors"
    save_tokenizer(net, path, {"mean": 0.5}, {"method": "SPADTokenizer"})
    loaded = load_tokenizer(path)
    assert not loaded.training
    assert torch.equal(loaded(image), net(image))
    assert torch.equal(loaded.decode(loaded(image), 0), net.decode(net(image), 0))
    info = encoder_info(path)
    assert info["network"] == {"_target_": "biovfm_monai.networks.SoftTokenizer", **net.arguments}
    assert info["preprocessing"] == {"mean": 0.5}


def test_the_probe_of_a_tokenizer_equals_the_formulas(tmp_path):
    net, path = sure(), tmp_path / "tokenizer.safetensors"
    save_tokenizer(net, path, {"mean": 0.5, "std": 0.25})
    noise = torch.randint(256, (64, 64), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "a.png")
    items = [{"image": str(tmp_path / "a.png"), "modality": "microscopy"}]
    scores = TokenizerProbe(path, items, (32, 32), num_crops=3, output_path=tmp_path / "scores.json").run()
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    crops = RandomCropDataset(items, training_transform(1), (32, 32))
    errors, tokens = [], []
    for number in range(3):
        image = crops[number]["image"].float()[None]
        p = net((image - 0.5) / 0.25, 5).softmax(1)
        difference = (net.decode(p, 5) * 0.25 + 0.5).clamp(0, 1) - image
        errors.append((difference.abs().mean().item(), -10 * difference.square().mean().log10().item()))
        tokens.append(p[0].flatten(1).T.detach())
    p = torch.cat(tokens)
    used, surprise = p.mean(0), -(p * p.log()).sum(1).mean()
    expected = {
        "count": 16,
        "perplexity": math.exp(-(used * used.log()).sum()),
        "in_use": sum(float(share) >= 1 / 160 for share in used),
        "likeliest": len({int(row.argmax()) for row in p}),
        "marginal_entropy": -(used * used.log()).sum().item(),
        "token_entropy": surprise.item(),
    }
    assert scores["codes"] == pytest.approx(expected, rel=1e-4)
    means = [sum(column) / 3 for column in zip(*errors, strict=True)]
    for name in ("all", "microscopy", "anisotropy 5"):
        assert scores[name] == pytest.approx({"crops": 3, "l1": means[0], "psnr": means[1]}, rel=1e-3)


def test_a_probe_of_nothing_or_of_a_file_that_tells_too_little_is_refused(tmp_path):
    items = [{"image": torch.rand(1, 1, 32, 32), "modality": "microscopy"}]
    save_tokenizer(small(), tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match=r"bare.safetensors: its header does not say mean and std"):
        TokenizerProbe(tmp_path / "bare.safetensors", items, (32, 32))
    with pytest.raises(InputError, match="num_crops 0 must be 1 or more"):
        TokenizerProbe(tmp_path / "bare.safetensors", items, (32, 32), num_crops=0)


def test_a_tokenizer_has_no_size_to_fit_images_to(tmp_path):
    save_tokenizer(small(), tmp_path / "tokenizer.safetensors", {"mean": 0.5, "std": 0.5})
    with pytest.raises(InputError, match=r"takes any size\. Give --img_size"):
        transform_of(tmp_path / "tokenizer.safetensors")


def test_a_file_of_the_other_kind_is_refused(tmp_path):
    save_tokenizer(small(), tmp_path / "tokenizer.safetensors")
    save_encoder(encoder(), tmp_path / "encoder.safetensors")
    with pytest.raises(InputError, match="holds a SoftTokenizer, and a ViT is asked for"):
        load_encoder(tmp_path / "tokenizer.safetensors")
    with pytest.raises(InputError, match="holds a ViT, and a SoftTokenizer is asked for"):
        load_tokenizer(tmp_path / "encoder.safetensors")


def test_a_run_trains_both_players_and_leaves_a_tokenizer_file(tmp_path):
    method = SPADTokenizer(small(), judge())
    players = (method.encoder.codebook, method.discriminator.head.weight)
    before = [p.detach().clone() for p in players]
    PretrainingTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[volumes(), volumes()],
        network=method,
        optimizer=torch.optim.AdamW(parameter_groups(method), 1e-3),
        prepare_batch=lambda batch, *_, **__: batch,
        train_handlers=[EncoderHandler(tmp_path, {"mean": 0.5})],
    ).run()
    assert not any(map(torch.equal, players, before))
    path = tmp_path / "tokenizer.safetensors"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert torch.equal(load_tokenizer(path).codebook, method.encoder.codebook)
    assert encoder_info(path)["training"]["method"] == "SPADTokenizer"
