"""Figures of teaching and erasing: tidy frame in, matplotlib Axes out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ember.reporting.plots import PALETTE, dots, new_axes

_ARMS = (("alone", False, PALETTE["simdom"], "o"), ("after EMBER", True, PALETTE["concept"], "s"))


def arrival_points(table: pd.DataFrame) -> Axes:
    """Where erasure arrives between the taught model and the one that never learned, one row a setting.

    ``table`` holds label (method or setting), ember (whether after EMBER), share, ci_low, ci_high and note, as
    ``teaching.arrival_table`` gives them for one metric and half. A setting without a share is named as such.
    """
    labels = pd.Index(table.label.unique())
    ax = new_axes(7.4, 0.42 * len(labels) + 1.7)
    for name, after, colour, marker in _ARMS:
        mine = table[table.ember == after]
        if mine.empty:
            continue
        y = labels.get_indexer(mine.label) + (0.14 if after else -0.14)
        known = np.isfinite(mine.share.astype(float))
        dots(ax, mine[known], "share", y=y[known], fmt=marker, color=colour, label=name)
        for height in y[~known]:
            ax.annotate("no share: too little was taught", (0.02, height), color=colour, fontsize=8, va="center")
    ax.axvline(0, color=PALETTE["base"], lw=1.2)
    ax.axvline(1, color=PALETTE["base"], lw=1.2, ls="--")
    for place, what in ((0, "taught"), (1, "never taught")):
        ax.annotate(
            what, (place, 1), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8
        )
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="share of the taught knowledge that erasure took (95 % interval over questions)")
    ax.set_title("Does erasure arrive where learning started?", pad=18)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax
