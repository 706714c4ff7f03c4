"""The methods that the contract tests go through; add a line for a new one."""

import torch

from biovfm_monai.methods import (
    IJEPA,
    MAE,
    BarlowTwins,
    DINOv2,
    LeJEPA,
    MaskedTokenModeling,
    MoCoV3,
    SimMIM,
    SPADTokenizer,
    VICReg,
)
from biovfm_monai.networks import EncoderFeatures, PatchDiscriminator, SoftTokenizer, ViT

SMALL_HEAD = {
    "prototypes": 12,
    "hidden_dim": 24,
    "bottleneck_dim": 8,
    "mask_probability": 1.0,
    "freeze_last_layer": 0.0,
}
METHODS = {
    "MAE": lambda encoder: MAE(encoder, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=3),
    "DINOv2": lambda encoder: DINOv2(encoder, **SMALL_HEAD),
    "DINOv2, centred, two heads": lambda encoder: DINOv2(encoder, **SMALL_HEAD, separate_heads=True, centering="mean"),
    "DINOv2, queue": lambda encoder: DINOv2(encoder, **SMALL_HEAD, queue=20),
    "DINOv2, drop-path": lambda encoder: DINOv2(
        ViT(**{**encoder.arguments, "drop_path_rate": 0.2}), **SMALL_HEAD, queue=20
    ),
    "SimMIM": lambda encoder: SimMIM(encoder, mask_ratio=0.25, mask_size=16),
    "IJEPA": lambda encoder: IJEPA(encoder, predictor_embed_dim=24, predictor_depth=1),
    "MoCoV3": lambda encoder: MoCoV3(encoder, hidden_dim=32, projection_dim=16),
    "BarlowTwins": lambda encoder: BarlowTwins(encoder, projector_dims=(32, 32, 16)),
    "VICReg": lambda encoder: VICReg(encoder, projector_dims=(32, 32, 16)),
    "LeJEPA": lambda encoder: LeJEPA(encoder, projector_dims=(32, 32, 8), num_slices=64),
    "MaskedTokenModeling": lambda encoder: MaskedTokenModeling(encoder, tokenizer(sureness=10), mask_layer=1),
    "SPADTokenizer": lambda encoder: SPADTokenizer(tokenizer(), discriminator(), EncoderFeatures(encoder)),
}
SIZES = {"2D": (32, 32), "3D": (16, 32, 32)}


def encoder(size):
    return ViT(1, size, 8, embed_dim=24, depth=2, num_heads=3)


def tokenizer(sureness=1):
    """A tokenizer of patches of 8; the surer it is of its tokens, the more there is to learn of them."""
    made = SoftTokenizer(1, widths=(8, 16), strides=(4, 2), num_codes=16, norm_groups=4)
    made.logits.weight.data.mul_(sureness)
    return made


def discriminator():
    """A discriminator whose logits leave the hinge's margin, inside which its last bias has no gradient."""
    made = PatchDiscriminator(1, (8, 16), norm_groups=4)
    made.head.weight.data.mul_(4)
    return made


def batch(size, n=4):
    """Images, two large views of each and three small ones, and keys: each method takes what it needs."""
    small = tuple(max(side // 2, 8) for side in size)
    image = torch.randn(n, 1, *size)
    # Views of an image have something in common.
    return {
        "image": image,
        "global_crops": image + 0.3 * torch.randn(2, n, 1, *size),
        "local_crops": image[(..., *(slice(side) for side in small))] + 0.3 * torch.randn(3, n, 1, *small),
        "key": torch.randint(2**62, (n,)),
    }


def of_rank(data, rank, processes):
    """The part of a batch that one of several processes gets."""
    rows = slice(rank, None, processes)
    return {name: value[:, rows] if name.endswith("crops") else value[rows] for name, value in data.items()}
