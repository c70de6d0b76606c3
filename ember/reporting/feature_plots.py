"""Figures of fits, their features and edits, and what comes back in other fits: tidy frame in, Axes or Figure out."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ember.reporting.format import MISSING
from ember.reporting.plots import LABELS, PALETTE, dots, new_axes

_NAMES = {
    "cosine": "|cosine| with its mate", "rows_jaccard": "rows changed by both ÷ by either",
    "edit_cosine": "cosine of the edits", "tokens_jaccard": "overlap of the top 20 tokens",
    "returned": "share of features whose mate is selected",
}  # fmt: skip


def loss_curve(losses: Sequence[float], *, total: float) -> Axes:
    """Unexplained share of ‖X‖² against the iteration; ``total`` is ‖X‖²."""
    ax = new_axes(6, 3.4)
    share = np.asarray(losses) / total
    ax.plot(np.arange(1, len(share) + 1), share, color=PALETTE["simdom"])
    best = int(np.argmin(share))
    ax.plot(best + 1, share[best], "o", color=PALETTE["concept"], label=f"kept: {share[best]:.3f}")
    ax.set(xscale="log", xlabel="iteration", ylabel="‖X − G Fᵀ‖² / ‖X‖²", title="Sparse matrix factorization")
    ax.legend()
    return ax


def feature_scores(scores: pd.DataFrame, *, threshold: float, selected: Sequence[int], top: int = 12) -> Axes:
    """The best features' keyness scores with their top tokens; the selected ones in colour."""
    ax = new_axes(9, 0.42 * top + 1.2)
    best = scores.head(top)
    y = np.arange(len(best))
    ax.barh(y, best.score, color=np.where(best.feature.isin(selected), PALETTE["concept"], PALETTE["neutral"]))
    patch = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
    for k, row in enumerate(best.itertuples()):
        text = " ".join(row.top_tokens.split()[:8])
        ax.text(row.score + 0.02 * best.score.max(), k, text, va="center", fontsize=8, bbox=patch)
    ax.axvline(threshold, color=PALETTE["base"], linestyle="--", linewidth=1)
    ax.text(threshold, -0.75, " selection threshold", fontsize=8, color=PALETTE["base"], va="center")
    ax.set_yticks(y, [f"feature {f}" for f in best.feature])
    ax.grid(visible=False, axis="y")
    ax.set(xlim=(0, 1.9 * best.score.max()), ylim=(len(best) - 0.4, -1.1))
    ax.set(xlabel="keyness score (bits); * shared token, - neutral token", title="Which features carry the concept")
    return ax


def role_composition(scores: pd.DataFrame, *, selected: Sequence[int]) -> Axes:
    """Keyness score against ratio_abs for every feature: what the paper's rule and ours would take."""
    ax = new_axes(6, 4.2)
    chosen = scores.feature.isin(selected)
    shown = scores.ratio_abs.clip(lower=0.01)
    ax.scatter(shown[~chosen], scores.score[~chosen], s=14, color=PALETTE["neutral"], label="feature")
    ax.scatter(shown[chosen], scores.score[chosen], s=45, color=PALETTE["concept"], marker="D", label="selected")
    ax.axvline(2.0, color=PALETTE["simdom"], linestyle=":", label="paper's candidates: ratio_abs ≥ 2")
    ax.set(xscale="log", xlabel="ratio_abs (concept ÷ neutral activation)", ylabel="keyness score (bits)")
    ax.set_title("Keyness separates what the ratio does not")
    ax.legend(fontsize=8)
    return ax


def token_preview(rows: pd.DataFrame) -> Axes:
    """Relative change of the rows that an edit touches (the first 25), ordinary words marked."""
    shown = rows.head(25)
    ax = new_axes(6, 0.24 * len(shown) + 1.2)
    y = np.arange(len(shown))
    ax.barh(y, shown.change / shown.norm, color=np.where(shown.ordinary, PALETTE["general"], PALETTE["concept"]))
    ax.set_yticks(y, [token.replace(" ", "␣") for token in shown.token], fontsize=8)
    ax.grid(visible=False, axis="y")
    ax.set(ylim=(len(shown) - 0.5, -0.5), xlabel="‖δ c‖ / ‖e‖", title="Rows the edit moves, and how far")
    handles = [Patch(color=PALETTE[name]) for name in ("concept", "general")]
    ax.legend(handles, ["key in concept text", "ordinary word"], fontsize=8, loc="lower right")
    return ax


def item_changes(changes: pd.DataFrame) -> Axes:
    """Change of every question's gold log-likelihood, by set; ``changes`` has columns set and change."""
    ax = new_axes(6.8, 3.6)
    order = [name for name in ("concept", "simdom", "general") if name in set(changes.set)]
    rng = np.random.default_rng(0)
    for k, name in enumerate(order):
        values = changes[changes.set == name].change.to_numpy()
        spread = k + rng.uniform(-0.22, 0.22, len(values))
        ax.scatter(spread, values, s=14, alpha=0.5, color=PALETTE[name], linewidths=0)
        place, error = (k + 0.33, values.mean()), 1.96 * values.std(ddof=1) / np.sqrt(len(values))
        ax.errorbar(*place, error, fmt="D", color=PALETTE["base"], capsize=3, markersize=5)
        ax.annotate(f"{place[1]:+.3f}", place, (6, -9), textcoords="offset points", fontsize=8, va="center")
    ax.axhline(0, color=PALETTE["base"], linewidth=1, label="base model")
    labels = [f"{LABELS[name]}\n(n = {(changes.set == name).sum()})" for name in order]
    ax.set_xticks(range(len(order)), labels)
    ax.set(xlim=(-0.5, len(order) - 0.2), ylabel="change of gold log-likelihood\n(nats per character)")
    ax.set_title("What the edit changes, question by question")
    ax.legend(loc="lower right", fontsize=8)
    return ax


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
    """|cosine| of the best concept feature with its mate in a fit that differs in one thing (``varied_pairs``).

    Filled where the mate is selected too; the grey span holds the nearest siblings.
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
    """How many rows each fit's edit changes (``stability.fit_table``), and how many two share (``pair_table``)."""
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
