"""MAE against an independent slow implementation, and its parameter totals."""

import pytest
import torch

from biovfm_monai.draws import random_keys
from biovfm_monai.errors import InputError
from biovfm_monai.methods import MAE
from biovfm_monai.networks import ViT, random_mask, sincos_positions, vit_base, vit_large, vit_small, vit_tiny


@pytest.mark.parametrize(
    ("preset", "millions"), [(vit_tiny, 31.20), (vit_small, 47.40), (vit_base, 111.66), (vit_large, 329.24)]
)
def test_encoder_and_default_decoder_have_the_published_total(preset, millions):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in MAE(preset()).parameters()) / 1e6, 2) == millions


def slow_loss(mae, image, keep, hidden):
    """The paper's text, one image and one patch at a time; image B x C x D x H x W."""
    encoder = mae.encoder
    pd, ph, pw = encoder.patch_embed.patch_size
    depth, height, width = (n // p for n, p in zip(image.shape[2:], (pd, ph, pw), strict=True))
    losses = []
    for number in range(image.shape[0]):
        patches = [
            image[number, :, z * pd : z * pd + pd, y * ph : y * ph + ph, x * pw : x * pw + pw].movedim(0, 3).flatten()
            for z in range(depth) for y in range(height) for x in range(width)
        ]  # fmt: skip
        places = sincos_positions((depth, height, width), encoder.embed_dim, encoder.spatial_dims)
        visible = [encoder.cls_token[0, 0]]
        visible += [
            encoder.patch_embed.weight @ patches[i] + encoder.patch_embed.bias + places[i] for i in keep[number]
        ]
        x = torch.stack(visible)[None]
        for block in encoder.blocks:
            x = block(x)
        latent = mae.decoder_embed(encoder.norm(x))[0]
        places = sincos_positions((depth, height, width), latent.shape[1], encoder.spatial_dims)
        full = [mae.mask_token[0, 0] + places[i] for i in range(len(patches))]
        for row, i in enumerate(keep[number].tolist()):
            full[i] = latent[1 + row] + places[i]
        x = torch.stack([latent[0], *full])[None]
        for block in mae.decoder_blocks:
            x = block(x)
        predictions = mae.decoder_pred(mae.decoder_norm(x))[0, 1:]
        for i in hidden[number].tolist():
            target = patches[i]
            if mae.norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            losses.append(((predictions[i] - target) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("size", [(24, 32), (16, 16, 24)])
def test_the_loss_equals_the_slow_implementation(size, norm_pix_loss):
    mae = MAE(ViT(2, size, 8, embed_dim=24, depth=2, num_heads=3), 0.7, 16, 2, 2, norm_pix_loss)
    image = torch.randn(3, 2, *size)
    tokens = image[0, 0].numel() // 8 ** len(size)
    torch.manual_seed(5)
    loss = mae({"image": image})["loss"]
    torch.manual_seed(5)
    keep, hidden = random_mask(random_keys(3), tokens, 0.7)
    expected = slow_loss(mae, image if image.ndim == 5 else image[:, :, None], keep, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_what_visible_patches_look_like_matters_and_hidden_ones_only_as_target():
    mae = MAE(ViT(1, (32, 32), 8, embed_dim=24, depth=2, num_heads=3), 0.5, 16, 1, 2, norm_pix_loss=False)
    image = torch.randn(1, 1, 32, 32, requires_grad=True)
    torch.manual_seed(3)
    predicted = mae._predict(mae._patches({"image": image}), *(pair := random_mask(random_keys(1), 16, 0.5)))
    predicted.sum().backward()
    touched = image.grad.view(4, 8, 4, 8).abs().sum((1, 3)).flatten() > 0
    assert touched[pair[0][0]].all()
    assert not touched[pair[1][0]].any()


def test_a_reconstruction_keeps_the_visible_patches_and_a_masked_image_hides_its_share():
    mae = MAE(ViT(1, (32, 32), 8, embed_dim=24, depth=2, num_heads=3), 0.75, 16, 1, 2)
    image = torch.rand(2, 1, 32, 32) + 1
    masked, filled = mae.reconstruct({"image": image})
    visible = masked != 0
    assert visible.float().mean() == 0.25
    assert torch.equal(filled[visible], image[:, :, None][visible])
    assert not torch.equal(filled, image[:, :, None])


def test_a_thick_slice_volume_is_trained_at_its_anisotropy():
    mae = MAE(ViT(1, (16, 32, 32), 16, embed_dim=24, depth=1, num_heads=3), 0.5, 16, 1, 2)
    for anisotropy, depth in [(0, 32), (2, 8), (5, 2)]:
        loss = mae({"image": torch.randn(2, 1, depth, 32, 32), "anisotropy": anisotropy})["loss"]
        loss.backward()
        assert loss.isfinite()


def test_a_decoder_whose_heads_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="must divide"):
        MAE(ViT(1, (32, 32), 8, embed_dim=24, depth=1, num_heads=3), decoder_embed_dim=10, decoder_num_heads=3)


def test_a_batch_has_one_degree_of_anisotropy():
    mae = MAE(ViT(1, (16, 32, 32), 8, embed_dim=24, depth=1, num_heads=3), 0.75, 16, 1, 2)
    image = torch.randn(2, 1, 4, 32, 32)
    losses = []
    for given in (1, torch.tensor(1), torch.tensor([1, 1])):
        torch.manual_seed(0)
        losses.append(mae({"image": image, "anisotropy": given})["loss"])
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(InputError, match=r"degrees of anisotropy \[1, 2\]"):
        mae({"image": image, "anisotropy": torch.tensor([1, 2])})
