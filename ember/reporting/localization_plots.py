"""Figures of where an edit changes predictions, token by token: tidy frame in, Axes or Figure out."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ember.reporting.format import arm_names
from ember.reporting.plots import LABELS, PALETTE, dots, new_axes, new_panels

_MARKED = PALETTE["concept"]


def exposure_bars(table: pd.DataFrame) -> Axes:
    """Mean KL of tokens by how many edited tokens came before (``localization.by_exposure``), a colour a set."""
    ax = new_axes(7.6, 3.8)
    sets, groups = table.set.unique().tolist(), pd.Index(table.group.unique())
    for k, name in enumerate(sets):
        mine = table[table.set == name]
        x = groups.get_indexer(mine.group) + 0.16 * (k - (len(sets) - 1) / 2)
        dots(ax, mine, "kl", x=x, color=PALETTE.get(name, PALETTE["base"]), capsize=2, label=LABELS.get(name, name))
    ax.axhline(0, color=PALETTE["base"], lw=0.8)
    ax.set_xticks(range(len(groups)), groups)
    ax.set(xlabel="edited tokens before the predicted one", ylabel="KL from the base model\n(nats per token)")
    ax.set_title("Change of predictions by exposure (95 % intervals over texts)")
    ax.legend(fontsize=8)
    return ax


def arm_exposure(table: pd.DataFrame) -> Figure:
    """Mean KL of every arm of one concept before any edited token and after one (``localization.by_arm``), by set."""
    table = table.assign(arm=arm_names(table))
    sets, arms, groups = (pd.Index(table[column].unique()) for column in ("set", "arm", "group"))
    figure, panels = new_panels(len(sets), (2.7, 0.5 * len(arms) + 1.7), beside=1.5)
    for ax, name in zip(panels, sets, strict=True):
        for k, (group, colour) in enumerate(zip(groups, (PALETTE["simdom"], _MARKED), strict=False)):
            mine = table[(table.set == name) & (table.group == group)]
            y = arms.get_indexer(mine.arm) + 0.2 * (k - 0.5)
            dots(ax, mine, "kl", y=y, color=colour, capsize=2, label=group)
        ax.axvline(0, color=PALETTE["base"], lw=0.8)
        ax.set_yticks(range(len(arms)), arms)
        ax.set(title=LABELS.get(name, name), xlabel="KL (nats per token)", ylim=(len(arms) - 0.5, -0.5))
    figure.legend(*panels[-1].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def share_bars(table: pd.DataFrame, *, title: str) -> Axes:
    """Of each set: how its tokens, and how all change of its predictions, divide over groups (``share_table``)."""
    sets, groups = table.set.unique().tolist(), table.group.unique().tolist()
    ax = new_axes(8.2, 0.85 * len(sets) + 1.4)
    shades = plt.get_cmap("cividis")(np.linspace(0.95, 0.1, len(groups)))
    ticks = {}
    for k, name in enumerate(sets):
        mine = table[table.set == name].set_index("group").reindex(groups)
        for y, column, what in ((k - 0.2, "share_of_tokens", "tokens"), (k + 0.2, "share_of_kl", "KL")):
            widths = mine[column].fillna(0.0)
            ax.barh([y] * len(groups), widths, left=widths.cumsum() - widths, height=0.36, color=shades)
            if not widths.any():
                ax.text(0.005, y, "no change", va="center", fontsize=8, color=PALETTE["base"])
            ticks[y] = f"{LABELS.get(name, name)}: {what}"
    ax.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="share", xlim=(0, 1), title=title)
    handles = [Patch(color=shade, label=str(group)) for group, shade in zip(groups, shades, strict=True)]
    ax.legend(handles=handles, fontsize=8, ncols=len(groups), loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return ax


def token_strip(text: pd.DataFrame) -> Axes:
    """Rise in loss along one text; edited tokens in colour. ``text``: the rows of ``token_changes`` of one text."""
    ax = new_axes(max(6.0, 0.3 * len(text) + 1), 3.2)
    x = np.arange(len(text))
    ax.bar(x, text.change, color=np.where(text.marked, _MARKED, PALETTE["neutral"]))
    ax.axhline(0, color=PALETTE["base"], lw=0.8)
    ax.set_xticks(x, [token.replace("\n", "↵").strip() for token in text.token], rotation=90, fontsize=8)
    for label, hit in zip(ax.get_xticklabels(), text.marked, strict=True):
        label.set_color(_MARKED if hit else "black")
    ax.grid(visible=False, axis="x")
    ax.set(ylabel="rise in loss (nats)", xlim=(-0.7, len(text) - 0.3))
    ax.set_title("What the edit does along a text (edited tokens in colour)")
    return ax
