"""Self-supervised methods: networks that return their own loss."""

from biovfm_monai.methods.base import SSLMethod
from biovfm_monai.methods.dinov2 import DINOv2
from biovfm_monai.methods.mae import MAE

__all__ = ["MAE", "DINOv2", "SSLMethod"]
