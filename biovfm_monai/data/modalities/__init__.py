"""One deterministic preset per modality, the same in pretraining, fine-tuning and inference."""

from biovfm_monai.data.modalities.ct import ct
from biovfm_monai.data.modalities.fundus import fundus
from biovfm_monai.data.modalities.microscopy import microscopy
from biovfm_monai.data.modalities.mri import mri
from biovfm_monai.data.modalities.pathology import pathology
from biovfm_monai.data.modalities.ultrasound import ultrasound

__all__ = ["ct", "fundus", "microscopy", "mri", "pathology", "ultrasound"]
