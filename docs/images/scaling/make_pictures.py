"""BioVFM's published means, fitted as published and with the flaws corrected, for docs/scaling.md.

    python docs/images/scaling/make_pictures.py

It also prints the numbers that the page's table has.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from biovfm_monai.evaluation.scaling import LogLinear, PowerLaw, fit_law

HERE = Path(__file__).parent
STYLES = {"DINOv2": ("#0072B2", "o", "-"), "MAE": ("#D55E00", "s", "--")}
PANELS = (
    ("as published: size with MAE's decoder", "published_parameters", LogLinear()),
    ("size of the encoder", "encoder_parameters", LogLinear()),
    ("and error with a part that stays", "encoder_parameters", PowerLaw(100.0, 5.52)),
)


def main() -> None:
    """Draw the panels and print a line for each fit."""
    table = pd.read_csv(HERE.parents[1] / "results/biovfm_published.csv").query("task == 'mean'")
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, column, law) in zip(axes, PANELS, strict=True):
        for method, runs in table.groupby("method"):
            color, marker, dash = STYLES[method]
            sizes = np.geomspace(runs[column].min(), runs[column].max(), 60)
            fitted = fit_law(law, runs[column].to_numpy(), runs.auc.to_numpy())
            scores, draws = fitted.at(sizes)
            low, high = np.percentile(draws, [2.5, 97.5], axis=1)
            axis.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
            axis.plot(sizes, scores, dash, color=color)
            axis.plot(runs[column], runs.auc, marker, color=color, label=method)
            print(f"{title}, {method}: R2 {fitted.r2:.3f}", fitted.intervals())
        axis.set(title=title, xscale="log", xlabel="parameters, millions", ylim=(84, 100))
        axis.set_xticks([5, 10, 20, 50, 100, 200, 300], ["5", "10", "20", "50", "100", "200", "300"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean AUC of 12 MedMNIST tasks, %")
    axes[0].legend(loc="lower right")
    figure.savefig(HERE / "published.png", dpi=100)


if __name__ == "__main__":
    main()
