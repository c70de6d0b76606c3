"""Records → the tables of the report."""

import json

import pandas as pd

from ember.paths import slug

KEYS = ["concept", "method", "ember", "seed"]
SCORES = [
    "efficacy_cont", "specificity_cont", "coherence", "harmonic_cont", "final_cont",
    "efficacy", "specificity", "harmonic", "final",
]  # fmt: skip


def figure_name(kind: str, frame: pd.DataFrame) -> str:
    """File name of a run's figure: its kind and what the frame's first row says of concept, method and seed."""
    row = frame.iloc[0]
    parts = [kind, slug(row.concept)]
    if "method" in frame:
        parts.append(f"{row.method}{'-with-ember' if row.ember else ''}")
    return "__".join([*parts, f"seed{row.seed}"])


def with_strength(records: pd.DataFrame) -> pd.DataFrame:
    """Add the edit strength δ from the records' config."""
    return records.assign(strength=[float(json.loads(config)["delta"]) for config in records.config])


def main_table(edited: pd.DataFrame) -> pd.DataFrame:
    """One row for each arm and score: value with interval, and the strength chosen."""
    rows = with_strength(edited[(edited.set == "") & edited.metric.isin(SCORES)])
    rows = rows.assign(order=rows.metric.map(SCORES.index)).sort_values([*KEYS, "order"])
    return rows[[*KEYS, "strength", "metric", "value", "ci_low", "ci_high"]].reset_index(drop=True)


def change_table(edited: pd.DataFrame) -> pd.DataFrame:
    """Paired changes from the base model by set, with interval and effect size d_z."""
    rows = edited[edited.metric.str.startswith("delta_") | (edited.metric == "selectivity")]
    columns = [*KEYS, "set", "metric", "value", "ci_low", "ci_high", "effect_size", "n"]
    return rows[columns].reset_index(drop=True)


def grid_table(train: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Every cell of the grid: its scores on train, and which one was chosen."""
    wide = with_strength(train[(train.set == "") & train.metric.isin(SCORES)]).pivot_table(
        index=[*KEYS, "strength"], columns="metric", values="value"
    )
    columns = [*KEYS, "strength", "behind", "standard_error", "tie", "chosen"]
    return wide[SCORES].reset_index().merge(cells[columns], on=[*KEYS, "strength"])


def headline(base: pd.DataFrame, edited: pd.DataFrame) -> pd.DataFrame:
    """A few lines for a busy reader: base model, edited model, change with its 95 % interval.

    One line for each concept, arm and measure, the first seed only.
    """
    lines = []
    for (concept, method, ember), arm in edited.groupby(["concept", "method", "ember"]):
        arm = with_strength(arm[arm.seed == arm.seed.min()])
        name = f"{method}{' + EMBER' if ember else ''}, δ = {arm.strength.iloc[0]:g}"
        for label, set_, metric in (
            ("concept questions, accuracy", "concept", "accuracy"),
            ("similar domain, accuracy", "simdom", "accuracy"),
            ("general knowledge, accuracy", "general", "accuracy"),
            ("concept questions, log-likelihood of the answer (nats/char)", "concept", "gold_logprob"),
            ("similar domain, log-likelihood of the answer (nats/char)", "simdom", "gold_logprob"),
            ("neutral text, loss (nats/token)", "neutral", "loss"),
            ("other-sense text, loss (nats/token)", "other_sense", "loss"),
        ):
            before = _row(base[base.concept == concept], set_, metric)
            after, change = _row(arm, set_, metric), _row(arm, set_, f"delta_{metric}")
            lines.append(
                {
                    "concept": concept,
                    "arm": name,
                    "measure (test split)": label,
                    "base model": f"{before.value:.3f}",
                    "edited": f"{after.value:.3f}",
                    "change [95 % interval]": f"{change.value:+.3f} [{change.ci_low:+.3f}, {change.ci_high:+.3f}]",
                }
            )
    return pd.DataFrame(lines)


def _row(frame: pd.DataFrame, set_: str, metric: str) -> pd.Series:
    return frame[(frame.set == set_) & (frame.metric == metric)].iloc[0]
