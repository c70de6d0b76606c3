"""Figures of one fit and of what one edit of its features changes: tokens, features, rows, questions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ember.reporting.plots import LABELS, PALETTE, new_axes


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
