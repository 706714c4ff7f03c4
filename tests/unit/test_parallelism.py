"""What is kept, computed anew or compiled changes no result; two processes are in tests/distributed."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from biovfm_monai.engines import parameter_groups
from biovfm_monai.errors import InputError
from biovfm_monai.methods import MAE
from biovfm_monai.networks import ViT
from biovfm_monai.parallelism import inner, local, parallel, whole

BATCH = {"image": torch.rand(2, 1, 64, 64), "key": torch.arange(2)}


def method():
    torch.manual_seed(0)
    encoder = ViT(1, (64, 64), 8, embed_dim=48, depth=3, num_heads=3, drop_path_rate=0.2)
    return MAE(encoder, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=3)


def step(network):
    """The gradients of a step, how many bytes autograd kept for it, and the operations of its backward pass."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(1)
    with saved_tensors_hooks(keep, lambda x: x):
        loss = network(BATCH)["loss"]
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients, sum(kept.values()), counter.get_total_flops()


def test_what_is_computed_anew_is_the_same_and_need_not_be_kept():
    names = "none", "selective", "full"
    gradients, kept, flops = zip(*(step(parallel(method(), "cpu", checkpointing=name)) for name in names), strict=True)
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=0, atol=0)
    assert kept[2] < 0.5 * kept[0]
    # Matrix products, nearly all there is to compute, are done again by "full" alone.
    assert flops[1] == flops[0]
    assert flops[2] > 1.2 * flops[0]


def test_nothing_is_computed_twice_where_there_is_no_backward_pass():
    network = parallel(method(), "cpu", checkpointing="full")
    calls = []
    network.encoder.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(BATCH)
    assert len(calls) == 1
    network(BATCH)["loss"].backward()
    assert len(calls) == 3


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients():
    plain, compiled = (step(parallel(method().eval(), "cpu", compiled=chosen))[0] for chosen in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


def test_one_process_needs_no_parts():
    network = method()
    assert parallel(network, "cpu", sharding="full") is network
    assert inner(network) is network
    assert len(parameter_groups(network)) == 2
    weights = {"a": [network.mask_token]}
    assert whole(weights) == weights
    assert local(network.mask_token) is network.mask_token


def test_names_of_weights_stay_as_they_are():
    network = method()
    names = list(network.state_dict())
    assert list(parallel(copy.deepcopy(network), "cpu", checkpointing="selective").state_dict()) == names


@pytest.mark.parametrize("options", [{"sharding": "zero"}, {"checkpointing": "some"}])
def test_an_unknown_choice_is_refused(options):
    with pytest.raises(InputError, match=r"is unknown\. Give one of none, "):
        parallel(method(), "cpu", **options)
