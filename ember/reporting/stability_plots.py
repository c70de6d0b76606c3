"""Figures of the stability of features: tidy frame in, matplotlib Axes or Figure out."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ember.reporting.format import MISSING
from ember.reporting.plots import LABELS, PALETTE, dots, new_axes

_NAMES = {
    "cosine": "|cosine| with its mate", "rows_jaccard": "rows changed by both ÷ by either",
    "edit_cosine": "cosine of the edits", "tokens_jaccard": "overlap of the top 20 tokens",
    "returned": "share of features whose mate is selected",
}  # fmt: skip


def _grid(ax: Axes, pairs: pd.DataFrame, measure: str, names: Sequence[str], down: Sequence[str]) -> None:
    """A measure in 0..1 of every pair of fits, with its numbers; a dash where there is none."""
    wide = pairs.pivot(index="fit", columns="other", values=measure).reindex(index=names, columns=names)
    values = wide.to_numpy(dtype=float)
    colours = plt.get_cmap("cividis").with_extremes(bad="#EEEEEE")
    image = ax.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap=colours, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = f"{value:.2f}" if np.isfinite(value) else MISSING
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color="black" if not value < 0.6 else "white")
    ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
    ax.set_yticks(range(len(names)), down, fontsize=8)
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax).set_label(_NAMES.get(measure, measure), fontsize=8)


def pair_grid(pairs: pd.DataFrame, *, value: str = "cosine") -> Axes:
    """One measure of every ordered pair of fits; ``pairs`` is ``stability.pair_table``'s, of all pairs."""
    names = list(dict.fromkeys([*pairs.fit, *pairs.other]))
    ax = new_axes(0.95 * len(names) + 4.4, 0.55 * len(names) + 2.2)
    _grid(ax, pairs, value, names, names)
    ax.set(xlabel="other fit", ylabel="fit", title=_NAMES.get(value, value))
    return ax


def variation_points(varied: pd.DataFrame) -> Axes:
    """|cosine| of the best concept feature with its mate in a fit that differs in one thing only, by what that is.

    Filled where the mate is selected too; the grey span holds the nearest siblings. ``varied`` is
    ``stability.varied_pairs``'s.
    """
    names = varied.varied.unique().tolist()
    ax = new_axes(7.4, 0.5 * len(names) + 1.9)
    for k, name in enumerate(names):
        mine = varied[(varied.varied == name) & varied.cosine.notna()]
        if mine.empty:
            ax.text(0.01, k, "nothing selected", va="center", fontsize=8, color=PALETTE["base"])
            continue
        width = max(mine.sibling.max() - mine.sibling.min(), 0.004)  # one sibling alone is to be seen too
        ax.barh(k, width, 0.7, mine.sibling.min(), color=PALETTE["base"], alpha=0.25)
        y = k + np.linspace(-0.25, 0.25, len(mine)) if len(mine) > 1 else np.array([float(k)])
        faces = np.where(mine.mate_selected == 1, PALETTE["concept"], "white")
        ax.scatter(mine.cosine, y, c=faces, edgecolors=PALETTE["concept"], s=32, zorder=3)
    point: dict[str, Any] = {"marker": "o", "ls": "", "color": PALETTE["concept"]}
    ax.plot([], [], label="mate, selected there too", **point)
    ax.plot([], [], label="mate, not selected there", **point, mfc="white")
    ax.plot([], [], label="nearest sibling in its own fit", color=PALETTE["base"], lw=6, alpha=0.25)
    ax.set_yticks(range(len(names)), [f"another {n}" if not n.startswith("rounding") else n for n in names])
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="|cosine| of feature directions")
    ax.grid(visible=False, axis="y")
    ax.set_title("Does the best concept feature come back when one thing changes?")
    ax.figure.legend(*ax.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return ax


def row_overlap(fits: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    """How many rows each fit's edit changes, and how many of them two edits share.

    ``fits`` is ``stability.fit_table``'s, ``pairs`` is ``stability.pair_table``'s of all pairs.
    """
    names = list(fits.fit)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(0.85 * len(names) + 8.0, 0.55 * len(names) + 2.2), layout="constrained", width_ratios=[1, 1.6]
    )
    left.barh(range(len(names)), fits.rows, color=PALETTE["concept"])
    for k, row in enumerate(fits.itertuples()):
        count = f"{row.selected} feature{'s' * (row.selected != 1)}" if row.selected else "nothing selected"
        left.text(row.rows, k, f" {row.rows} ({count})", va="center", fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.margins(x=0.6)
    left.grid(visible=False, axis="y")
    left.set(xlabel="embedding rows changed (count)", ylim=(len(names) - 0.5, -0.5), title="Rows selected")
    _grid(right, pairs, "rows_jaccard", names, [""] * len(names))
    right.set(xlabel="fit", title="Overlap of rows")
    return figure


def outcome_points(outcomes: pd.DataFrame) -> Axes:
    """Change of the right answer's probability by each fit's edit, with 95 % intervals; one colour a question set."""
    names, sets = outcomes.fit.unique().tolist(), outcomes.set.unique().tolist()
    ax = new_axes(7.6, 0.45 * len(names) + 1.9)
    for k, name in enumerate(sets):
        mine = outcomes[outcomes.set == name].set_index("fit").reindex(names)
        y = np.arange(len(names)) + 0.2 * (k - (len(sets) - 1) / 2)
        colour, label = PALETTE.get(name, PALETTE["neutral"]), f"{LABELS.get(name, name)} questions"
        dots(ax, mine, "change", y=y, color=colour, label=label)
    ax.axvline(0, color=PALETTE["base"], lw=1, ls="--", label="base model")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="change in probability of the right answer (95 % interval)")
    ax.set_title("What the choice of fit changes")
    ax.figure.legend(*ax.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return ax
