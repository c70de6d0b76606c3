"""Figures: tidy frame in, matplotlib Axes out. Nothing here reads or writes files."""

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Patch

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


def strength_curve(cells: pd.DataFrame, *, choice: float, ax: Axes | None = None) -> Axes:
    """Efficacy, specificity, coherence and final score against the edit strength, with intervals.

    ``cells`` has columns strength, metric, value, ci_low, ci_high.
    """
    ax = _axes(ax, (6.8, 4.2))
    styles = {
        "efficacy_cont": ("#D55E00", "o"), "specificity_cont": ("#0072B2", "s"), "coherence": ("#009E73", "^"),
        "final_cont": ("#444444", "D"),
    }  # fmt: skip
    strengths = sorted(cells.strength.unique())
    place = {strength: k for k, strength in enumerate(strengths)}
    for shift, (metric, (colour, marker)) in enumerate(styles.items()):
        rows = cells[cells.metric == metric].sort_values("strength")
        x = rows.strength.map(place) + (shift - 1.5) * 0.07
        error = [(rows.value - rows.ci_low).clip(lower=0), (rows.ci_high - rows.value).clip(lower=0)]
        ax.errorbar(x, rows.value, error, color=colour, marker=marker, capsize=2, label=LABELS[metric], linewidth=1.4)
    ax.axvline(place[choice], color="#BBBBBB", linewidth=9, alpha=0.5, zorder=0, label=f"chosen: δ = {choice:g}")
    ax.axhline(0, color=PALETTE["base"], linewidth=1)
    ax.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    ax.set(xlabel="edit strength δ", ylabel="score (base model: 0, 1, 1, 0)")
    ax.set_title("Choosing δ on the train split (95 % intervals over items)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, fontsize=8)
    return ax


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
