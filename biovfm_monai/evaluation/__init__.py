"""What an encoder is worth: embeddings and probes."""

from biovfm_monai.evaluation.biovfm import biovfm_probe
from biovfm_monai.evaluation.bundle import open_bundle
from biovfm_monai.evaluation.embed import RawPixels, embed, transform_of
from biovfm_monai.evaluation.knn import KNNAccuracy, KNNProbe, knn_accuracy
from biovfm_monai.evaluation.probe import Probe, probe_features, probe_listing
from biovfm_monai.evaluation.serve import classify_files, embed_files, segment_files
from biovfm_monai.evaluation.tokens import TokenizerProbe
from biovfm_monai.evaluation.voxel_probe import VoxelProbe

__all__ = [
    "KNNAccuracy", "KNNProbe", "Probe", "RawPixels", "TokenizerProbe", "VoxelProbe", "biovfm_probe", "classify_files",
    "embed", "embed_files", "knn_accuracy", "open_bundle", "probe_features", "probe_listing", "segment_files",
    "transform_of",
]  # fmt: skip
