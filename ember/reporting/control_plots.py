"""Figures of localization and of the trade of control edits: tidy frame in, matplotlib Axes out."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ember.reporting.plots import LABELS, PALETTE

_MARKED = PALETTE["concept"]
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


def exposure_bars(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mean KL of tokens by how many edited tokens came before, one colour a set of texts.

    ``table`` is ``localization.by_exposure``'s.
    """
    if ax is None:
        ax = plt.subplots(figsize=(7.6, 3.8), layout="constrained")[1]
    sets, groups = list(dict.fromkeys(table.set)), list(dict.fromkeys(table.group))
    for k, name in enumerate(sets):
        mine = table[table.set == name]
        x = np.array([groups.index(g) for g in mine.group]) + 0.16 * (k - (len(sets) - 1) / 2)
        error = [(mine.kl - mine.kl_low).clip(lower=0), (mine.kl_high - mine.kl).clip(lower=0)]
        colour = PALETTE.get(str(name), PALETTE["base"])
        ax.errorbar(x, mine.kl, error, fmt="o", color=colour, capsize=2, label=LABELS.get(str(name), str(name)))
    ax.axhline(0, color=PALETTE["base"], lw=0.8)
    ax.set_xticks(range(len(groups)), groups)
    ax.set(xlabel="edited tokens before the predicted one", ylabel="KL from the base model\n(nats per token)")
    ax.set_title("Change of predictions by exposure (95 % intervals over texts)")
    ax.legend(fontsize=8)
    return ax


def arm_exposure(table: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Mean KL of every arm before any edited token and after one, one panel a set of texts.

    ``table`` is ``localization.by_arm``'s for one concept, ``names`` are its rows' arms as a reader knows them.
    """
    table = table.assign(arm=list(names))
    sets, arms, groups = (list(dict.fromkeys(table[column])) for column in ("set", "arm", "group"))
    figure, grid = plt.subplots(
        1, len(sets), figsize=(2.7 * len(sets) + 1.5, 0.5 * len(arms) + 1.7), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for ax, name in zip(grid[0], sets, strict=True):
        for k, (group, colour) in enumerate(zip(groups, (PALETTE["simdom"], _MARKED), strict=False)):
            mine = table[(table.set == name) & (table.group == group)]
            y = [arms.index(arm) + 0.2 * (k - 0.5) for arm in mine.arm]
            error = [(mine.kl - mine.kl_low).clip(lower=0), (mine.kl_high - mine.kl).clip(lower=0)]
            ax.errorbar(mine.kl, y, xerr=error, fmt="o", color=colour, capsize=2, label=group)
        ax.axvline(0, color=PALETTE["base"], lw=0.8)
        ax.set_yticks(range(len(arms)), arms)
        ax.set(title=LABELS.get(str(name), str(name)), xlabel="KL (nats per token)", ylim=(len(arms) - 0.5, -0.5))
    handles, labels = grid[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def share_bars(table: pd.DataFrame, *, title: str, ax: Axes | None = None) -> Axes:
    """Of each set of texts: how its tokens, and how all change of its predictions, divide over groups.

    ``table`` is one of ``localization.share_table``.
    """
    sets, groups = list(dict.fromkeys(table.set)), list(dict.fromkeys(table.group))
    if ax is None:
        ax = plt.subplots(figsize=(8.2, 0.85 * len(sets) + 1.4), layout="constrained")[1]
    shades = plt.get_cmap("cividis")(np.linspace(0.95, 0.1, len(groups)))
    for k, name in enumerate(sets):
        mine = table[table.set == name].set_index("group").reindex(groups)
        for shift, column in ((-0.2, "share_of_tokens"), (0.2, "share_of_kl")):
            left = 0.0
            for group, shade in zip(groups, shades, strict=True):
                width = float(np.nan_to_num(mine[column][group]))
                ax.barh(k + shift, width, left=left, height=0.36, color=shade)
                left += width
            if not left:
                ax.text(0.005, k + shift, "no change", va="center", fontsize=8, color=PALETTE["base"])
    ax.set_yticks(
        [k + shift for k in range(len(sets)) for shift in (-0.2, 0.2)],
        [f"{LABELS.get(str(name), str(name))}: {what}" for name in sets for what in ("tokens", "KL")],
        fontsize=8,
    )
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="share", xlim=(0, 1), title=title)
    handles = [Patch(color=shade, label=str(group)) for group, shade in zip(groups, shades, strict=True)]
    ax.legend(handles=handles, fontsize=8, ncols=len(groups), loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return ax


def token_strip(text: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Rise in loss along one text; edited tokens in colour. ``text``: the rows of ``token_changes`` of one text."""
    if ax is None:
        ax = plt.subplots(figsize=(max(6.0, 0.3 * len(text) + 1), 3.2), layout="constrained")[1]
    x = np.arange(len(text))
    ax.bar(x, text.change, color=[_MARKED if hit else PALETTE["neutral"] for hit in text.marked])
    ax.axhline(0, color=PALETTE["base"], lw=0.8)
    ax.set_xticks(x, [token.replace("\n", "↵").strip() for token in text.token], rotation=90, fontsize=8)
    for label, hit in zip(ax.get_xticklabels(), text.marked, strict=True):
        label.set_color(_MARKED if hit else "black")
    ax.grid(visible=False, axis="x")
    ax.set(ylabel="rise in loss (nats)", xlim=(-0.7, len(text) - 0.3))
    ax.set_title("What the edit does along a text (edited tokens in colour)")
    return ax


def trade_curves(points: pd.DataFrame, *, axes: Sequence[Axes] | None = None) -> Figure:
    """What edits take from the concept against what they cost, over their strength; one panel a cost.

    ``points`` is ``trade.point_table``'s. Lines start at the unedited model, (0, 0); error bars stand at the last
    strength.
    """
    costs = list(dict.fromkeys(points.cost))
    figure, grid = plt.subplots(1, len(costs), figsize=(4.3 * len(costs), 4.6), layout="constrained", sharey=True)
    for ax, cost in zip(np.atleast_1d(grid), costs, strict=True):
        for edit, mine in points[points.cost == cost].groupby("edit", sort=False):
            colour, marker = _EDIT_STYLES.get(str(edit), (PALETTE["base"], "."))
            x, y = [0.0, *mine.x], [0.0, *mine.y]
            ax.plot(x, y, color=colour, lw=1.2, alpha=0.9)
            ax.plot(mine.x, mine.y, ls="", marker=marker, color=colour, ms=5, label=edit)
            last = mine.iloc[-1]
            bars = [[[last[v] - last[f"{v}_low"]], [last[f"{v}_high"] - last[v]]] for v in "xy"]
            ax.errorbar(last.x, last.y, bars[1], bars[0], color=colour, lw=0.8, alpha=0.5, capsize=2)
        ax.plot(0, 0, "s", color=PALETTE["base"], label="base model", ms=6)
        ax.set(xlabel=_COST_NAMES.get(str(cost), str(cost)), title=f"against {cost}")
        if cost == "everyday":  # random rows cost a hundred times what rows of rare tokens do
            ax.set_xscale("symlog", linthresh=1.0)
            ax.set_xlim(left=-0.1)
    np.atleast_1d(grid)[0].set_ylabel("concept questions: fall in probability\nof the right answer")
    handles, labels = np.atleast_1d(grid)[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=min(6, len(labels)))
    return figure


def area_differences(table: pd.DataFrame) -> Figure:
    """By how much each edit's trade is better than EMBER's, one panel a cost. ``table`` is ``trade.area_table``'s."""
    costs = list(dict.fromkeys(table.cost))
    edits = [edit for edit in dict.fromkeys(table.edit) if edit != "EMBER"]
    figure, grid = plt.subplots(
        1, len(costs), figsize=(3.6 * len(costs) + 1.4, 0.34 * len(edits) + 1.7), layout="constrained", sharey=True
    )
    for ax, cost in zip(np.atleast_1d(grid), costs, strict=True):
        mine = table[table.cost == cost].set_index("edit").loc[edits]
        y = np.arange(len(edits))
        error = [mine.difference - mine.difference_low, mine.difference_high - mine.difference]
        ax.errorbar(mine.difference, y, xerr=error, fmt="o", color=PALETTE["simdom"], capsize=3)
        ax.axvline(0, color=PALETTE["base"], lw=1)
        ax.set_yticks(y, edits)
        ax.set(title=f"against {cost}", xlabel="area − EMBER's\n(probability)")
        ax.xaxis.set_major_locator(MaxNLocator(4))
    np.atleast_1d(grid)[0].invert_yaxis()
    return figure
