"""The Ignite engine that trains any method, and its handlers."""

from biovfm_monai.engines.collapse import CollapseHandler
from biovfm_monai.engines.export import EncoderHandler
from biovfm_monai.engines.pictures import ReconstructionHandler
from biovfm_monai.engines.progress import ProgressHandler
from biovfm_monai.engines.resume import StateHandler
from biovfm_monai.engines.schedules import WarmupCosine, parameter_groups
from biovfm_monai.engines.trainer import PretrainingTrainer, fast_precision

__all__ = [
    "CollapseHandler", "EncoderHandler", "PretrainingTrainer", "ProgressHandler", "ReconstructionHandler",
    "StateHandler", "WarmupCosine", "fast_precision", "parameter_groups",
]  # fmt: skip
