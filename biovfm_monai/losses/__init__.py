"""Losses: tensors to scalars, over the rows of all processes."""

from biovfm_monai.losses.classes import class_chances, class_loss, num_logits
from biovfm_monai.losses.contrastive import info_nce
from biovfm_monai.losses.ordinal import OrdinalLoss, grades
from biovfm_monai.losses.sigreg import sigreg

__all__ = ["OrdinalLoss", "class_chances", "class_loss", "grades", "info_nce", "num_logits", "sigreg"]
