"""LPIPS from files in the published layouts, with random weights, against its formula written with loops."""

import ast
import shlex

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from safetensors.torch import save_file

from biovfm_monai.checkpoints import load_lpips, save_encoder
from biovfm_monai.draws import random_keys
from biovfm_monai.errors import InputError
from biovfm_monai.losses.perceptual import perceptual_loss
from biovfm_monai.methods import SPADTokenizer
from biovfm_monai.networks import EncoderFeatures, LPIPSFeatures, PatchDiscriminator, SoftTokenizer, ViT

pytestmark = pytest.mark.xdist_group("lpips")
# Number in torchvision's VGG16 -> channels before and after; each stage is what is between two poolings.
STAGES = (
    {0: (3, 64), 2: (64, 64)},
    {5: (64, 128), 7: (128, 128)},
    {10: (128, 256), 12: (256, 256), 14: (256, 256)},
    {17: (256, 512), 19: (512, 512), 21: (512, 512)},
    {24: (512, 512), 26: (512, 512), 28: (512, 512)},
)
WIDTHS = (64, 128, 256, 512, 512)
BUNDLE = ROOT / "bundles/spad_tokenizer_pretraining"


def vgg16():
    """Weights that keep the size of what they are given, so that all stages see the image."""
    tensors = {"classifier.0.weight": torch.zeros(2, 3), "classifier.6.bias": torch.zeros(5)}
    for number, (before, after) in ((n, pair) for stage in STAGES for n, pair in stage.items()):
        tensors[f"features.{number}.weight"] = torch.randn(after, before, 3, 3) * (2 / (9 * before)) ** 0.5
        tensors[f"features.{number}.bias"] = 0.1 * torch.randn(after)
    return tensors


def linear():
    return {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in enumerate(WIDTHS)}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return vgg16(), linear()


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    paths = folder / "vgg16-397923af.pth", folder / "vgg.pth"
    for path, tensors in zip(paths, weights, strict=True):
        # Both were published before torch wrote archives.
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return paths


@pytest.fixture(scope="module")
def network(files):
    return load_lpips(*files)


def images(*size, n=2):
    return torch.rand(n, *size) * 2 - 1


def distance(network, one, other):
    return perceptual_loss(network(one), network(other))


def slow_stages(image, vgg):
    """Maps of one image, channels x height x width, at the end of each stage, one kernel position after the other."""
    x = (image - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
    maps = []
    for stage in STAGES:
        if maps:
            _, h, w = x.shape
            x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(len(x), h // 2, 2, w // 2, 2).max((2, 4))
        for number in stage:
            kernel, bias = (vgg[f"features.{number}.{kind}"].double().numpy() for kind in ("weight", "bias"))
            _, h, w = x.shape
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            x = bias[:, None, None] + sum(
                np.tensordot(kernel[:, :, i, j], padded[:, i : i + h, j : j + w], 1) for i in range(3) for j in range(3)
            )
            x = np.maximum(x, 0)
        maps.append(x)
    return maps


def slow_lpips(one, other, vgg, lin):
    """The published formula: per stage, squared differences of unit vectors, weighed, and averaged over positions."""
    total = 0.0
    for n, (f, g) in enumerate(zip(slow_stages(one, vgg), slow_stages(other, vgg), strict=True)):
        w = lin[f"lin{n}.model.1.weight"].double().numpy().ravel()
        cells = [(y, x) for y in range(f.shape[1]) for x in range(f.shape[2])]
        for y, x in cells:
            u, v = (a[:, y, x] / (np.sqrt((a[:, y, x] ** 2).sum()) + 1e-10) for a in (f, g))
            total += (w * (u - v) ** 2).sum() / len(cells)
    return total


@pytest.mark.parametrize("size", [(16, 16), (33, 40)])
def test_the_distance_is_the_published_formula(network, weights, size):
    one, other = images(3, *size), images(3, *size)
    slow = [slow_lpips(*(x.double().numpy() for x in pair), *weights) for pair in zip(one, other, strict=True)]
    assert distance(network, one, other).item() == pytest.approx(sum(slow) / 2, rel=1e-4)


def test_each_stage_counts_by_its_own_weights(weights, network):
    one, other = images(3, 32, 32), images(3, 32, 32)
    for number, (f, g) in enumerate(zip(network(one), network(other), strict=True)):
        w = weights[1][f"lin{number}.model.1.weight"]
        assert f.shape == (2, WIDTHS[number], 32 >> number, 32 >> number)
        torch.testing.assert_close((f.square() / w).sum(1), torch.ones(2, 32 >> number, 32 >> number))
        assert (f - g).square().sum() > 1e-3


def test_it_is_symmetric_and_0_for_equal_images(network):
    one, other = images(3, 16, 16), images(3, 16, 16)
    torch.testing.assert_close(distance(network, one, other), distance(network, other, one))
    assert distance(network, one, one) == 0
    assert distance(network, one, other) > 0


def test_a_grey_image_is_three_equal_channels(network):
    grey = images(1, 16, 24)
    for found, expected in zip(network(grey), network(grey.repeat(1, 3, 1, 1)), strict=True):
        assert torch.equal(found, expected)


def test_a_gradient_flows_to_the_image_and_to_none_of_the_frozen_weights(network):
    one = images(3, 16, 16).requires_grad_()
    distance(network.train(), one, images(3, 16, 16)).backward()
    assert one.grad.isfinite().all()
    assert one.grad.any(dim=1).all()
    assert [name for name, p in network.named_parameters() if p.requires_grad or p.grad is not None] == []


def test_where_no_channel_is_active_distance_and_gradient_are_finite(network):
    dead = LPIPSFeatures()
    dead.load_state_dict(network.state_dict())
    dead.features[28].bias.fill_(-1e6)
    one = images(3, 32, 32).requires_grad_()
    distance(dead, one, images(3, 32, 32)).backward()
    assert one.grad.any()
    assert one.grad.isfinite().all()


def test_the_files_the_wrong_way_round_are_refused(files):
    with pytest.raises(InputError, match=r"/vgg\.pth: has no features\.0\.weight, so it is not torchvision's VGG16"):
        load_lpips(*reversed(files))


def test_bf16_autocast_gives_the_same_distance_to_its_precision(network):
    one, other = images(3, 32, 32), images(3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance(network, one, other)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, distance(network, one, other), rtol=2e-2, atol=0)


def test_files_of_safetensors_are_read_as_well(files, weights, network, tmp_path):
    for name, tensors in zip(("vgg16", "linear"), weights, strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    other = load_lpips(*(tmp_path / f"{name}.safetensors" for name in ("vgg16", "linear")))
    for name, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 16, 16), r"1 or 3 channels, got a batch of \(1, 2, 16, 16\)\. Set --in_channels"),
        ((1, 3, 4, 16, 16), r"2D images of 1 or 3 channels, got a batch of \(1, 3, 4, 16, 16\)"),
        ((1, 3, 15, 64), r"at least 16 pixels along each side, got \(15, 64\)\. Give a larger --img_size"),
    ],
)
def test_images_it_cannot_compare_are_refused(network, shape, message):
    with pytest.raises(InputError, match=message):
        network(torch.zeros(shape))


def spoilt(value):
    """Weights of the first stage, with one that is no weight."""
    return torch.ones(1, 64, 1, 1).index_fill(1, torch.tensor(7), value)


# What is wrong with one of the two files -> which, what is changed in it, and what is said.
GIVE = {"vgg": "Give its state dict, such as vgg16-397923af.pth", "linear": "Give those of version 0.1"}
BAD = {
    "a missing convolution": ("vgg", {"features.2.weight": None}, "has no features.2.weight, so it is not torchvision"),
    "a missing bias": ("vgg", {"features.28.bias": None}, "has no features.28.bias"),
    "a bias too long": ("vgg", {"features.2.bias": torch.zeros(65)}, "features.2.bias is (65,) instead of (64,)"),
    "a missing stage": ("linear", {"lin4.model.1.weight": None}, "has no lin4.model.1.weight, so it is not LPIPS's"),
    "the weights of AlexNet": (
        "linear", {"lin1.model.1.weight": torch.ones(1, 192, 1, 1)},
        "lin1.model.1.weight is (1, 192, 1, 1) instead of (1, 128, 1, 1)",
    ),
    "a negative weight": ("linear", {"lin0.model.1.weight": spoilt(-0.5)}, "weight must be 0 or more, got -0.5: not"),
    "no number": ("linear", {"lin0.model.1.weight": spoilt(torch.nan)}, "weight must be 0 or more, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_something_else_is_refused_by_its_name_and_that_of_the_tensor(case, files, weights, tmp_path):
    which, changes, words = BAD[case]
    changed = weights[which == "linear"] | changes
    path = tmp_path / "changed.pth"
    torch.save({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(InputError) as caught:
        load_lpips(path if which == "vgg" else files[0], path if which == "linear" else files[1])
    assert all(part in str(caught.value) for part in (f"{path}: ", words, GIVE[which])), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["vgg", "linear"])
@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "no such checkpoint. Correct the path."),
        (lambda path: path.write_bytes(b"no weights"), "truncated, or no checkpoint"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no weights, but epoch"),
        (lambda path: torch.save(print, path), "cannot be opened without running code from it"),
    ],
    ids=["missing", "text", "no tensors", "code"],
)
def test_what_is_no_checkpoint_is_refused_by_its_name(which, write, words, files, tmp_path):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(InputError) as caught:
        load_lpips(path if which == "vgg" else files[0], path if which == "linear" else files[1])
    assert str(caught.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize(("channels", "size"), [(1, (16, 16)), (3, (16, 16)), (1, (4, 16, 16))])
def test_a_tokenizer_learns_from_it(network, channels, size):
    net = SoftTokenizer(channels, widths=(8, 16), strides=(4, 2), num_codes=16, norm_groups=4)
    method = SPADTokenizer(net, PatchDiscriminator(channels, (8, 16), norm_groups=4), network)
    before = {name: p.clone() for name, p in network.named_parameters()}
    data = {
        "image": images(channels, *size),
        "key": random_keys(2),
        "anisotropy": torch.tensor([5 if len(size) == 2 else 1]),
    }
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
    out = method(data)
    (gradient,) = torch.autograd.grad(out["perceptual"], net.codebook, retain_graph=True)
    assert gradient.any()
    out["loss"].backward()
    optimizer.step()
    assert method(data)["perceptual"] != out["perceptual"]
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize("kind", [EncoderFeatures, LPIPSFeatures])
def test_the_overrides_in_the_bundles_readme_build_their_networks(kind, files, tmp_path):
    encoder = tmp_path / "encoder.safetensors"
    save_encoder(ViT(3, (64, 64), 8, embed_dim=24, depth=2, num_heads=3), encoder)
    paths = {"encoder.safetensors": encoder, "vgg16-397923af.pth": files[0], "vgg.pth": files[1]}
    lines = [line for line in (BUNDLE / "docs/README.md").read_text().splitlines() if "--method::perceptual" in line]
    assert lines[1] in (ROOT / "docs/methods.md").read_text()
    key, value = shlex.split(lines[kind is LPIPSFeatures])
    for name, path in paths.items():
        value = value.replace(f"'{name}'", repr(str(path)))
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs/train.json")
    parser[key.removeprefix("--")] = ast.literal_eval(value)
    method = parser.get_parsed_content("method")
    assert isinstance(method.perceptual, kind)
    assert method({"image": images(3, 64, 64)})["perceptual"] > 0
