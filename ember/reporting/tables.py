"""Records → the tables of the report."""

from collections.abc import Collection, Iterable, Mapping

import pandas as pd

from ember.evaluation.metrics import Comparison, compare, pooled
from ember.reporting.plots import method_name
from ember.store.paths import slug

KEYS = ["concept", "method", "ember", "seed"]
ARM = ["concept", "method", "ember"]
SCORES = [
    "efficacy_cont", "specificity_cont", "coherence", "harmonic_cont", "final_cont",
    "efficacy", "specificity", "harmonic", "final",
]  # fmt: skip

# Further scores, where letters were asked for or a judge was there; otherwise no table has a row or column of them.
FURTHER = [
    "efficacy_letter", "specificity_letter", "harmonic_letter", "final_letter",
    "efficacy_open", "specificity_open", "harmonic_open", "final_open", "coherence_judged", "final_judged",
]  # fmt: skip

# What a reader is shown of them, and by which name.
SHOWN = {
    "efficacy_cont": "efficacy", "specificity_cont": "specificity", "coherence": "coherence",
    "final_cont": "final score",
}  # fmt: skip
SHOWN_FURTHER = {
    "efficacy_letter": "efficacy (letters)", "efficacy_open": "efficacy (open answers)",
    "coherence_judged": "coherence (judge)", "final_judged": "final score (judge)",
}  # fmt: skip


def figure_name(kind: str, frame: pd.DataFrame) -> str:
    """File name of a run's figure: its kind and what the frame's first row says of concept, method and seed."""
    row = frame.iloc[0]
    parts = [kind, slug(row.concept)]
    if "method" in frame:
        parts.append(f"{row.method}{'-with-ember' if row.ember else ''}")
    return "__".join([*parts, f"seed{row.seed}"])


def comparisons(items: pd.DataFrame) -> dict[tuple[str, str, bool, int], Comparison]:
    """The comparison with the base model of every run, from its item scores (columns base and edited).

    All draw the same items, so that two arms of a concept can be subtracted draw by draw.
    """
    keys = ["set", "item", "metric"]
    return {
        (str(c), str(m), bool(e), int(s)): compare(
            run[keys].assign(value=run.base), run[keys].assign(value=run.edited)
        )
        for (c, m, e, s), run in ember_first(items).groupby(KEYS, sort=False)
    }  # fmt: skip


def ember_first(items: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the tables: the unedited model, EMBER, methods alone and after EMBER, controls."""
    paired = set(items.method[items.ember])
    place = {"none": 0, "ember": 1} | dict.fromkeys(paired, 2)
    order = items.assign(place=[place.get(method, 3) for method in items.method])
    return order.sort_values(["concept", "place", "method", "ember", "seed"]).drop(columns="place")


ALL = "all concepts"
Run = tuple[str, int]  # concept, seed


def main_table(found: dict[tuple[str, str, bool, int], Comparison], cells: pd.DataFrame) -> pd.DataFrame:
    """One row for each arm and score: mean and interval over items and runs (seeds), and the cells chosen.

    Where there are several concepts, further rows pool all of them.
    """
    rows = []
    for arm, runs in _arms(found).items():
        mine = cells[cells.chosen & (cells[ARM] == list(arm)).all(axis=1)]
        chosen = "; ".join(dict.fromkeys(mine.sort_values("seed").cell))
        for metric in measured(runs.values()):
            parts = [(c.value(metric), c.draws[metric]) for c in runs.values()]
            interval = pooled(parts, groups=[concept for concept, _ in runs])
            rows.append((*arm, len(runs), chosen, metric, *interval))
    return pd.DataFrame(rows, columns=[*ARM, "runs", "cell", "metric", "value", "ci_low", "ci_high"])


def measured(comparisons: Iterable[Comparison]) -> list[str]:
    """The scores that all of the comparisons have: ``SCORES``, and what of ``FURTHER`` was measured in each."""
    found = list(comparisons)
    return SCORES + [metric for metric in FURTHER if all(metric in c.draws for c in found)]


def effect_table(found: dict[tuple[str, str, bool, int], Comparison]) -> pd.DataFrame:
    """What EMBER adds to each other method: the paired difference of every score, over items and runs (seeds).

    Where there are several concepts, further rows pool all of them.
    """
    arms = _arms(found)
    pairs = {
        (concept, method): (arms.get((concept, method, True), {}), alone)
        for (concept, method, ember), alone in arms.items()
        if not ember
    }
    return _differences(pairs)


def control_table(found: dict[tuple[str, str, bool, int], Comparison], controls: Collection[str]) -> pd.DataFrame:
    """By how much each control edit of EMBER's rows scores above EMBER: paired differences as in ``effect_table``."""
    arms = _arms(found)
    pairs = {
        (concept, method): (runs, arms.get((concept, "ember", False), {}))
        for (concept, method, _), runs in arms.items()
        if method in controls
    }
    return _differences(pairs)


def _differences(pairs: Mapping[tuple[str, str], tuple[dict[Run, Comparison], dict[Run, Comparison]]]) -> pd.DataFrame:
    """Of each (concept, method): every score of the first arm less that of the second, over their common runs."""
    rows = []
    for (concept, method), (first, second) in pairs.items():
        common = [run for run in second if run in first]
        if not common:
            continue
        for metric in measured(arm[run] for run in common for arm in (first, second)):
            both = [(first[run], second[run]) for run in common]
            parts = [(a.value(metric) - b.value(metric), a.draws[metric] - b.draws[metric]) for a, b in both]
            interval = pooled(parts, groups=[name for name, _ in common])
            rows.append((concept, method, len(common), metric, *interval))
    return pd.DataFrame(rows, columns=["concept", "method", "runs", "metric", "value", "ci_low", "ci_high"])


def _arms(
    found: dict[tuple[str, str, bool, int], Comparison],
) -> dict[tuple[str, str, bool], dict[Run, Comparison]]:
    """The runs of each arm of each concept and, if there are several concepts, of each arm on all of them."""
    arms: dict[tuple[str, str, bool], dict[Run, Comparison]] = {}
    for (concept, method, ember, seed), comparison in found.items():
        arms.setdefault((concept, method, ember), {})[concept, seed] = comparison
    if len({concept for concept, *_ in found}) > 1:
        for (concept, method, ember, seed), comparison in found.items():
            arms.setdefault((ALL, method, ember), {})[concept, seed] = comparison
    return arms


def change_table(edited: pd.DataFrame) -> pd.DataFrame:
    """Paired changes from the base model by set, with interval and effect size d_z."""
    rows = edited[edited.metric.str.startswith("delta_") | (edited.metric == "selectivity")]
    columns = [*KEYS, "set", "metric", "value", "ci_low", "ci_high", "effect_size", "n"]
    return rows[columns].reset_index(drop=True)


def grid_table(train: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Every cell of every grid: its scores on train, and which one was chosen."""
    rows = train[(train.set == "") & train.metric.isin(SCORES)]
    wide = rows.pivot(index=[*KEYS, "cell"], columns="metric", values="value")
    choice = ["behind", "standard_error", "tie", "chosen"]
    table = cells[[*KEYS, "cell", *choice]].merge(wide[SCORES].reset_index(), on=[*KEYS, "cell"], how="left")
    return table[[*KEYS, "cell", *SCORES, *choice]]


def arm_name(method: str, ember: bool) -> str:
    """How tables name an arm: ``EMBER``, ``RMU``, ``EMBER + RMU``; ``unedited`` for the model as it is."""
    if method == "none":
        return "unedited"
    return f"EMBER + {method_name(method)}" if ember else method_name(method)


def arm_overview(main: pd.DataFrame) -> pd.DataFrame:
    """The main table as a reader wants it: one row an arm, one column a score with its interval.

    Letters and judged scores have a column if any arm has them, with "–" where one has not.
    """
    rows = []
    shown = SHOWN | {metric: title for metric, title in SHOWN_FURTHER.items() if (main.metric == metric).any()}
    for (concept, method, ember), arm in main.groupby(ARM, sort=False):
        scores = arm.set_index("metric")
        row = {"concept": concept, "method": arm_name(method, ember), "chosen on train": arm.cell.iloc[0]}
        row["runs"] = arm.runs.iloc[0]
        for metric, title in shown.items():
            s = scores.loc[metric] if metric in scores.index else None
            row[title] = "–" if s is None else f"{s.value:.2f} [{s.ci_low:.2f}, {s.ci_high:.2f}]"
        rows.append(row)
    return pd.DataFrame(rows)


def verdict_table(
    scores: pd.DataFrame,
    strengths: pd.DataFrame,
    areas: pd.DataFrame,
    left: pd.DataFrame,
    spared: pd.DataFrame,
    *,
    concept: str,
) -> pd.DataFrame:
    """Does EMBER beat its controls, and what does the frequency rule save: one row an answer.

    The frames are ``control_table``'s, ``trade.strength_table``'s, ``trade.area_table``'s,
    ``relearn_tables.control_table``'s and ``trade.equal_gain_table``'s; any may be empty.

    Columns: question, beside (the control), measure, runs, difference from EMBER and its 95 % interval over items,
    seeds and concepts, better (EMBER, the control, or "not shown").
    """
    rows = []
    for row in scores.itertuples():
        if row.metric in SHOWN:
            interval = (row.value, row.ci_low, row.ci_high)
            rows.append(("scores before relearning", method_name(row.method), SHOWN[row.metric], row.runs, 1, interval))
    for row in left.itertuples():
        if row.metric == "gold_prob" and row.attack == "all":
            measure = f"probability of the right answer ({row.precision}, lr {float(row.lr):g})"
            interval = (row.value, row.ci_low, row.ci_high)
            rows.append(("left after relearning", method_name(row.method), measure, row.runs, -1, interval))
    same = strengths[strengths.delta == 1] if len(strengths) else strengths
    for question, table, sign, measure in (
        ("taken at delta=1", same, 1, "probability of the right answer"),
        ("area under the trade", areas, 1, "probability taken, against {cost} cost"),
        ("cost at equal erasure", spared, -1, "{cost} cost"),
    ):
        for row in table.itertuples():
            if row.edit != "EMBER":
                interval = (row.difference, row.difference_low, row.difference_high)
                rows.append((question, row.edit, measure.format(**row._asdict()), row.runs, sign, interval))
    answers = []
    for question, beside, measure, runs, sign, (value, low, high) in rows:
        better = {True: beside, False: "EMBER"}[sign * value > 0] if low * high > 0 else "not shown"
        answers.append((concept, question, beside, measure, runs, value, low, high, better))
    columns = ["concept", "question", "beside", "measure", "runs", "difference", "ci_low", "ci_high", "better"]
    return pd.DataFrame(answers, columns=columns)


def headline(base: pd.DataFrame, edited: pd.DataFrame) -> pd.DataFrame:
    """A few lines for a busy reader on EMBER alone: base model, edited model, change with its 95 % interval.

    One line for each concept and measure, the first seed only.
    """
    lines = []
    alone = edited[(edited.method == "ember") & ~edited.ember]
    for concept, arm in alone.groupby("concept", sort=False):
        arm = arm[arm.seed == arm.seed.min()]
        for label, set_, metric in (
            ("concept questions, accuracy", "concept", "accuracy"),
            ("similar domain, accuracy", "simdom", "accuracy"),
            ("general knowledge, accuracy", "general", "accuracy"),
            ("concept questions, log-likelihood of the answer (nats/char)", "concept", "gold_logprob"),
            ("similar domain, log-likelihood of the answer (nats/char)", "simdom", "gold_logprob"),
            ("neutral text, loss (nats/token)", "neutral", "loss"),
            ("other-sense text, loss (nats/token)", "other_sense", "loss"),
        ):
            if not len(arm[arm.set == set_]):
                continue  # released concepts have no texts in another sense
            before = _row(base[base.concept == concept], set_, metric)
            after, change = _row(arm, set_, metric), _row(arm, set_, f"delta_{metric}")
            lines.append(
                {
                    "concept": concept,
                    "cell": arm.cell.iloc[0],
                    "measure (test split)": label,
                    "base model": f"{before.value:.3f}",
                    "edited": f"{after.value:.3f}",
                    "change [95 % interval]": f"{change.value:+.3f} [{change.ci_low:+.3f}, {change.ci_high:+.3f}]",
                }
            )
    return pd.DataFrame(lines)


def _row(frame: pd.DataFrame, set_: str, metric: str) -> pd.Series:
    return frame[(frame.set == set_) & (frame.metric == metric)].iloc[0]
