"""How other projects write the weights of a ViT, and what reading and writing them share.

A source (one file each beside this one) is a `Layout`: a table of our names and its own, and what they do not tell.
What it neither takes nor drops by name is an error, and so is what has no place in it on the way out, so that nothing
is silently wrong.

In a table "{n}" stands for a block's number and "{k}" for weight and bias. Query, key and value, and gate and value of
SwiGLU, may be separate tensors there: their names with spaces between. Those that a checkpoint may lack end in "?".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from biovfm_monai.checkpoints.encoder import load_exactly
from biovfm_monai.checkpoints.read import renamed
from biovfm_monai.checkpoints.weights import Weights
from biovfm_monai.errors import InputError
from biovfm_monai.networks import ViT

__all__ = ["Layout", "require"]


@dataclass(frozen=True)
class Layout:
    """How a project writes the weights of its ViTs.

    Attributes:
        source: its name, for messages.
        names: our name -> theirs, see above.
        published: width -> heads of its networks.
        left_out: regular expressions of what an encoder has no use for.
        rename: a name as it may stand in a file -> the one in `names`.
        spatial_dims: of its images.
        class_position: whether the positions begin with the class token's; None for either, as it may be in a file.
        options: of `ViT` that shapes do not tell.
        always: options that shapes do tell, and what they are in all its networks.
    """

    source: str
    names: Mapping[str, str]
    published: Mapping[int, int]
    left_out: tuple[str, ...] = ()
    rename: Callable[[str], str] = str
    spatial_dims: tuple[int, ...] = (2, 3)
    class_position: bool | None = True
    options: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)

    def read(
        self, tensors: Mapping[str, Tensor], num_heads: int | None = None, img_size: Sequence[int] | None = None
    ) -> tuple[ViT, list[str]]:
        """An encoder from weights in this layout, and the names of what was left out.

        Args:
            tensors: as from `read_weights`.
            num_heads: None for those of the published networks of that width.
            img_size: size that the network was made for; None for a square or cube.

        Raises:
            InputError: when a tensor is missing, unknown or of no use, img_size means nothing, or heads or the grid
                of positions cannot be told.
        """
        weights = Weights(renamed(tensors, self.rename), self.source)
        weights.drop(*self.left_out)
        state = _take_vit(weights, self.names)
        weights.finish()
        self._check_kernel(state["kernel"], weights)
        _check_size(img_size, state["kernel"].shape[2:])
        if "pos_embed" in state and state["pos_embed"].ndim < 5:
            _split_positions(state, img_size, self.class_position)
        encoder = _build(state, num_heads, self.published, img_size, **self.options)
        for name, value in self.always.items():
            if encoder.arguments[name] != value:
                raise InputError(
                    f"networks of {self.source!r} have {name} {value!r}; this one would compute something else."
                )
        return encoder, weights.dropped

    def _check_kernel(self, kernel: Tensor, weights: Weights) -> None:
        if kernel.ndim - 2 not in self.spatial_dims:
            axes = " or ".join(str(dims + 2) for dims in self.spatial_dims)
            looks = weights.looks(own=True)
            raise InputError(f"patch kernels of {self.source!r} have {axes} axes, this one has {kernel.ndim}.{looks}")

    def write(self, encoder: ViT) -> dict[str, Tensor]:
        """An encoder's tensors in this layout; positions, fixed ones too, as a table for the encoder's img_size.

        Raises:
            InputError: when a tensor has no place there, or one that it must have is missing.
        """
        if self.class_position is None:
            raise ValueError("class_position must be known to write")
        state = {name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()}
        kernel = state["patch_embed.weight"].unflatten(1, (-1, encoder.in_channels)).transpose(1, 2)
        state["patch_embed.weight"] = kernel.unflatten(2, encoder.patch_size)
        _join_positions(state, encoder, self.class_position)
        given: dict[str, Tensor] = {}
        for ours, theirs in _entries(self.names):
            for count in range(len(encoder.blocks) if "{n}" in ours else 1):
                tensor = state.pop(ours.replace("{n}", str(count)), None)
                if tensor is None and not theirs.endswith("?"):
                    raise InputError(f"an encoder without {ours} cannot be written as {self.source}, which has one.")
                if tensor is not None:
                    parts = theirs.rstrip("?").replace("{n}", str(count)).split()
                    # Biases of queries and values are the rows of one tensor.
                    rows = tensor.flatten() if ours.endswith("qv_bias") else tensor
                    given |= {n: t.contiguous() for n, t in zip(parts, rows.chunk(len(parts)), strict=True)}
        if state:
            raise InputError(f"the layout {self.source!r} has no place for {', '.join(sorted(state)[:5])}.")
        return given


def _entries(names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The table, with {k} once for the weight and once for the bias."""
    for ours, theirs in names.items():
        for kind in ("weight", "bias") if "{k}" in ours else ("",):
            yield ours.replace("{k}", kind), theirs.replace("{k}", kind)


def _take_vit(weights: Weights, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by our names; "kernel" is the patch kernel as a convolution's."""
    state: dict[str, Tensor] = {}
    depth = _depth(weights, names)
    for ours, theirs in _entries(names):
        for count in range(depth if "{n}" in ours else 1):
            found = theirs.rstrip("?").replace("{n}", str(count)).split()
            if found[0] in weights or not theirs.endswith("?"):
                state[ours.replace("{n}", str(count))] = torch.cat([weights.take(name) for name in found])
    state["kernel"] = state.pop("patch_embed.weight")
    return state


def _depth(weights: Weights, names: Mapping[str, str]) -> int:
    """How many blocks a checkpoint has; at least one, which is then missed by name."""
    prefix = next(theirs for theirs in names.values() if "{n}" in theirs).split()[0].split("{n}")[0]
    numbers = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in weights.left)
    return 1 + max((int(number.group(1)) for number in numbers if number), default=0)


def _check_size(img_size: Any, patch: Sequence[int]) -> None:
    if img_size is None:
        return
    if (
        not isinstance(img_size, Sequence)
        or len(img_size) != len(patch)
        or any(type(n) is not int or n < p or n % p for n, p in zip(img_size, patch, strict=True))
    ):
        raise InputError(
            f"img_size {img_size!r} must be {len(patch)} multiples of the patch {list(patch)}. Correct --img_size."
        )


def _split_positions(state: dict[str, Tensor], img_size: Sequence[int] | None, class_position: bool | None) -> None:
    """Positions of patches become a grid, 1 x C x D x H x W; that of the class token stands apart."""
    table, kernel = state["pos_embed"], state["kernel"]
    if table.shape[-1] != kernel.shape[0]:
        raise InputError(f"positions are {table.shape[-1]} wide, tokens {kernel.shape[0]}.")
    table = table.flatten(0, -2)[None]
    patch, count = kernel.shape[2:], table.shape[1]
    prefixes = [int(class_position)] if class_position is not None else [1, 0]
    for prefix in prefixes if "cls_token" in state else [0]:
        side = round(max(count - prefix, 0) ** (1 / len(patch)))
        grid = [side] * len(patch) if img_size is None else [n // p for n, p in zip(img_size, patch, strict=True)]
        if math.prod(grid) == count - prefix > 0:
            break
    else:
        made = "a square or cube" if img_size is None else f"{list(img_size)} voxels"
        registers = " Registers with positions of their own are not known." if "reg_token" in state else ""
        raise InputError(
            f"{count - prefix} positions are no grid of {made} in patches of {tuple(patch)}. "
            f"Give the size that the network was made for as --img_size.{registers}"
        )
    if prefix:
        state["cls_pos"] = table[:, :1]
    volume = grid if len(grid) == 3 else [1, *grid]
    state["pos_embed"] = table[:, prefix:].transpose(1, 2).unflatten(2, volume)


def _build(
    state: dict[str, Tensor],
    num_heads: int | None,
    published: Mapping[int, int],
    img_size: Sequence[int] | None,
    **options: Any,
) -> ViT:
    """The encoder that tensors from `_take_vit` make.

    Learned positions beside registers mean DINOv2 with registers, whose positions are resampled with antialiasing.
    Without positions it is made for img_size, or for 224 or a little less.
    """
    state = {name: tensor for name, tensor in state.items() if tensor.numel()}
    kernel = state.pop("kernel")
    state["patch_embed.weight"] = kernel.flatten(2).transpose(1, 2).flatten(1)
    width, channels, *patch = kernel.shape
    if num_heads is None and width not in published:
        raise InputError(f"cannot tell the number of heads of a width of {width}. Give --num_heads.")
    if "pos_embed" in state:
        img_size = [g * p for g, p in zip(state["pos_embed"].shape[-len(patch) :], patch, strict=True)]
    encoder = ViT(
        channels,
        [224 // p * p for p in patch] if img_size is None else img_size,
        patch,
        width,
        depth=sum(name.endswith("norm1.weight") for name in state),
        num_heads=published[width] if num_heads is None else num_heads,
        **_told(state) | options,
    )
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    for name in state:
        if name in shapes and name.endswith(("_token", "qv_bias")) and state[name].numel() == shapes[name].numel():
            state[name] = state[name].reshape(shapes[name])
    load_exactly(encoder, state, "the checkpoint")
    return encoder.eval()


def _told(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of `ViT` that the tensors of its first block, and those beside the blocks, tell."""
    fc2, width = state["blocks.0.mlp.fc2.weight"], state["patch_embed.weight"].shape[0]
    if fc2.ndim != 2:
        raise InputError(f"the last matrix of an MLP has {fc2.ndim} axes instead of 2. The checkpoint is damaged.")
    hidden = fc2.shape[1]
    ratio = hidden / width
    return {
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state or "blocks.0.attn.qv_bias" in state,
        "k_bias": "blocks.0.attn.qv_bias" not in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "swiglu_mlp": state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden,
        "scale_mlp": "blocks.0.mlp.norm.weight" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "class_token": "cls_token" in state,
        "no_embed_class": "cls_pos" not in state,
        "reg_tokens": state["reg_token"].numel() // width if "reg_token" in state else 0,
        "final_norm": "norm.weight" in state,
        "pos_embed": "learn" if "pos_embed" in state else "none",
        "pos_antialias": "pos_embed" in state and "reg_token" in state,
    }


def require(encoder: ViT, layout: str, **arguments: Any) -> None:
    """Check that an encoder computes what networks of a layout compute.

    Raises:
        InputError: naming the first argument that differs.
    """
    given = {**encoder.arguments, "spatial_dims": encoder.spatial_dims}
    for name, value in arguments.items():
        if given[name] != value:
            raise InputError(
                f"an encoder with {name} {given[name]!r} cannot be written as {layout}, which has {value!r}."
            )


def _join_positions(state: dict[str, Tensor], encoder: ViT, class_position: bool) -> None:
    """The grid of positions becomes a table again, with the class token's first; or that is added to the token."""
    own = state.pop("cls_pos", None)
    if own is not None and not class_position:
        state["cls_token"] = state["cls_token"] + own
    grid = [n // p for n, p in zip(encoder.img_size, encoder.patch_size, strict=True)]
    d, h, w = grid if len(grid) == 3 else (1, *grid)
    table = encoder.positions((d, h, w), torch.device("cpu"))
    if table is not None:
        state["pos_embed"] = table.detach()
        if class_position and encoder.cls_token is not None:
            first = table.new_zeros(1, 1, encoder.embed_dim) if own is None else own
            state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
