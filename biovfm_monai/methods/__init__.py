"""Self-supervised methods: networks that return their own loss."""

from biovfm_monai.methods.base import SSLMethod
from biovfm_monai.methods.mae import MAE
from biovfm_monai.methods.masked_tokens import MaskedTokenModeling
from biovfm_monai.methods.spad_tokenizer import SPADTokenizer

__all__ = ["MAE", "MaskedTokenModeling", "SPADTokenizer", "SSLMethod"]
