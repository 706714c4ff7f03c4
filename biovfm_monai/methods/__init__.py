"""Self-supervised methods: networks that return their own loss."""

from biovfm_monai.methods.barlow_twins import BarlowTwins
from biovfm_monai.methods.base import SSLMethod
from biovfm_monai.methods.dinov2 import DINOv2
from biovfm_monai.methods.ijepa import IJEPA
from biovfm_monai.methods.lejepa import LeJEPA
from biovfm_monai.methods.mae import MAE
from biovfm_monai.methods.masked_tokens import MaskedTokenModeling
from biovfm_monai.methods.moco_v3 import MoCoV3
from biovfm_monai.methods.simmim import SimMIM
from biovfm_monai.methods.spad_tokenizer import SPADTokenizer
from biovfm_monai.methods.vicreg import VICReg

__all__ = [
    "IJEPA", "MAE", "BarlowTwins", "DINOv2", "LeJEPA", "MaskedTokenModeling", "MoCoV3", "SPADTokenizer", "SSLMethod",
    "SimMIM", "VICReg",
]  # fmt: skip
