"""One deterministic preset per modality, the same in pretraining, fine-tuning and inference."""

from biovfm_monai.data.modalities.ct import ct
from biovfm_monai.data.modalities.dermoscopy import dermoscopy
from biovfm_monai.data.modalities.endoscopy import endoscopy
from biovfm_monai.data.modalities.fundus import fundus
from biovfm_monai.data.modalities.mammography import mammography
from biovfm_monai.data.modalities.microscopy import microscopy
from biovfm_monai.data.modalities.mri import mri
from biovfm_monai.data.modalities.oct import oct  # noqa: A004 - the name of the modality
from biovfm_monai.data.modalities.pathology import pathology
from biovfm_monai.data.modalities.pet import pet
from biovfm_monai.data.modalities.ultrasound import ultrasound
from biovfm_monai.data.modalities.xray import xray

__all__ = [
    "ct", "dermoscopy", "endoscopy", "fundus", "mammography", "microscopy", "mri", "oct", "pathology", "pet",
    "ultrasound", "xray",
]  # fmt: skip
