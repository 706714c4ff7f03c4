"""In which numbers a run computes."""

from __future__ import annotations

import torch

from biovfm_monai.errors import InputError

__all__ = ["autocast_dtype", "fast_precision"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The type that autocast takes for "fp32", "bf16" or "fp16"; None for fp32, which needs none.

    Raises:
        InputError: when it is none of them.
    """
    if precision not in _DTYPES:
        raise InputError(f"precision {precision!r} is unknown. Give one of {', '.join(_DTYPES)}.")
    return _DTYPES[precision]


def fast_precision(device: torch.device | str) -> str:
    """The precision that is fast on a device: "bf16" where the hardware multiplies it, else "fp32".

    CPUs without such instructions emulate bf16, ten times slower than fp32.
    """
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():  # a plan for elsewhere
            return "bf16"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"
