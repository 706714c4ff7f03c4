"""How scores grow with size and cost: laws, their uncertainty, and what the growth goes with."""

from biovfm_monai.evaluation.scaling.compare import compare_at, compare_table, comparison, frontier, optimal_size
from biovfm_monai.evaluation.scaling.execute import run_study
from biovfm_monai.evaluation.scaling.factors import compressibility, correlate, factor_table, label_noise, separation
from biovfm_monai.evaluation.scaling.fit import FittedLaw, fit_law, fit_runs
from biovfm_monai.evaluation.scaling.laws import LogLinear, PowerLaw
from biovfm_monai.evaluation.scaling.study import plan_study
from biovfm_monai.evaluation.scaling.table import fit_table, listing

__all__ = [
    "FittedLaw", "LogLinear", "PowerLaw", "compare_at", "compare_table", "comparison", "compressibility", "correlate",
    "factor_table", "fit_law", "fit_runs", "fit_table", "frontier", "label_noise", "listing", "optimal_size",
    "plan_study", "run_study", "separation",
]  # fmt: skip
