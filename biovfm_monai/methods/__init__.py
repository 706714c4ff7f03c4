"""Self-supervised methods: networks that return their own loss."""

from biovfm_monai.methods.base import SSLMethod
from biovfm_monai.methods.mae import MAE

__all__ = ["MAE", "SSLMethod"]
