"""An encoder as ONNX (https://onnx.ai), compared with itself in ONNX Runtime before it is kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from biovfm_monai.errors import InputError
from biovfm_monai.files import write_atomically
from biovfm_monai.networks import ViT

__all__ = ["write_onnx"]

_LARGEST = 2_000_000_000


def write_onnx(
    encoder: ViT, out: str | Path, img_size: Sequence[int] | None = None, anisotropy: int | None = None
) -> None:
    """Write an encoder with input "image", B x C x (D) x H x W of one size and any B, and output "tokens".

    Args:
        encoder: to be written.
        out: file to write.
        img_size: (depth,) height and width of the input; None for what the encoder was made for.
        anisotropy: degree of anisotropy of the input, as in `ViT.patchify`.

    Raises:
        InputError: when the packages of the extra "onnx" are missing, the encoder cannot read such an image, knows the
            spacing or is larger than ONNX allows, or ONNX Runtime's tokens differ by more than 1e-4.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]  # noqa: PLC0415 - optional
        import onnxscript  # noqa: F401, PLC0415 - torch needs it for the export
    except ImportError as error:
        raise InputError(f"{error}. Install it with: pip install 'biovfm-monai[onnx]'") from error
    if sum(tensor.nbytes for tensor in encoder.state_dict().values()) > _LARGEST:
        raise InputError("an ONNX file holds at most 2 GB. Export torchscript instead.")
    if encoder.rope == "mm":
        raise InputError("rope 'mm' knows the spacing, which an ONNX file cannot be told. Export torchscript instead.")
    if img_size is not None and not all(isinstance(n, int) for n in img_size):
        raise InputError(f"img_size {img_size} must be two or three whole numbers, such as [224,224].")
    image = torch.randn(2, encoder.in_channels, *(img_size or encoder.img_size))
    with torch.no_grad():
        expected = encoder(image, anisotropy)
    with _quiet():
        program = torch.onnx.export(
            encoder, (image,), kwargs={"anisotropy": anisotropy}, input_names=["image"], output_names=["tokens"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}, "anisotropy": None}, dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None  # noqa: S101 - with dynamo=True it never is
    with write_atomically(out) as draft:
        program.save(draft)
        session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
        (tokens,) = session.run(None, {"image": image.numpy()})
        difference = float((torch.from_numpy(tokens) - expected).abs().max() / expected.abs().max())
        if not difference <= 1e-4:
            raise InputError(
                f"ONNX Runtime's tokens differ from torch's by {difference:.1e}. Export torchscript instead."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes on its own deprecations, and on torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
