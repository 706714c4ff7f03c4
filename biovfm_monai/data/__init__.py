"""File to sample to batch."""

from biovfm_monai.data.brain import TISSUES, write_brain
from biovfm_monai.data.class_labels import ClassLabeld, class_weights
from biovfm_monai.data.classification import load_classification
from biovfm_monai.data.crops import RandomCropDataset
from biovfm_monai.data.datalist import load_datalist
from biovfm_monai.data.find import find_images
from biovfm_monai.data.index import index
from biovfm_monai.data.label_maps import PreparedImaged, ReadLabeld, RestoreGridd
from biovfm_monai.data.mixture import Labels, Mixture, subset
from biovfm_monai.data.multi_crop import MultiCrop
from biovfm_monai.data.pack import pack
from biovfm_monai.data.policies import NATURAL, POLICIES, Policy, geometric, with_chances
from biovfm_monai.data.preprocessing import (
    ByModalityd,
    FitSized,
    MatchChannelsd,
    encoder_transform,
    training_transform,
)
from biovfm_monai.data.reading import ReadImaged, read_image
from biovfm_monai.data.samples import sample_datalist, write_samples
from biovfm_monai.data.sampling import GlobalBatchSampler
from biovfm_monai.data.segmentation import load_segmentation
from biovfm_monai.data.store import Store
from biovfm_monai.data.verify import verify
from biovfm_monai.data.views import RandomResizedCrop

__all__ = [
    "NATURAL", "POLICIES", "TISSUES", "ByModalityd", "ClassLabeld", "FitSized", "GlobalBatchSampler", "Labels",
    "MatchChannelsd", "Mixture", "MultiCrop", "Policy", "PreparedImaged", "RandomCropDataset", "RandomResizedCrop",
    "ReadImaged", "ReadLabeld", "RestoreGridd", "Store", "class_weights", "encoder_transform", "find_images",
    "geometric", "index", "load_classification", "load_datalist", "load_segmentation", "pack", "read_image",
    "sample_datalist", "subset", "training_transform", "verify", "with_chances", "write_brain", "write_samples",
]  # fmt: skip
