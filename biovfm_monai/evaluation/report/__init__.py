"""One page about finished runs."""

from biovfm_monai.evaluation.report.collect import Run, collect_runs
from biovfm_monai.evaluation.report.find import find_runs
from biovfm_monai.evaluation.report.page import write_report
from biovfm_monai.evaluation.report.scores import Confusion, Score

__all__ = ["Confusion", "Run", "Score", "collect_runs", "find_runs", "write_report"]
