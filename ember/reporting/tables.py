"""Records of erasing → its tables."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from ember.data.arms import Arm
from ember.evaluation.metrics import Comparison, compare
from ember.evaluation.resampling import pooled
from ember.reporting.format import MISSING, interval_text, interval_texts

ARM_COLUMNS = ["concept", "method", "ember"]
RUN_COLUMNS = [*ARM_COLUMNS, "seed"]
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

# Plain measures of one set each.
PLAIN = {
    ("concept", "accuracy"): "concept questions, accuracy",
    ("simdom", "accuracy"): "similar domain, accuracy",
    ("general", "accuracy"): "general knowledge, accuracy",
    ("concept", "gold_logprob"): "concept questions, log-likelihood of the answer (nats/char)",
    ("simdom", "gold_logprob"): "similar domain, log-likelihood of the answer (nats/char)",
    ("neutral", "loss"): "neutral text, loss (nats/token)",
    ("other_sense", "loss"): "other-sense text, loss (nats/token)",
}

ALL = "all concepts"
Comparisons = Mapping[tuple[str, str, bool, int], Comparison]  # by concept, method, ember and seed
_Runs = dict[tuple[str, int], Comparison]  # of one arm, by concept and seed


def each_concept(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each concept and, if there are several, all of them as those of ``ALL``."""
    parts = [(str(concept), part) for concept, part in frame.groupby("concept", sort=False)]
    yield from [*parts, (ALL, frame)] if len(parts) > 1 else parts


def ember_first(items: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the tables: the unedited model, EMBER, methods alone and after EMBER, controls."""
    paired = set(items.method[items.ember])
    place = {"none": 0, "ember": 1} | dict.fromkeys(paired, 2)
    order = items.assign(place=[place.get(method, 3) for method in items.method])
    return order.sort_values(["concept", "place", "method", "ember", "seed"]).drop(columns="place")


def comparisons(items: pd.DataFrame) -> Comparisons:
    """The comparison with the base model of every run, from its item scores (columns base and edited).

    All draw the same items, so that two arms of a concept can be subtracted draw by draw.
    """
    keys = ["set", "item", "metric"]
    return {
        (str(c), str(m), bool(e), int(s)): compare(
            run[keys].assign(value=run.base), run[keys].assign(value=run.edited)
        )
        for (c, m, e, s), run in ember_first(items).groupby(RUN_COLUMNS, sort=False)
    }  # fmt: skip


def main_table(compared: Comparisons, cells: pd.DataFrame) -> pd.DataFrame:
    """One row for each arm and score: mean and interval over items and runs (seeds), and the cells chosen.

    Where there are several concepts, further rows pool all of them.
    """
    rows = []
    for arm, runs in _arms(compared).items():
        mine = cells[cells.chosen & (cells[ARM_COLUMNS] == list(arm)).all(axis=1)]
        chosen = "; ".join(dict.fromkeys(mine.sort_values("seed").cell))
        for metric in measured(runs.values()):
            parts = [(run.value(metric), run.draws[metric]) for run in runs.values()]
            interval = pooled(parts, groups=[concept for concept, _ in runs])
            rows.append((*arm, len(runs), chosen, metric, *interval))
    return pd.DataFrame(rows, columns=[*ARM_COLUMNS, "runs", "cell", "metric", "value", "ci_low", "ci_high"])


def measured(compared: Iterable[Comparison]) -> list[str]:
    """The scores that all of the comparisons have: ``SCORES``, and what of ``FURTHER`` was measured in each."""
    runs = list(compared)
    return SCORES + [metric for metric in FURTHER if all(metric in run.draws for run in runs)]


def effect_table(compared: Comparisons) -> pd.DataFrame:
    """What EMBER adds to each other method: the paired difference of every score, over items and runs (seeds).

    Where there are several concepts, further rows pool all of them.
    """
    arms = _arms(compared)
    alone = {(concept, method): runs for (concept, method, ember), runs in arms.items() if not ember}
    return _differences({key: (arms.get((*key, True), {}), runs) for key, runs in alone.items()})


def control_table(compared: Comparisons, controls: Collection[str]) -> pd.DataFrame:
    """By how much each control edit of EMBER's rows scores above EMBER: paired differences as in ``effect_table``."""
    arms = _arms(compared)
    beside = {(concept, method): runs for (concept, method, _), runs in arms.items() if method in controls}
    return _differences({key: (runs, arms.get((key[0], "ember", False), {})) for key, runs in beside.items()})


def _differences(pairs: Mapping[tuple[str, str], tuple[_Runs, _Runs]]) -> pd.DataFrame:
    """Of each (concept, method): every score of the first arm less that of the second, over their common runs."""
    rows = []
    for (concept, method), (first, second) in pairs.items():
        both = {run: (first[run], second[run]) for run in second if run in first}
        if not both:
            continue
        for metric in measured(one for pair in both.values() for one in pair):
            parts = [(a.value(metric) - b.value(metric), a.draws[metric] - b.draws[metric]) for a, b in both.values()]
            interval = pooled(parts, groups=[name for name, _ in both])
            rows.append((concept, method, len(both), metric, *interval))
    return pd.DataFrame(rows, columns=["concept", "method", "runs", "metric", "value", "ci_low", "ci_high"])


def _arms(compared: Comparisons) -> dict[tuple[str, str, bool], _Runs]:
    """The runs of each arm of each concept and, if there are several concepts, of each arm on all of them."""
    arms: dict[tuple[str, str, bool], _Runs] = {}
    for own in (True, False) if len({concept for concept, *_ in compared}) > 1 else (True,):
        for (concept, method, ember, seed), comparison in compared.items():
            arms.setdefault((concept if own else ALL, method, ember), {})[concept, seed] = comparison
    return arms


def change_table(edited: pd.DataFrame) -> pd.DataFrame:
    """Paired changes from the base model by set, with interval and effect size d_z."""
    rows = edited[edited.metric.str.startswith("delta_") | (edited.metric == "selectivity")]
    columns = [*RUN_COLUMNS, "set", "metric", "value", "ci_low", "ci_high", "effect_size", "n"]
    return rows[columns].reset_index(drop=True)


def grid_table(train: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Every cell of every grid: its scores on train, and which one was chosen."""
    keys, choice = [*RUN_COLUMNS, "cell"], ["behind", "standard_error", "tie", "chosen"]
    rows = train[(train.set == "") & train.metric.isin(SCORES)]
    wide = rows.pivot(index=keys, columns="metric", values="value")[SCORES].reset_index()
    return cells[keys + choice].merge(wide, on=keys, how="left")[keys + SCORES + choice]


def arm_overview(main: pd.DataFrame) -> pd.DataFrame:
    """The main table as a reader wants it: one row an arm, one column a score with its interval.

    Letters and judged scores have a column if any arm has them, with "–" where one has not.
    """
    rows = []
    shown = SHOWN | {metric: title for metric, title in SHOWN_FURTHER.items() if (main.metric == metric).any()}
    for (concept, method, ember), arm in main.groupby(ARM_COLUMNS, sort=False):
        texts = dict(zip(arm.metric, interval_texts(arm, form=".2f"), strict=True))
        about = {"concept": concept, "method": Arm(method, ember).name}
        about |= {"chosen on train": arm.cell.iloc[0], "runs": arm.runs.iloc[0]}
        rows.append(about | {title: texts.get(metric, MISSING) for metric, title in shown.items()})
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

    The frames are ``control_table``'s, ``trade_curves.strength_table``'s, ``trade_curves.area_table``'s,
    ``relearn_tables.left_beside_ember``'s and ``trade_curves.equal_gain_table``'s; any may be empty.

    Columns: question, beside (the control), measure, runs, difference from EMBER and its 95 % interval over items,
    seeds and concepts, better (EMBER, the control, or "not shown").
    """
    answers = []

    def answer(question: str, beside: str, measure: str, row: Any, sign: int, *names: str) -> None:
        value, low, high = (getattr(row, name) for name in names or ("value", "ci_low", "ci_high"))
        better = {True: beside, False: "EMBER"}[sign * value > 0] if low * high > 0 else "not shown"
        answers.append((concept, question, beside, measure, row.runs, value, low, high, better))

    for row in scores.itertuples():
        if row.metric in SHOWN:
            answer("scores before relearning", Arm(row.method).name, SHOWN[row.metric], row, 1)
    for row in left.itertuples():
        if row.metric == "gold_prob" and row.attack == "all":
            measure = f"probability of the right answer ({row.precision}, lr {float(row.lr):g})"
            answer("left after relearning", Arm(row.method).name, measure, row, -1)
    difference = ("difference", "difference_low", "difference_high")
    same = strengths[strengths.delta == 1] if len(strengths) else strengths
    for question, table, sign, measure in (
        ("taken at delta=1", same, 1, "probability of the right answer"),
        ("area under the trade", areas, 1, "probability taken, against {cost} cost"),
        ("cost at equal erasure", spared, -1, "{cost} cost"),
    ):
        for row in table.itertuples():
            if row.edit != "EMBER":
                answer(question, row.edit, measure.format(**row._asdict()), row, sign, *difference)
    columns = ["concept", "question", "beside", "measure", "runs", "difference", "ci_low", "ci_high", "better"]
    return pd.DataFrame(answers, columns=columns)


def headline(base: pd.DataFrame, edited: pd.DataFrame) -> pd.DataFrame:
    """A few lines for a busy reader on EMBER alone: base model, edited model, change with its 95 % interval.

    One line for each concept and measure, the first seed only.
    """
    lines = []
    alone = edited[(edited.method == "ember") & ~edited.ember]
    for concept, arm in alone.groupby("concept", sort=False):
        after = arm[arm.seed == arm.seed.min()].set_index(["set", "metric"])
        before = base[base.concept == concept].set_index(["set", "metric"]).value
        for (name, metric), label in PLAIN.items():
            if name not in after.index:
                continue  # released concepts have no texts in another sense
            change = after.loc[(name, f"delta_{metric}")]
            values = (f"{before[name, metric]:.3f}", f"{after.value[name, metric]:.3f}")
            text = interval_text(change.value, change.ci_low, change.ci_high, "+.3f")
            lines.append((concept, after.cell.iloc[0], label, *values, text))
    columns = ["concept", "cell", "measure (test split)", "base model", "edited", "change [95 % interval]"]
    return pd.DataFrame(lines, columns=columns)
