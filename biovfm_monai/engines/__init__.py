"""The Ignite engine that trains any method, and its handlers."""

from biovfm_monai.engines.bad_steps import BadStepHandler
from biovfm_monai.engines.budget import epochs_for
from biovfm_monai.engines.classification import ChancesHandler, LabelledViews, decided, write_chances
from biovfm_monai.engines.collapse import CollapseHandler
from biovfm_monai.engines.export import EncoderHandler
from biovfm_monai.engines.finetuning import AnisotropyInferer, FlipInferer, FreezeHandler, ScheduleHandler
from biovfm_monai.engines.overlays import OverlayHandler, draw_overlay
from biovfm_monai.engines.pictures import ReconstructionHandler
from biovfm_monai.engines.plan import Plan, make_plan, measured_rate
from biovfm_monai.engines.plan_report import plan_cells, report_plans, table_of
from biovfm_monai.engines.precision import fast_precision
from biovfm_monai.engines.profiling import ProfileHandler
from biovfm_monai.engines.progress import ProgressHandler
from biovfm_monai.engines.resume import StateHandler
from biovfm_monai.engines.schedules import WarmupCosine, parameter_groups, scaled_rate
from biovfm_monai.engines.trainer import PretrainingTrainer, StepEvents
from biovfm_monai.engines.usage import machine_memory

__all__ = [
    "AnisotropyInferer",
    "BadStepHandler",
    "ChancesHandler",
    "CollapseHandler",
    "EncoderHandler",
    "FlipInferer",
    "FreezeHandler",
    "LabelledViews",
    "OverlayHandler",
    "Plan",
    "PretrainingTrainer",
    "ProfileHandler",
    "ProgressHandler",
    "ReconstructionHandler",
    "ScheduleHandler",
    "StateHandler",
    "StepEvents",
    "WarmupCosine",
    "decided",
    "draw_overlay",
    "epochs_for",
    "fast_precision",
    "machine_memory",
    "make_plan",
    "measured_rate",
    "parameter_groups",
    "plan_cells",
    "report_plans",
    "scaled_rate",
    "table_of",
    "write_chances",
]  # fmt: skip
