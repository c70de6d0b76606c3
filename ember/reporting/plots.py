"""Figures of any scores, arms and texts, and what all figures share: tidy frame in, matplotlib Axes or Figure out."""

from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ember.data.arms import Arm
from ember.reporting.format import error_bars
from ember.reporting.tables import SHOWN

PALETTE = {
    "concept": "#D55E00", "simdom": "#0072B2", "general": "#009E73", "neutral": "#999999",
    "shared": "#CC79A7", "other_sense": "#CC79A7", "paragraph": "#E69F00", "base": "#444444",
}  # fmt: skip
LABELS = {
    "concept": "concept", "simdom": "similar domain", "general": "general knowledge", "neutral": "neutral text",
    "other_sense": "other-sense text", "paragraph": "concept text", **SHOWN,
}  # fmt: skip
SCORE_STYLES = {
    "efficacy_cont": ("#D55E00", "o"), "specificity_cont": ("#0072B2", "s"), "coherence": ("#009E73", "^"),
    "final_cont": ("#444444", "D"),
}  # fmt: skip
CELL_MARKERS = "osD^vP"  # a grid with more cells than these names only the chosen one


def use_theme() -> None:
    """The one look of all figures."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9, rc={"figure.dpi": 110, "savefig.dpi": 160})


def new_axes(width: float, height: float) -> Axes:
    """Axes of a new figure of this size (inches)."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def new_panels(
    count: int, size: tuple[float, float], *, most: int | None = None, beside: float = 0.0, below: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Panels of this size (inches) with one y axis; with ``most``, so many side by side, and one x axis too."""
    columns = min(most or count, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(size[0] * columns + beside, size[1] * rows + below), layout="constrained",
        squeeze=False, sharex=most is not None, sharey=True,
    )  # fmt: skip
    for ax in grid.flat[count:]:
        ax.axis("off")
    for ax in grid.flat[max(0, count - columns) : count]:  # the lowest panel of every column
        ax.tick_params(labelbottom=True)
    return figure, list(grid.flat[:count])


def dots(ax: Axes, rows: pd.DataFrame, name: str = "value", *, x: Any = None, y: Any = None, **style: Any) -> None:
    """Points of column NAME with their intervals: above places ``x``, or along lines ``y``."""
    style = {"fmt": "o", "capsize": 3, **style}
    if y is None:
        ax.errorbar(x, rows[name], error_bars(rows, name), **style)
    else:
        ax.errorbar(rows[name], y, xerr=error_bars(rows, name), **style)


def marker_face(arm: Arm) -> str:
    """Filled with the arm's colour after EMBER and for EMBER itself, white for a method alone."""
    return arm.colour if arm.ember or arm.method == "ember" else "white"


def alone_and_after(**style: Any) -> list[Line2D]:
    """What ``marker_face`` says, for a legend."""
    faces = {"alone": "white", "after EMBER (or EMBER)": "#666666"}
    return [Line2D([], [], marker="o", color="#666666", mfc=face, label=arm, **style) for arm, face in faces.items()]


def grid_curve(cells: pd.DataFrame, *, choice: str) -> Axes:
    """The four scores of every cell of a grid, in its order; columns cell, metric, value, ci_low, ci_high."""
    order = pd.Index(cells.cell.unique())
    ax = new_axes(max(5.5, 0.75 * len(order) + 2.4), 4.4)
    for shift, (metric, (colour, marker)) in enumerate(SCORE_STYLES.items()):
        rows = cells[cells.metric == metric]
        x = order.get_indexer(rows.cell) + (shift - 1.5) * 0.09
        dots(ax, rows, x=x, fmt=f"{marker}-", color=colour, capsize=2, label=LABELS[metric], lw=1.2)
    best = order.get_loc(choice)
    ax.axvspan(best - 0.4, best + 0.4, color="#BBBBBB", alpha=0.4, zorder=0, lw=0, label="chosen")
    ax.axhline(0, color=PALETTE["base"], linewidth=1)
    ax.set_xticks(range(len(order)), [cell.replace(" ", "\n") for cell in order], fontsize=8)
    ax.set(ylabel="score (base model: 0, 1, 1, 0)", title="The grid on the train split (95 % intervals over items)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02 - 0.055 * (1 + order[0].count(" "))), ncols=5, fontsize=8)
    return ax


def trade_off(rows: pd.DataFrame, *, by: str, choice: str | None = None, ax: Axes | None = None) -> Axes:
    """Efficacy against specificity with intervals, a point for each value of column ``by``, the choice marked.

    ``rows`` has columns ``by``, metric, value, ci_low, ci_high. Points may nearly coincide, so the legend names them.
    """
    ax = ax or new_axes(5.4, 4.4)
    x, y = (rows[rows.metric == m].set_index(by) for m in ("specificity_cont", "efficacy_cont"))
    few = len(x) <= len(CELL_MARKERS)
    ax.plot(1, 0, "*", color=PALETTE["base"], ms=10, label="base model")
    for k, name in enumerate(x.index):
        colour = PALETTE["concept"] if name == choice else PALETTE["simdom"]
        label = f"{name} (chosen)" if name == choice else str(name) if few else None
        marker = CELL_MARKERS[k] if few else "o"
        style: dict[str, Any] = {"fmt": marker, "color": colour, "alpha": 0.8, "capsize": 2, "lw": 0.9}
        dots(ax, y.loc[[name]], x=x.value[[name]], xerr=error_bars(x.loc[[name]]), **style)
        ax.plot([], [], marker, color=colour, label=label)
    ax.axvline(0.7, color="#BBBBBB", linestyle=":", linewidth=1)
    ax.set(xlabel="specificity (continuous)", ylabel="efficacy (continuous)")
    ax.legend(fontsize=7, loc="best")
    return ax


def grid_panels(grids: pd.DataFrame, chosen: pd.DataFrame) -> Figure:
    """``trade_off`` of all cells of one concept and seed's grids, one panel an arm; ``chosen``: method, ember, cell."""
    choices = chosen.set_index(["method", "ember"]).cell
    arms = grids.groupby(["method", "ember"], sort=False)
    figure, panels = new_panels(len(arms), (4.3, 3.6), most=3)
    for ax, (arm, part) in zip(panels, arms, strict=True):
        trade_off(part, by="cell", choice=choices[arm], ax=ax).set_title(Arm(*arm).name)
    return figure


def arm_scores(arms: pd.DataFrame) -> Figure:
    """The four scores of every arm, alone (open) and after EMBER (filled); columns method, ember, metric, value, …"""
    figure, panels = _score_panels(arms, line=0.55, frame=2.0, aside=0.14)
    for metric, ax in panels.items():
        ax.axvline(0.0 if metric in ("efficacy_cont", "final_cont") else 1.0, color=PALETTE["base"], lw=1, ls="--")
        ax.set(title=LABELS[metric], xlabel="test split, 95 % interval")
    handles = [*alone_and_after(ls=""), Line2D([], [], ls="--", color=PALETTE["base"], label="base model")]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def ember_effect(effects: pd.DataFrame) -> Figure:
    """What EMBER adds to each method: paired differences with intervals; columns method, metric, value, ci_low, …"""
    figure, panels = _score_panels(effects.assign(ember=True), line=0.5, frame=1.6, aside=0.0)
    for metric, ax in panels.items():
        ax.axvline(0, color=PALETTE["base"], lw=1, ls="--")
        ax.set(title=f"Δ {LABELS[metric]}", xlabel="after EMBER − alone")
    return figure


def _score_panels(arms: pd.DataFrame, *, line: float, frame: float, aside: float) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each score that there is, with a line for each method: the point alone above, after EMBER below."""
    metrics = [metric for metric in SCORE_STYLES if metric in set(arms.metric)]
    methods = arms.method.unique().tolist()
    figure, axes = new_panels(len(metrics), (11.5 / len(metrics), line * len(methods) + frame))
    axes[0].set_yticks(range(len(methods)), [Arm(method).name for method in methods])
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    panels = dict(zip(metrics, axes, strict=True))
    for metric, ax in panels.items():
        for (method, ember), rows in arms[arms.metric == metric].groupby(["method", "ember"], sort=False):
            arm, y = Arm(method, ember), methods.index(method) + (aside if ember else -aside)
            dots(ax, rows, y=[y], color=arm.colour, mfc=marker_face(arm))
    return figure, panels


def arm_trade_off(arms: pd.DataFrame) -> Axes:
    """Efficacy against specificity on test; an arrow leads from each method alone to the method after EMBER."""
    ax = new_axes(6.4, 4.8)
    scores = arms.set_index(["metric", "method", "ember"]).sort_index()
    x, y = scores.loc["specificity_cont"], scores.loc["efficacy_cont"]
    for k, key in enumerate(x.index):
        arm, place = Arm(*key), (x.value[key], y.value[key])
        style: dict[str, Any] = {"color": arm.colour, "mfc": marker_face(arm), "capsize": 2, "lw": 0.8, "ms": 8}
        dots(ax, y.loc[[key]], x=x.value[[key]], xerr=error_bars(x.loc[[key]]), **style)
        if arm.ember:
            arrow, alone = {"arrowstyle": "->", "color": arm.colour, "lw": 1.3}, (arm.method, False)
            ax.annotate("", place, (x.value[alone], y.value[alone]), arrowprops=arrow)
        else:
            # Controls lie beside EMBER; their names need room.
            shift = (9, 7 if k % 2 else -4) if "_" in arm.method else (8, -10) if arm.method == "ember" else (6, 6)
            ax.annotate(
                arm.name, place, xytext=shift, textcoords="offset points", fontsize=8, color=arm.colour,
                path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5,
            )  # fmt: skip
    ax.plot(1, 0, "s", color=PALETTE["base"], label="base model")
    ax.plot([], [], "o", color="#666666", mfc="white", label="alone")
    ax.plot([], [], "o", color="#666666", label="after EMBER (or EMBER alone)")
    ax.margins(x=0.27 if arms.method.str.contains("_").any() else 0.12)
    title = "What each method erases, and at what price (95 % intervals)"
    ax.set(xlabel="specificity (continuous)", ylabel="efficacy (continuous)", title=title)
    ax.legend(fontsize=8, loc="best")
    return ax


def interval_bars(rows: pd.DataFrame, *, title: str, xlabel: str, base: float) -> Axes:
    """Horizontal points with intervals; ``rows`` has columns label, value, ci_low, ci_high and optionally set."""
    ax = new_axes(6.8, 0.45 * len(rows) + 1.3)
    for k, name in enumerate(rows.get("set", [""] * len(rows))):
        dots(ax, rows.iloc[[k]], y=[k], color=PALETTE.get(name, PALETTE["simdom"]))
    ax.axvline(base, color=PALETTE["base"], linewidth=1, linestyle="--", label="base model")
    ax.set_yticks(range(len(rows)), rows.label)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel, title=title)
    ax.legend(fontsize=8)
    return ax


def text_panel(samples: pd.DataFrame) -> Axes:
    """Generations side by side; ``samples`` has columns prompt, base, edited."""
    columns = (("prompt", 0.0, 34), ("base model", 0.26, 58), ("edited model", 0.63, 58))
    cells = [
        [fill(str(value), wide) or "(nothing)" for value, (_, _, wide) in zip(row, columns, strict=True)]
        for row in samples.to_numpy()
    ]
    lines = [max(text.count("\n") + 1 for text in row) for row in cells]
    total = sum(lines) + 0.9 * len(lines) + 1.6
    ax = new_axes(12, 0.165 * total)
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
