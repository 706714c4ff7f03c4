"""The encoder on a GPU: same tokens as on a CPU, packed, compiled, in half precision."""

import copy

import pytest
import torch

from biovfm_monai.networks import ViT, encode_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPAD = {"swiglu_mlp": True, "scale_mlp": True, "k_bias": False, "pos_embed": "learn", "rope": "index", "reg_tokens": 2}


def encoder():
    torch.manual_seed(0)
    return ViT(1, (16, 64, 64), 16, embed_dim=128, depth=2, num_heads=2, **SPAD).eval()


IMAGES = [((2, 1, 16, 64, 64), 0), ((1, 1, 4, 48, 64), 2), ((3, 1, 64, 80), None), ((1, 1, 64, 80), None)]


@pytest.mark.parametrize(("shape", "anisotropy"), IMAGES)
def test_tokens_on_a_gpu_are_those_on_a_cpu(shape, anisotropy):
    image, network = torch.randn(shape), encoder()
    on_gpu = copy.deepcopy(network).cuda()(image.cuda(), anisotropy)
    torch.testing.assert_close(on_gpu.cpu(), network(image, anisotropy), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_packed_images_have_the_tokens_of_each_on_its_own(dtype, tolerance):
    network, images = encoder().cuda(), [torch.randn(shape).cuda() for shape, _ in IMAGES]
    degrees = [degree for _, degree in IMAGES]
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        packed = encode_packed(network, images, degrees)
        alone = [network(image, degree) for image, degree in zip(images, degrees, strict=True)]
    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=tolerance)


def test_a_compiled_encoder_has_the_same_tokens_and_gradients():
    network, image = encoder().cuda(), torch.randn(2, 1, 4, 64, 64).cuda()
    results = []
    for one in (network, torch.compile(network, fullgraph=True)):
        network.zero_grad()
        tokens = one(image, 2)
        tokens.square().mean().backward()
        results.append([tokens, *(p.grad for p in network.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


def test_activation_checkpointing_lowers_the_peak_of_memory():
    peaks = []
    for checkpointing in (False, True):
        network, image = encoder().cuda().train(), torch.randn(8, 1, 16, 256, 256).cuda()
        network.grad_checkpointing = checkpointing
        torch.cuda.reset_peak_memory_stats()
        network(image, 0).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del network
    assert peaks[1] < 0.9 * peaks[0]
