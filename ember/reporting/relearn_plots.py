"""Figures of relearning, and of erasing what was taught: tidy frame in, matplotlib Axes or Figure out."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ember.data.arms import UNEDITED, Arm
from ember.reporting.format import interval_texts
from ember.reporting.plots import PALETTE, alone_and_after, dots, marker_face, new_axes, new_panels
from ember.reporting.relearn_tables import LIKELIHOOD_ENDS

_UNEDITED_COLOUR = "#111111"
_ALONE_AND_AFTER = (("alone", False, PALETTE["simdom"], "o"), ("after EMBER", True, PALETTE["concept"], "s"))
_CHANGE = "probability of the right answer,\nchange from before training"


def relearning_curve(steps: pd.DataFrame, regained: pd.DataFrame) -> Sequence[Axes]:
    """One run against tokens: loss (``steps``: tokens, loss), and what came back (a ``regained_table`` of a metric)."""
    left, right = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")[1]
    left.plot(steps.tokens, steps.loss, color=PALETTE["neutral"], lw=0.8, label="each step")
    smooth = steps.loss.rolling(10, min_periods=1).mean()
    left.plot(steps.tokens, smooth, color=PALETTE["simdom"], label="mean of 10 steps")
    left.set(xlabel="training tokens", ylabel="loss (nats per token)", title="Training")
    left.legend(fontsize=8)
    styles = {"all": ("concept", "o", 0.0), "stated": ("simdom", "^", -0.015), "not stated": ("general", "s", 0.015)}
    for questions, part in regained.groupby("questions", sort=False):
        colour, marker, shift = styles[str(questions)]
        _line(right, part, PALETTE[colour], marker, label=f"{questions} (n = {part.n.iloc[0]})", shift=shift)
    gap = regained[regained.questions == "all"].gap.iloc[0]
    right.axhline(gap, color=PALETTE["base"], ls="--", lw=1, label="base model")
    right.axhline(0, color=PALETTE["base"], lw=0.8)
    right.set(xlabel="training tokens", ylabel=_CHANGE, title="Knowledge that comes back (95 % intervals)")
    right.legend(fontsize=8)
    return left, right


def regained_panels(regained: pd.DataFrame) -> Figure:
    """What comes back against tokens, one panel a method: alone (open) and after EMBER (filled).

    ``regained`` has columns method, ember and those of ``regained_table`` for all questions and one metric. Dashed
    lines show what the arm had erased; the unedited model under the same training is in every panel.
    """
    methods = [method for method in regained.method.unique() if method != UNEDITED]
    regained = regained.sort_values("tokens", kind="stable")
    unedited = regained[regained.method == UNEDITED]
    figure, panels = new_panels(len(methods), (3.5, 3.1), most=4, below=0.6)
    for ax, method in zip(panels, methods, strict=True):
        for ember, part in regained[regained.method == method].groupby("ember"):
            arm = Arm(method, bool(ember))
            face = marker_face(arm)
            _line(ax, part, arm.colour, "o", mfc=face, shift=0.012 if ember else -0.012)
            ax.axhline(part.gap.iloc[0], color=arm.colour, ls=":" if face == "white" else "--", lw=1.2)
        if len(unedited):
            _line(ax, unedited, _UNEDITED_COLOUR, ".")
        ax.axhline(0, color=PALETTE["base"], lw=0.8)
        ax.set_title(Arm(method).name)
    for ax in panels[-4:]:  # the lowest of every column
        ax.set_xlabel("training tokens")
    for ax in panels[::4]:
        ax.set_ylabel(_CHANGE, fontsize=9)
    handles = [
        *alone_and_after(),
        Line2D([], [], marker=".", color=_UNEDITED_COLOUR, label="unedited model"),
        Line2D([], [], ls=":", color="#666666", label="all that it had erased, alone"),
        Line2D([], [], ls="--", color="#666666", label="… after EMBER (or EMBER)"),
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=5)
    return figure


def share_heatmap(regained: pd.DataFrame) -> Axes:
    """Share regained by attack and arm, but for the unedited model; "–" where too little was erased to divide by."""
    regained = regained[regained.method != UNEDITED]
    arms, attacks = regained.arm.unique(), regained.attack.unique()
    ax = new_axes(1.9 + 1.5 * len(arms), 1.2 + 0.6 * len(attacks))
    texts = [text.replace(" ", "\n", 1) for text in interval_texts(regained, "share", ".0%")]
    wide = regained.assign(text=texts).pivot(index="attack", columns="arm").loc[attacks]
    words = wide.text[arms].fillna("not run").to_numpy()
    sns.heatmap(
        wide.share[arms].astype(float), annot=words, fmt="", cmap="vlag", center=0, vmin=-1, vmax=1, ax=ax,
        annot_kws={"fontsize": 8}, cbar_kws={"label": "share regained"}, linewidths=1,
    )  # fmt: skip
    ax.grid(visible=False)
    ax.set(xlabel="", ylabel="", title="Share of the erased knowledge that comes back (95 % interval)")
    ax.set_yticklabels([str(a).replace("_", " ") for a in attacks], rotation=0)
    ax.set_xticklabels(arms, rotation=0)
    return ax


def precision_panel(table: pd.DataFrame) -> Figure:
    """What the precision of training does to relearning: the rows of a ``precision_table`` for one concept or all."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 6.6), layout="constrained", sharex=True)
    table = table.rename(columns=LIKELIHOOD_ENDS)
    settings = list(dict.fromkeys(zip(table.lr, table.budget, table.precision, strict=True)))
    tokens = table.groupby(["lr", "budget"]).tokens.mean()
    labels = [f"{p.replace('_', ' ')}\nlr {lr:g}\n{tokens[lr, budget]:.0f} tokens" for lr, budget, p in settings]
    arms = table.arm.unique()
    colours = (PALETTE["concept"], _UNEDITED_COLOUR, PALETTE["simdom"], PALETTE["general"])
    panels = (
        ("back", "Knowledge that comes back", _CHANGE),
        ("back_logprob", "… by likelihood", "log-likelihood of the right answer,\nchange (nats per character)"),
        ("changed", "Weights that changed at all", "share of trained values"),
        ("travelled", "Way back of the edited rows", "share of the edit undone"),
    )
    for ax, (column, title, name) in zip(grid.flat, panels, strict=True):
        for k, (arm, colour) in enumerate(zip(arms, colours, strict=False)):
            mine = table[table.arm == arm]
            places = [settings.index(key) for key in zip(mine.lr, mine.budget, mine.precision, strict=True)]
            x = np.array(places) + 0.16 * (k - (len(arms) - 1) / 2)
            dots(ax, mine, column, x=x, color=colour, label=arm)
        ax.set_xticks(range(len(settings)), labels, fontsize=8)
        ax.axhline(0, color=PALETTE["base"], lw=0.8)
        ax.set(title=title, ylabel=name, xlim=(-0.6, len(settings) - 0.4))
    grid[0, 0].legend(fontsize=8)
    return figure


def arrival_points(table: pd.DataFrame) -> Axes:
    """Where erasure arrives between the taught model and the one that never learned.

    ``table`` holds label (one line each), ember, share, ci_low and ci_high of one metric and half of an
    ``arrival_table``. A setting without a share is named as such.
    """
    labels = pd.Index(table.label.unique())
    ax = new_axes(7.4, 0.42 * len(labels) + 1.7)
    for name, after, colour, marker in _ALONE_AND_AFTER:
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
    ax.grid(visible=False, axis="y")
    label = "share of the taught knowledge that erasure took (95 % interval over questions)"
    ax.set(ylim=(len(labels) - 0.4, -0.6), xlabel=label)
    ax.set_title("Does erasure arrive where learning started?", pad=18)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return ax


def _line(ax: Axes, part: pd.DataFrame, colour: str, marker: str, *, shift: float = 0.0, **style: Any) -> None:
    """What came back against tokens, moved aside by ``shift`` times the last point so that bars stay apart."""
    x = part.tokens + shift * part.tokens.max()
    dots(ax, part, "back", x=x, fmt=f"{marker}-", color=colour, capsize=2, lw=1.3, **style)
