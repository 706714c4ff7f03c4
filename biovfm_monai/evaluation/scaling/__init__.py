"""How scores grow with size and cost: laws, their uncertainty, and what the growth goes with."""

from biovfm_monai.evaluation.scaling.fit import FittedLaw, fit_law, fit_runs
from biovfm_monai.evaluation.scaling.laws import LogLinear, PowerLaw
from biovfm_monai.evaluation.scaling.table import fit_table, listing

__all__ = ["FittedLaw", "LogLinear", "PowerLaw", "fit_law", "fit_runs", "fit_table", "listing"]
