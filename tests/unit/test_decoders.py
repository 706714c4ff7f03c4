"""Decoders and heads: a label for every voxel or image, of 2D images, isotropic and thick-slice volumes."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss

from biovfm_monai.checkpoints import encoder_to_finetune, save_encoder
from biovfm_monai.errors import InputError
from biovfm_monai.losses import OrdinalLoss, grades
from biovfm_monai.networks import (
    AttentivePool,
    Classifier,
    ClassToken,
    DeepSupervision,
    LightDecoder,
    LinearDecoder,
    MaxPatches,
    MeanPatches,
    Segmenter,
    UNETRDecoder,
    spad_vit_tiny,
    vit_tiny,
)

DECODERS = [LinearDecoder, LightDecoder, UNETRDecoder]
KINDS = {"2D": ((32, 32), None), "isotropic": ((16, 16, 16), None), "thick": ((4, 16, 16), [4.0, 1.0, 1.0])}


def encoder(patch_size=8, in_channels=1, **options):
    return spad_vit_tiny(in_channels, (16, 16, 16), patch_size, embed_dim=48, depth=4, **{"num_heads": 3, **options})


def segmenter(make, out_channels=3, **options):
    body = encoder(**options)
    return Segmenter(body, out_channels, make(body))


@pytest.fixture(params=DECODERS, ids=lambda made: made.__name__)
def decoder(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_the_images_size_and_every_trainable_parameter_gets_a_gradient(decoder, kind):
    size, spacing = KINDS[kind]
    network = segmenter(decoder, in_channels=2)
    logits = network(torch.randn(2, 2, *size), spacing=spacing)
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("depth", [16, 8, 4, 2, 1])
def test_patches_of_16_serve_every_thickness_of_slices(decoder, depth):
    size = (depth, 32, 32)
    logits = segmenter(decoder, patch_size=16)(torch.randn(1, 1, *size), spacing=[16 / depth, 1.0, 1.0])
    assert logits.shape == (1, 3, *size)


def test_a_slice_is_labelled_alike_as_an_image_and_as_a_volume_of_depth_one(decoder):
    network, image = segmenter(decoder).eval(), torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(network(image), network(image[:, :, None], anisotropy=5)[:, :, 0])


def test_an_encoder_of_2d_images_labels_a_volume_slice_by_slice(decoder):
    body = vit_tiny(1, (16, 16), 8, embed_dim=48, depth=4)
    network = Segmenter(body, 3, decoder(body)).eval()
    volume = torch.randn(2, 1, 5, 16, 16)
    expected = torch.stack([network(volume[:, :, number]) for number in range(5)], dim=2)
    torch.testing.assert_close(network(volume), expected)


def test_the_spacing_comes_from_a_volumes_affine_or_the_networks_own(decoder):
    body = encoder()
    network, image = Segmenter(body, 2, decoder(body)).eval(), torch.randn(1, 1, 4, 16, 16)
    expected = network(image, spacing=[4.0, 1.0, 1.0])
    affine = torch.diag(torch.tensor([4.0, 1, 1, 1]))
    network_of_thick = Segmenter(body, 2, network.decoder, spacing=[4, 1, 1]).eval()
    network_of_thick.head = network.head
    torch.testing.assert_close(network(MetaTensor(image, affine=affine)), expected)
    torch.testing.assert_close(network_of_thick(image), expected)


def test_a_sliding_window_labels_a_volume_of_any_size(decoder):
    body = encoder()
    network = Segmenter(body, 2, decoder(body), spacing=[4, 1, 1]).eval()
    image = MetaTensor(torch.randn(1, 1, 7, 21, 30), affine=torch.eye(4))
    with torch.no_grad():
        assert sliding_window_inference(image, (4, 16, 16), 2, network, overlap=0.25).shape == (1, 2, 7, 21, 30)


def test_torchscript_gives_the_same_logits(decoder):
    network = segmenter(decoder).eval()
    scripted = torch.jit.script(network)
    for size, spacing in KINDS.values():
        image = torch.randn(1, 1, *size)
        torch.testing.assert_close(scripted(image, spacing=spacing), network(image, spacing=spacing))


def test_one_batch_is_learnt_by_heart(decoder):
    network = segmenter(decoder, out_channels=2)
    image = torch.rand(2, 1, 16, 16, 16)
    truth = torch.zeros(2, 1, 16, 16, 16)
    truth[0, :, :8], truth[1, :, :, 8:] = 1, 1
    image = image * 0.1 + truth
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = loss_function(network(image), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_a_frozen_encoder_stays_as_it_is_while_the_rest_learns():
    network = segmenter(UNETRDecoder)
    network.encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    network(torch.randn(1, 1, 16, 16, 16)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "head"}


@pytest.mark.parametrize("make", [LightDecoder, UNETRDecoder])
@pytest.mark.parametrize("kind", KINDS)
def test_deep_supervision_trains_a_head_at_each_level(make, kind):
    size, spacing = KINDS[kind]
    network = DeepSupervision(segmenter(make))
    image, truth = torch.randn(2, 1, *size), torch.randint(0, 3, (2, 1, *size)).float()
    found = network(image, spacing=spacing)
    assert [x.shape[-1] for x in found] == [size[-1], size[-1] // 2, size[-1] // 4]
    DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))(found, truth).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    network.eval()
    torch.testing.assert_close(network(image, spacing=spacing), network.segmenter(image, spacing=spacing))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LightDecoder(vit_tiny(1, (28, 28), 14)), "a power of two.*Take LinearDecoder"),
        (lambda: UNETRDecoder(encoder(), width=12), "multiple of 8"),
        (lambda: UNETRDecoder(vit_tiny(1, (32, 32), 16, depth=2)), r"too few for the 4 taps.*LightDecoder"),
        (lambda: Segmenter(encoder(), 0), "out_channels 0"),
        (lambda: Segmenter(encoder(), 2, "unet"), "decoder 'unet' is unknown. Give one of linear, light, unetr"),
        (lambda: Segmenter(encoder(), 2, spacing=[1, 1, 2]), "mm high"),
        (lambda: DeepSupervision(segmenter(LinearDecoder)), "levels 2"),
        (lambda: AttentivePool(48, 5), "num_heads 5 must divide"),
        (lambda: segmenter(LightDecoder)(torch.zeros(1, 2, 16, 16, 16)), "takes 1 channel"),
        (lambda: segmenter(LightDecoder)(torch.zeros(1, 1, 12, 16, 16)), "multiple of the patch"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(make, message):
    with pytest.raises(InputError, match=message):
        make()


POOLS = [None, MeanPatches(), MaxPatches(), ClassToken(), AttentivePool(48, 4)]


@pytest.mark.parametrize("pooling", POOLS, ids=lambda made: type(made).__name__)
def test_a_classifier_maps_every_kind_of_image_to_logits_and_trains_whole(pooling):
    network = Classifier(encoder(), 5, pooling)
    for size, spacing in KINDS.values():
        logits = network(torch.randn(2, 1, *size), spacing=spacing)
        assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    scripted, image = torch.jit.script(network.eval()), torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(scripted(image), network(image))


def test_attentive_pooling_equals_torchs_multi_head_attention():
    ours, theirs = AttentivePool(48, 4), torch.nn.MultiheadAttention(48, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(48), ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([torch.zeros(48), ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    tokens = torch.randn(2, 9, 48)
    expected = theirs(ours.query.expand(2, -1, -1), tokens, tokens)[0][:, 0]
    torch.testing.assert_close(ours(tokens, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss_function", "logits", "target", "right"),
    [
        (torch.nn.CrossEntropyLoss(), 3, torch.tensor([0, 1, 2, 2]), lambda x, y: x.argmax(1) == y),
        (torch.nn.BCEWithLogitsLoss(), 2, torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0]]), lambda x, y: (x > 0) == y),
        (OrdinalLoss(), 2, torch.tensor([0, 1, 2, 2]), lambda x, y: grades(x) == y),
    ],
    ids=["one class", "several findings", "grades"],
)
def test_classes_findings_and_grades_are_learnt(loss_function, logits, target, right):
    network, image = Classifier(encoder(), logits), torch.randn(4, 1, 16, 16, 16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(30):
        loss = loss_function(network(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert right(network(image), target).all()


def test_the_ordinal_loss_is_the_mean_over_questions():
    logits, target = torch.tensor([[0.3, -1.0], [2.0, 0.5]]), torch.tensor([1, 2])
    yes = torch.sigmoid(logits)
    expected = -(yes[0, 0].log() + (1 - yes[0, 1]).log() + yes[1, 0].log() + yes[1, 1].log()) / 4
    torch.testing.assert_close(OrdinalLoss()(logits, target), expected)
    with pytest.raises(ValueError, match="grades must be 0 to 2, got 1 to 3"):
        OrdinalLoss()(logits, torch.tensor([1, 3]))


def test_a_loaded_encoder_gives_the_tokens_that_it_gave_when_it_was_saved(tmp_path):
    trained, image = encoder().eval(), torch.randn(1, 1, 16, 16, 16)
    save_encoder(trained, tmp_path / "encoder.safetensors", {"mean": 0.5, "std": 0.5})
    fresh = encoder(drop_path_rate=0.2)
    network = Segmenter(encoder_to_finetune(fresh, tmp_path / "encoder.safetensors", 0.5, 0.5), 3).eval()
    assert torch.equal(network.encoder(image), trained(image))
    assert network.encoder.blocks[-1].drop_path.rate == pytest.approx(0.2)
    assert encoder_to_finetune(fresh) is fresh


def test_a_grey_encoder_is_given_more_channels_and_equal_ones_give_the_same_tokens(tmp_path):
    trained, image = encoder().eval(), torch.randn(1, 1, 16, 16, 16)
    save_encoder(trained, tmp_path / "encoder.safetensors")
    wider = encoder_to_finetune(encoder(in_channels=4), tmp_path / "encoder.safetensors").eval()
    torch.testing.assert_close(wider(image.expand(-1, 4, -1, -1, -1)), trained(image))


@pytest.mark.parametrize(
    ("saved", "fresh", "message"),
    [
        (encoder(in_channels=3), encoder(in_channels=2), r"e\.safetensors: cannot make 3 channels 2.*--in_channels 3"),
        (vit_tiny(1, (16, 16), 8, depth=1), encoder(), r"e\.safetensors: an encoder of 2D images.*--volume_size \[16"),
        (encoder(), encoder(), r"e\.safetensors: was trained on images of mean 0\.2, .*--mean 0\.2"),
    ],
)
def test_an_encoder_that_does_not_fit_the_task_is_refused_by_name(tmp_path, saved, fresh, message):
    save_encoder(saved, tmp_path / "e.safetensors", {"mean": 0.2, "std": 0.5})
    with pytest.raises(InputError, match=message):
        encoder_to_finetune(fresh, tmp_path / "e.safetensors", 0.5 if "mean" in message else None)
