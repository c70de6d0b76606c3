"""Figures: tidy frame in, matplotlib Axes out. Nothing here reads or writes files."""

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

PALETTE = {
    "concept": "#D55E00", "simdom": "#0072B2", "general": "#009E73", "neutral": "#999999",
    "shared": "#CC79A7", "other_sense": "#CC79A7", "paragraph": "#E69F00", "base": "#444444",
}  # fmt: skip
LABELS = {
    "concept": "concept", "simdom": "similar domain", "general": "general knowledge", "neutral": "neutral text",
    "other_sense": "other-sense text", "paragraph": "concept text", "efficacy_cont": "efficacy",
    "specificity_cont": "specificity", "coherence": "coherence", "final_cont": "final score",
}  # fmt: skip


_PATCH = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}


def use_theme() -> None:
    """The one look of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9, rc={"figure.dpi": 110, "savefig.dpi": 160})


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def loss_curve(losses: Sequence[float], *, total: float, ax: Axes | None = None) -> Axes:
    """Unexplained share of ‖X‖² against the iteration; ``total`` is ‖X‖²."""
    ax = _axes(ax, (6, 3.4))
    share = np.asarray(losses) / total
    ax.plot(np.arange(1, len(share) + 1), share, color=PALETTE["simdom"])
    best = int(np.argmin(share))
    ax.plot(best + 1, share[best], "o", color=PALETTE["concept"], label=f"kept: {share[best]:.3f}")
    ax.set(xscale="log", xlabel="iteration", ylabel="‖X − G Fᵀ‖² / ‖X‖²", title="Sparse matrix factorization")
    ax.legend()
    return ax


def feature_scores(
    scores: pd.DataFrame, *, threshold: float, selected: Sequence[int], top: int = 12, ax: Axes | None = None
) -> Axes:
    """The best features' keyness scores with their top tokens; the selected ones in colour."""
    ax = _axes(ax, (9, 0.42 * top + 1.2))
    best = scores.head(top)
    colours = [PALETTE["concept"] if f in set(selected) else PALETTE["neutral"] for f in best.feature]
    y = np.arange(len(best))
    ax.barh(y, best.score, color=colours)
    for k, row in enumerate(best.itertuples()):
        text = " ".join(row.top_tokens.split()[:8])
        ax.text(row.score + 0.02 * float(best.score.max()), k, text, va="center", fontsize=8, bbox=_PATCH)
    ax.axvline(threshold, color=PALETTE["base"], linestyle="--", linewidth=1)
    ax.text(threshold, -0.75, " selection threshold", fontsize=8, color=PALETTE["base"], va="center")
    ax.set_yticks(y, [f"feature {f}" for f in best.feature])
    ax.grid(visible=False, axis="y")
    ax.set(xlim=(0, 1.9 * float(best.score.max())), ylim=(len(best) - 0.4, -1.1))
    ax.set(xlabel="keyness score (bits); * shared token, - neutral token", title="Which features carry the concept")
    return ax


def grid_curve(cells: pd.DataFrame, *, choice: str, ax: Axes | None = None) -> Axes:
    """Efficacy, specificity, coherence and final score of every cell of a grid, in its order, with intervals.

    ``cells`` has columns cell, metric, value, ci_low, ci_high.
    """
    order = list(dict.fromkeys(cells.cell))
    ax = _axes(ax, (max(5.5, 0.75 * len(order) + 2.4), 4.4))
    styles = {
        "efficacy_cont": ("#D55E00", "o"), "specificity_cont": ("#0072B2", "s"), "coherence": ("#009E73", "^"),
        "final_cont": ("#444444", "D"),
    }  # fmt: skip
    place = {cell: k for k, cell in enumerate(order)}
    for shift, (metric, (colour, marker)) in enumerate(styles.items()):
        rows = cells[cells.metric == metric]
        x = rows.cell.map(place) + (shift - 1.5) * 0.09
        ax.errorbar(x, rows.value, _bars(rows), color=colour, marker=marker, capsize=2, label=LABELS[metric], lw=1.2)
    ax.axvspan(place[choice] - 0.4, place[choice] + 0.4, color="#BBBBBB", alpha=0.4, zorder=0, lw=0, label="chosen")
    ax.axhline(0, color=PALETTE["base"], linewidth=1)
    ax.set_xticks(range(len(order)), [cell.replace(" ", "\n") for cell in order], fontsize=8)
    ax.set(ylabel="score (base model: 0, 1, 1, 0)")
    ax.set_title("The grid on the train split (95 % intervals over items)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02 - 0.055 * (1 + order[0].count(" "))), ncols=5, fontsize=8)
    return ax


def _bars(rows: pd.DataFrame) -> list[pd.Series]:
    """Lower and upper error bars, never negative."""
    return [(rows.value - rows.ci_low).clip(lower=0), (rows.ci_high - rows.value).clip(lower=0)]


CELL_MARKERS = "osD^vP"  # a grid with more cells than these names only the chosen one


def trade_off(rows: pd.DataFrame, *, by: str, choice: str | None = None, ax: Axes | None = None) -> Axes:
    """Efficacy against specificity, one point with intervals for each value of column ``by``, the choice marked.

    ``rows`` has columns ``by``, metric, value, ci_low, ci_high. Neighbours in a grid may nearly coincide, so the legend
    names them, not labels at the points.
    """
    ax = _axes(ax, (5.4, 4.4))
    x, y = (rows[rows.metric == m].set_index(by) for m in ("specificity_cont", "efficacy_cont"))
    few = len(x) <= len(CELL_MARKERS)
    ax.plot(1, 0, "*", color=PALETTE["base"], ms=10, label="base model")
    for k, name in enumerate(x.index):
        colour = PALETTE["concept"] if name == choice else PALETTE["simdom"]
        label = f"{name} (chosen)" if name == choice else str(name) if few else None
        marker = CELL_MARKERS[k] if few else "o"
        a, b = x.loc[[name]], y.loc[[name]]
        ax.errorbar(a.value, b.value, _bars(b), _bars(a), fmt=marker, color=colour, alpha=0.8, capsize=2, lw=0.9)
        ax.plot([], [], marker, color=colour, label=label)
    ax.axvline(0.7, color="#BBBBBB", linestyle=":", linewidth=1)
    ax.set(xlabel="specificity (continuous)", ylabel="efficacy (continuous)")
    ax.legend(fontsize=7, loc="best")
    return ax


def grid_panels(grids: pd.DataFrame, chosen: pd.DataFrame) -> Figure:
    """The whole search of one concept and seed: efficacy against specificity of every cell, one panel an arm.

    ``grids`` has columns method, ember, cell, metric, value, ci_low, ci_high; ``chosen`` method, ember, cell.
    """
    arms = list(dict.fromkeys(zip(grids.method, grids.ember, strict=True)))
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    size = (4.3 * columns, 3.6 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for ax in axes.flat[len(arms) :]:
        ax.axis("off")
    for ax, (method, ember) in zip(axes.flat, arms, strict=False):
        part = grids[(grids.method == method) & (grids.ember == ember)]
        choice = chosen[(chosen.method == method) & (chosen.ember == ember)].cell.iloc[0]
        trade_off(part, by="cell", choice=choice, ax=ax)
        ax.set_title(f"{'EMBER + ' if ember else ''}{method_name(method)}")
    label_bottoms(axes, len(arms))
    return figure


def label_bottoms(grid: np.ndarray, used: int) -> None:
    """Tick labels under the lowest panel of every column, where only the first ``used`` panels are drawn."""
    for ax in grid.flat[max(0, used - grid.shape[1]) : used]:
        ax.tick_params(labelbottom=True)


ARM_COLOURS = {
    "ember": "#444444", "snmf": "#0072B2", "rmu": "#D55E00", "crisp": "#009E73", "pisces": "#CC79A7",
    "mean_rows": "#E69F00", "random_direction": "#56B4E9", "matched_rows": "#8C510A", "zero_rows": "#117733",
    "leace": "#332288", "random_rows": "#AAAAAA",
}  # fmt: skip


def method_name(method: str) -> str:
    """How figures and tables write a method: acronyms in capitals, controls in words."""
    return method.replace("_", " ") if "_" in method else method.upper()


def arm_scores(arms: pd.DataFrame, *, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """The four scores of every arm, alone (open) and after EMBER (filled), with intervals.

    ``arms`` has columns method, ember, metric, value, ci_low, ci_high.
    """
    metrics = ("efficacy_cont", "specificity_cont", "coherence", "final_cont")
    methods = list(dict.fromkeys(arms.method))
    if axes is None:
        _, axes = plt.subplots(
            1, 4, figsize=(11.5, 0.55 * len(methods) + 2.0), sharey=True, layout="constrained"
        )  # fmt: skip
    for ax, metric in zip(axes, metrics, strict=True):
        for k, method in enumerate(methods):
            for ember in (False, True):
                rows = arms[(arms.method == method) & (arms.ember == ember) & (arms.metric == metric)]
                if rows.empty:
                    continue
                colour, shift = ARM_COLOURS.get(method, PALETTE["base"]), 0.14 if ember else -0.14
                face = colour if ember or method == "ember" else "white"
                ax.errorbar(
                    rows.value, [k + shift], xerr=_bars(rows), fmt="o", color=colour, mfc=face, capsize=3
                )  # fmt: skip
        ax.axvline(0.0 if metric in ("efficacy_cont", "final_cont") else 1.0, color=PALETTE["base"], lw=1, ls="--")
        ax.set(title=LABELS[metric], ylim=(len(methods) - 0.5, -0.5))
    axes[0].set_yticks(range(len(methods)), [method_name(method) for method in methods])
    for ax in axes:
        ax.set_xlabel("test split, 95 % interval")
    handles = [
        Line2D([], [], marker="o", ls="", color="#666666", mfc="white", label="alone"),
        Line2D([], [], marker="o", ls="", color="#666666", label="after EMBER (or EMBER)"),
        Line2D([], [], ls="--", color=PALETTE["base"], label="base model"),
    ]
    axes[0].figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3)
    return axes


def arm_trade_off(arms: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Efficacy against specificity on test; an arrow leads from each method alone to the method after EMBER."""
    ax = _axes(ax, (6.4, 4.8))
    wide = arms.pivot_table(index=["method", "ember"], columns="metric", values=["value", "ci_low", "ci_high"])
    for k, ((method, ember), row) in enumerate(wide.iterrows()):
        colour = ARM_COLOURS.get(str(method), PALETTE["base"])
        x, y = row["value", "specificity_cont"], row["value", "efficacy_cont"]
        yerr, xerr = (
            [[max(0.0, row["value", m] - row["ci_low", m])], [max(0.0, row["ci_high", m] - row["value", m])]]
            for m in ("efficacy_cont", "specificity_cont")
        )
        filled = ember or method == "ember"
        ax.errorbar(x, y, yerr, xerr, fmt="o", color=colour, mfc=colour if filled else "white", capsize=2, lw=0.8, ms=8)
        if ember:
            start = wide.loc[(method, False)]
            ax.annotate(
                "", (x, y), (start["value", "specificity_cont"], start["value", "efficacy_cont"]),
                arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.3},
            )  # fmt: skip
        else:
            # Controls lie beside EMBER; their names need room.
            shift = (9, 7 if k % 2 else -4) if "_" in str(method) else (8, -10) if method == "ember" else (6, 6)
            ax.annotate(
                method_name(str(method)), (x, y), xytext=shift, textcoords="offset points", fontsize=8, color=colour,
                path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5,
            )  # fmt: skip
    ax.plot(1, 0, "s", color=PALETTE["base"], label="base model")
    ax.plot([], [], "o", color="#666666", mfc="white", label="alone")
    ax.plot([], [], "o", color="#666666", label="after EMBER (or EMBER alone)")
    ax.margins(x=0.27 if arms.method.str.contains("_").any() else 0.12)
    ax.set(xlabel="specificity (continuous)", ylabel="efficacy (continuous)")
    ax.set_title("What each method erases, and at what price (95 % intervals)")
    ax.legend(fontsize=8, loc="best")
    return ax


def ember_effect(effects: pd.DataFrame, *, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """What EMBER adds to each method: paired differences with intervals; columns method, metric, value, ci_low, …"""
    metrics = [m for m in ("efficacy_cont", "specificity_cont", "coherence", "final_cont") if m in set(effects.metric)]
    methods = list(dict.fromkeys(effects.method))
    if axes is None:
        _, grid = plt.subplots(
            1, len(metrics), figsize=(11.5, 0.5 * len(methods) + 1.6), sharey=True, layout="constrained", squeeze=False
        )  # fmt: skip
        axes = list(grid[0])
    for ax, metric in zip(axes, metrics, strict=True):
        for k, method in enumerate(methods):
            rows = effects[(effects.method == method) & (effects.metric == metric)]
            colour = ARM_COLOURS.get(method, PALETTE["base"])
            ax.errorbar(rows.value, [k] * len(rows), xerr=_bars(rows), fmt="o", color=colour, capsize=3)
        ax.axvline(0, color=PALETTE["base"], lw=1, ls="--")
        ax.set(title=f"Δ {LABELS[metric]}", ylim=(len(methods) - 0.5, -0.5), xlabel="after EMBER − alone")
    axes[0].set_yticks(range(len(methods)), [method_name(method) for method in methods])
    return axes


def item_changes(changes: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Change of every question's gold log-likelihood, by set; ``changes`` has columns set and change."""
    ax = _axes(ax, (6.8, 3.6))
    order = [name for name in ("concept", "simdom", "general") if name in set(changes.set)]
    rng = np.random.default_rng(0)
    for k, name in enumerate(order):
        values = changes[changes.set == name].change.to_numpy()
        spread = k + rng.uniform(-0.22, 0.22, len(values))
        ax.scatter(spread, values, s=14, alpha=0.5, color=PALETTE[name], linewidths=0)
        mean = values.mean()
        error = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
        ax.errorbar(k + 0.33, mean, error, fmt="D", color=PALETTE["base"], capsize=3, markersize=5)
        ax.annotate(
            f"{mean:+.3f}", (k + 0.33, mean), xytext=(6, -9), textcoords="offset points", fontsize=8, va="center"
        )
    ax.axhline(0, color=PALETTE["base"], linewidth=1, label="base model")
    labels = [f"{LABELS[name]}\n(n = {(changes.set == name).sum()})" for name in order]
    ax.set_xticks(range(len(order)), labels)
    ax.set(xlim=(-0.5, len(order) - 0.2), ylabel="change of gold log-likelihood\n(nats per character)")
    ax.set_title("What the edit changes, question by question")
    ax.legend(loc="lower right", fontsize=8)
    return ax


def interval_bars(rows: pd.DataFrame, *, title: str, xlabel: str, base: float, ax: Axes | None = None) -> Axes:
    """Horizontal points with intervals; ``rows`` has columns label, value, ci_low, ci_high and optionally set."""
    ax = _axes(ax, (6.8, 0.45 * len(rows) + 1.3))
    for k, row in enumerate(rows.itertuples()):
        colour = PALETTE.get(getattr(row, "set", ""), PALETTE["simdom"])
        error = [[max(0.0, row.value - row.ci_low)], [max(0.0, row.ci_high - row.value)]]
        ax.errorbar(row.value, k, xerr=error, fmt="o", color=colour, capsize=3)
    ax.axvline(base, color=PALETTE["base"], linewidth=1, linestyle="--", label="base model")
    ax.set_yticks(range(len(rows)), rows.label)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel, title=title)
    ax.legend(fontsize=8)
    return ax


def role_composition(scores: pd.DataFrame, *, selected: Sequence[int], ax: Axes | None = None) -> Axes:
    """Keyness score against ratio_abs for every feature: what the paper's rule and ours would take."""
    ax = _axes(ax, (6, 4.2))
    chosen = scores.feature.isin(list(selected))
    shown = scores.ratio_abs.clip(lower=0.01)
    ax.scatter(shown[~chosen], scores.score[~chosen], s=14, color=PALETTE["neutral"], label="feature")
    ax.scatter(shown[chosen], scores.score[chosen], s=45, color=PALETTE["concept"], marker="D", label="selected")
    ax.axvline(2.0, color=PALETTE["simdom"], linestyle=":", label="paper's candidates: ratio_abs ≥ 2")
    ax.set(xscale="log", xlabel="ratio_abs (concept ÷ neutral activation)", ylabel="keyness score (bits)")
    ax.set_title("Keyness separates what the ratio does not")
    ax.legend(fontsize=8)
    return ax


def token_preview(rows: pd.DataFrame, *, top: int = 25, ax: Axes | None = None) -> Axes:
    """Relative change of the rows an edit touches, ordinary words marked."""
    ax = _axes(ax, (6, 0.24 * min(top, len(rows)) + 1.2))
    shown = rows.head(top)
    colours = np.where(shown.ordinary, PALETTE["general"], PALETTE["concept"])
    y = np.arange(len(shown))
    ax.barh(y, shown.change / shown.norm, color=colours)
    ax.set_yticks(y, [token.replace(" ", "␣") for token in shown.token], fontsize=8)
    ax.grid(visible=False, axis="y")
    ax.set(ylim=(len(shown) - 0.5, -0.5), xlabel="‖δ c‖ / ‖e‖", title="Rows the edit moves, and how far")
    handles = [Patch(color=PALETTE[name]) for name in ("concept", "general")]
    ax.legend(handles, ["key in concept text", "ordinary word"], fontsize=8, loc="lower right")
    return ax


def text_panel(samples: pd.DataFrame, *, width: int = 58, ax: Axes | None = None) -> Axes:
    """Generations side by side; ``samples`` has columns prompt, base, edited."""
    columns = (("prompt", 0.0, 34), ("base model", 0.26, width), ("edited model", 0.63, width))
    cells = [
        [fill(str(value), wide) or "(nothing)" for value, (_, _, wide) in zip(row, columns, strict=True)]
        for row in samples.to_numpy()
    ]
    lines = [max(text.count("\n") + 1 for text in row) for row in cells]
    total = sum(lines) + 0.9 * len(lines) + 1.6
    ax = _axes(ax, (12, 0.165 * total))
    ax.axis("off")
    for title, x, _ in columns:
        ax.text(x, 1.0, title, fontsize=9, fontweight="bold", va="top", transform=ax.transAxes)
    y = 1.0 - 1.6 / total
    for row, count in zip(cells, lines, strict=True):
        ax.axhline(y, color="#DDDDDD", linewidth=0.8)
        for text, (_, x, _) in zip(row, columns, strict=True):
            ax.text(x, y - 0.35 / total, text.replace("$", r"\$"), fontsize=8, va="top", transform=ax.transAxes)
        y -= (count + 0.9) / total
    ax.set(ylim=(0, 1), xlim=(0, 1))
    return ax
