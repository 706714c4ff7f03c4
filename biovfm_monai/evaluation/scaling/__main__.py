"""The program that scores a run of a study: `python -m biovfm_monai.evaluation.scaling FOLDER DEVICE`."""

import fire

from biovfm_monai.errors import report_input_errors
from biovfm_monai.evaluation.scaling.score import score_run

if __name__ == "__main__":
    report_input_errors()
    fire.Fire(score_run)
