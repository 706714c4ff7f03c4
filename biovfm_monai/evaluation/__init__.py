"""What an encoder is worth: embeddings and probes."""

from biovfm_monai.evaluation.embed import RawPixels, embed, embed_files, transform_of
from biovfm_monai.evaluation.knn import KNNAccuracy, KNNProbe, knn_accuracy

__all__ = ["KNNAccuracy", "KNNProbe", "RawPixels", "embed", "embed_files", "knn_accuracy", "transform_of"]
