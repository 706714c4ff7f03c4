"""The tensors of a checkpoint while they are being converted: each is taken or dropped by name, and none forgotten."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from biovfm_monai.errors import InputError

__all__ = ["Weights"]

_FAMILIES = {
    "mae, with its decoder": r"decoder_blocks\.0\.",
    "monai": r"(vit\.)?blocks\.0\.mlp\.linear1\.weight",
    "huggingface": r"(.*\.)?(encoder\.)?layer\.0\.(attention|norm1)\.",
    "dinov3": r"(storage_tokens|rope_embed\.periods)",
    "eva02 or pumit": r"blocks\.0\.(attn\.q_proj\.weight|attn\.q_bias|mlp\.ffn_ln\.weight)",
    "dinov2": r"blocks\.(0\.)?0\.ls1\.gamma",
    "mocov3": r"(base|momentum)_encoder\.blocks\.0\.",
    "timm, mae or dino": r"blocks\.0\.attn\.qkv\.weight",
}


class Weights:
    """Tensors of a checkpoint, each to be taken or dropped by name.

    Args:
        tensors: name -> tensor.
        source: name of the layout that is expected, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.names = list(tensors)
        self.left = dict(tensors)
        self.source = source
        self.dropped: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """One tensor, as float32.

        Raises:
            InputError: when it is not there.
        """
        if name not in self.left:
            there = f" It holds {', '.join(self.names[:3])} ..." if not self.looks() else self.looks()
            raise InputError(f"no {name} in the checkpoint, so it is not of the layout {self.source!r}.{there}")
        if self.left[name].ndim == 0:
            raise InputError(f"{name} is a single number. The checkpoint is damaged; download it again.")
        return self.left.pop(name).float()

    def drop(self, *patterns: str) -> None:
        """Leave out what an encoder has no use for, by regular expression."""
        gone = [name for name in self.left if any(re.fullmatch(pattern, name) for pattern in patterns)]
        self.dropped += gone
        for name in gone:
            del self.left[name]

    def finish(self) -> None:
        """Check that everything was taken or dropped.

        Raises:
            InputError: naming what was not.
        """
        if self.left:
            names = sorted(self.left)
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise InputError(f"not known in the layout {self.source!r}: {shown}.{self.looks()}")

    def looks(self, own: bool = False) -> str:
        """A sentence with the family whose signs the names bear; with own, also if it is the one expected."""
        family = next((f for f, sign in _FAMILIES.items() if any(re.match(sign, name) for name in self.names)), None)
        expected = family is not None and self.source in re.findall(r"\w+", family)
        return "" if family is None or (expected and not own) else f" It looks like {family}."
