"""Figures of what control edits take and cost over their strength: tidy frame in, Figure out."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ember.reporting.format import error_bars
from ember.reporting.plots import PALETTE, dots, new_panels

_EDIT_STYLES = {
    "EMBER": ("#111111", "o"), "EMBER, rare tokens": ("#777777", "o"), "EMBER, output side": ("#AA7733", "v"),
    "EMBER, both sides": ("#AA3377", "^"), "random direction": ("#56B4E9", "s"), "mean rows": ("#E69F00", "D"),
    "matched rows": ("#D55E00", "D"), "zero rows": ("#009E73", "P"), "LEACE": ("#0072B2", "X"),
    "random rows": ("#BBBBBB", "."),
}  # fmt: skip
_COST_NAMES = {
    "other sense": "KL on other-sense text\n(nats per token)",
    "neighbour": "neighbour questions: fall in log-likelihood\nof the right answer (nats per character)",
    "everyday": "KL expected in general English\n(nats per thousand words)",
}


def trade_curves(points: pd.DataFrame) -> Figure:
    """What edits take from the concept against each cost, over their strength (``trade_curves.point_table``).

    Lines start at the unedited model, (0, 0); error bars stand at the last strength.
    """
    figure, panels = new_panels(points.cost.nunique(), (4.3, 4.6))
    for ax, (cost, part) in zip(panels, points.groupby("cost", sort=False), strict=True):
        for edit, mine in part.groupby("edit", sort=False):
            colour, marker = _EDIT_STYLES.get(str(edit), (PALETTE["base"], "."))
            ax.plot([0.0, *mine.x], [0.0, *mine.y], color=colour, lw=1.2, alpha=0.9)
            ax.plot(mine.x, mine.y, ls="", marker=marker, color=colour, ms=5, label=edit)
            last = mine.iloc[[-1]]
            bars = error_bars(last, "x")
            dots(ax, last, "y", x=last.x, xerr=bars, fmt="", color=colour, lw=0.8, alpha=0.5, capsize=2)
        ax.plot(0, 0, "s", color=PALETTE["base"], label="base model", ms=6)
        ax.set(xlabel=_COST_NAMES.get(str(cost), cost), title=f"against {cost}")
        if cost == "everyday":  # random rows cost a hundred times what rows of rare tokens do
            ax.set_xscale("symlog", linthresh=1.0)
            ax.set_xlim(left=-0.1)
    panels[0].set_ylabel("concept questions: fall in probability\nof the right answer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=min(6, len(labels)))
    return figure


def area_differences(table: pd.DataFrame) -> Figure:
    """By how much each edit's trade is better than EMBER's (``trade_curves.area_table``), one panel a cost."""
    edits = [edit for edit in table.edit.unique() if edit != "EMBER"]
    figure, panels = new_panels(table.cost.nunique(), (3.6, 0.34 * len(edits) + 1.7), beside=1.4)
    for ax, (cost, part) in zip(panels, table.groupby("cost", sort=False), strict=True):
        y = np.arange(len(edits))
        dots(ax, part.set_index("edit").loc[edits], "difference", y=y, color=PALETTE["simdom"])
        ax.axvline(0, color=PALETTE["base"], lw=1)
        ax.set_yticks(y, edits)
        ax.set(title=f"against {cost}", xlabel="area − EMBER's\n(probability)")
        ax.xaxis.set_major_locator(MaxNLocator(4))
    panels[0].invert_yaxis()
    return figure
