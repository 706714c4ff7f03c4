"""BioVFM's probe against a direct transcription of its description."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from biovfm_monai.draws import Use, forked, uniform
from biovfm_monai.errors import InputError
from biovfm_monai.evaluation.biovfm import BioVFMHead, biovfm_probe, biovfm_views
from biovfm_monai.evaluation.metrics import TASKS
from biovfm_monai.networks import ViT


@pytest.fixture
def parts():
    random, found = np.random.default_rng(0), []
    for count in (33, 16, 20):
        label = np.arange(count) % 3
        grey = label[:, None, None] * 40 + random.integers(0, 120, (count, 28, 28))
        found.append((grey.astype(np.uint8), label))
    return zip(*found, strict=True)


def encoder(drop_path_rate=0.3, **options):
    torch.manual_seed(1)
    network = ViT(3, (28, 28), 7, embed_dim=24, depth=3, num_heads=2, drop_path_rate=drop_path_rate, **options)
    torch.nn.init.normal_(network.norm.weight)
    return network


def transcribed(network, images, labels, task, epochs):
    """The published recipe, one step after the other, with torch and Pillow alone; the draws are the same."""
    torch.manual_seed(42)
    head = torch.nn.Linear(24, 3)
    torch.nn.init.trunc_normal_(head.weight, std=0.01), torch.nn.init.zeros_(head.bias)
    batch_norm, tokens = torch.nn.BatchNorm1d(24, affine=False, eps=1e-6), []
    network.eval().blocks[-1].register_forward_hook(lambda _module, _inputs, out: tokens.append(out))

    def features(pictures):
        stack = torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) / 255 for p in pictures])
        with torch.no_grad():
            network((stack - 0.5) / 0.5)
        return torch.nn.functional.layer_norm(tokens.pop()[:, 1:].mean(1), (24,), eps=1e-6)

    def augmented(number, epoch):
        turn, down, right = uniform(forked(torch.tensor([number + 42]), epoch), 3, Use.PROBE)[0].tolist()
        picture = Image.fromarray(images[0][number]).rotate(60 * turn - 30)
        padded = ImageOps.expand(picture, 4)
        left, top = int(9 * right), int(9 * down)
        return padded.crop((left, top, left + 28, top + 28))

    several = task == TASKS[3]
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits if several else torch.nn.functional.cross_entropy
    truth = [torch.from_numpy(of).float() if several else torch.from_numpy(of) for of in labels]
    optimizer, order = torch.optim.AdamW(head.parameters(), weight_decay=0), torch.Generator().manual_seed(42)
    least, likely = float("inf"), None
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + np.cos(np.pi * epoch / epochs)) / 2
        batch_norm.train()
        for rows in torch.randperm(33, generator=order).split(8):
            if len(rows) > 1:
                logits = head(batch_norm(features([augmented(n, epoch) for n in rows.tolist()])))
                optimizer.zero_grad()
                loss_of(logits, truth[0][rows]).backward()
                optimizer.step()
        batch_norm.eval()
        with torch.no_grad():
            validation, test = (head(batch_norm(features(map(Image.fromarray, part)))) for part in images[1:])
        if float(loss_of(validation, truth[1])) < least:
            least, likely, best = float(loss_of(validation, truth[1])), test, epoch
    return best, (likely.sigmoid() if several else likely.softmax(1)).numpy()


@pytest.mark.parametrize("task", [TASKS[0], TASKS[3]])
def test_the_probe_is_the_published_recipe_with_the_backbone_in_evaluation_mode(task, parts):
    images, labels = parts
    if task == TASKS[3]:
        labels = [np.stack([of == 0, of == 1, of > 0], 1).astype(np.int64) for of in labels]
    best, likely = transcribed(encoder(), images, labels, task, epochs=6)
    found = biovfm_probe(encoder(), images, labels, 3, task, epochs=6, batch_size=8)
    assert found.settings["epoch"] == best
    assert found.likely == pytest.approx(likely, abs=1e-5)


def test_training_the_head_leaves_the_encoder_without_stochastic_depth_and_as_it_was():
    network = encoder(drop_path_rate=0.9)
    model, image = BioVFMHead(network, 3).train(), torch.randn(4, 3, 28, 28)
    before = [p.clone() for p in network.parameters()]
    assert torch.equal(model(image), model(image))
    model(image).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert model.head.training


def test_views_are_a_function_of_their_keys_and_seldom_the_image_itself():
    image = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)
    first, again = (biovfm_views(image, torch.arange(5)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, biovfm_views(image, torch.arange(5) + 9))
    assert np.array_equal(biovfm_views(image[3:], torch.tensor([3, 4])), first[3:])


@pytest.mark.parametrize("wrong", [np.zeros((4, 28, 28, 4), np.uint8), np.zeros((4, 28, 28), np.float32)])
def test_images_that_the_protocol_does_not_know_are_refused(wrong):
    with pytest.raises(InputError, match="takes 8-bit images"):
        biovfm_probe(encoder(), [wrong] * 3, [np.array([0, 1, 2, 0])] * 3, 3, TASKS[0])
