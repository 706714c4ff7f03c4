"""Which arguments make an encoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from biovfm_monai.errors import InputError
from biovfm_monai.networks.blocks import Block

__all__ = ["block_defaults", "check_arguments", "in_3d"]

_CHOICES = {
    "pos_embed": ("sincos", "learn", "none"),
    "rope": ("none", "index", "mm", "normalised"),
    "global_pool": ("avg", "max", "token"),
}


def check_arguments(given: Mapping[str, Any]) -> tuple[int, ...]:
    """Refuse arguments of `ViT` that make no encoder; the patch, one number per axis.

    Raises:
        InputError: naming the argument, its value and the rule.
    """
    sizes = _check_sizes(given["img_size"], given["patch_size"])
    for name in ("in_channels", "embed_dim", "depth", "num_heads"):
        if not _is_count(given[name]):
            raise InputError(f"{name} must be a whole number above 0, got {given[name]!r}. Correct it.")
    if given["reg_tokens"] != 0 and not _is_count(given["reg_tokens"]):
        raise InputError(f"reg_tokens must be a whole number, got {given['reg_tokens']!r}. Correct it.")
    _check_width(given["embed_dim"], given["num_heads"], given["rope"], given["pos_embed"], len(sizes))
    if not 0 <= given["drop_path_rate"] < 1:
        raise InputError(f"drop_path_rate must be at least 0 and below 1, got {given['drop_path_rate']}")
    reference = given["ref_feat_shape"]
    if reference is not None and not (isinstance(reference, Sequence) and 2 <= len(reference) <= 3):
        raise InputError(f"ref_feat_shape must be two or three numbers of tokens, got {reference!r}. Correct it.")
    for name, choices in _CHOICES.items():
        if given[name] not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {given[name]!r}")
    if not given["no_embed_class"] and not (given["class_token"] and given["pos_embed"] == "learn"):
        raise InputError("no_embed_class False needs class_token and pos_embed 'learn'. Leave it out.")
    if given["global_pool"] == "token" and not given["class_token"]:
        raise InputError("global_pool 'token' needs class_token. Pool by 'avg', or give it one.")
    return sizes


def _check_width(width: int, heads: int, rope: str, pos_embed: str, spatial_dims: int) -> None:
    if width % heads:
        raise InputError(f"num_heads {heads} must divide embed_dim {width}")
    if rope != "none" and width // heads % 4:
        raise InputError(f"rotary positions need heads of a multiple of 4 numbers, got {width // heads}")
    if pos_embed == "sincos" and (width % 2 or width < 2 * spatial_dims):
        raise InputError(f"sincos positions need an even embed_dim of at least {2 * spatial_dims}, got {width}")


def _check_sizes(img_size: Any, patch_size: Any) -> tuple[int, ...]:
    dims = len(img_size) if isinstance(img_size, Sequence) else 0
    sizes = tuple(patch_size) if isinstance(patch_size, Sequence) else (patch_size,) * dims
    fits = dims in (2, 3) and len(sizes) == dims and all(_is_count(n) for n in (*img_size, *sizes))
    if not fits or any(n % p for n, p in zip(img_size, sizes, strict=True)):
        raise InputError(
            f"img_size {img_size} must be two or three multiples of patch_size {patch_size}. "
            "Give --img_size such as [64,64] or [32,64,64], and a --patch_size that divides it."
        )
    return sizes


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def block_defaults() -> dict[str, Any]:
    """What `Block` does unless told otherwise, so that an encoder's arguments are complete."""
    options = inspect.signature(Block).parameters.values()
    return {o.name: o.default for o in options if o.default is not o.empty and o.name not in ("drop_path", "norm_eps")}


def in_3d(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Sizes along depth, height and width; 1 along the depth of a 2D image."""
    return (sizes[-3] if len(sizes) == 3 else 1, sizes[-2], sizes[-1])
