"""The Ignite engine that trains any method, and its handlers."""

from biovfm_monai.engines.bad_steps import BadStepHandler
from biovfm_monai.engines.collapse import CollapseHandler
from biovfm_monai.engines.export import EncoderHandler
from biovfm_monai.engines.pictures import ReconstructionHandler
from biovfm_monai.engines.progress import ProgressHandler
from biovfm_monai.engines.resume import StateHandler
from biovfm_monai.engines.schedules import WarmupCosine, parameter_groups
from biovfm_monai.engines.trainer import PretrainingTrainer, StepEvents, fast_precision

__all__ = [
    "BadStepHandler", "CollapseHandler", "EncoderHandler", "PretrainingTrainer", "ProgressHandler",
    "ReconstructionHandler", "StateHandler", "StepEvents", "WarmupCosine", "fast_precision", "parameter_groups",
]  # fmt: skip
