"""Records of erasing → its tables."""

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import pandas as pd

from ember.data.arms import Arm
from ember.evaluation.metrics import Comparison, compare
from ember.evaluation.resampling import pooled
from ember.reporting.format import MISSING, interval_texts

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
_Runs = dict[tuple[str, int], dict[str, np.ndarray]]  # of one arm, by concept and seed: each score, then its draws
# By table: the question it answers, with which rows, in which measure, and whether more (1) or less (-1) than EMBER's
# is better.
_QUESTIONS = {
    "controls": ("scores before relearning", "metric in @SHOWN", "{shown}", 1),
    "controls_relearned": (
        "left after relearning", "metric == 'gold_prob' and attack == 'all'",
        "probability of the right answer ({precision}, lr {lr:g})", -1,
    ),
    "strengths": ("taken at delta=1", "edit != 'EMBER' and delta == 1", "probability of the right answer", 1),
    "trade": ("area under the trade", "edit != 'EMBER'", "probability taken, against {cost} cost", 1),
    "spared_tokens": ("cost at equal erasure", "edit != 'EMBER'", "{cost} cost", -1),
}  # fmt: skip


def each_concept(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each concept and, if there are several, all of them as those of ``ALL``."""
    parts = [(str(concept), part) for concept, part in frame.groupby("concept", sort=False)]
    yield from [*parts, (ALL, frame)] if len(parts) > 1 else parts


def ember_first(items: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the tables: the unedited model, EMBER, methods alone and after EMBER, controls."""
    place = {"none": 0, "ember": 1} | dict.fromkeys(items.method[items.ember], 2)
    order = items.assign(place=[place.get(method, 3) for method in items.method])
    return order.sort_values(["concept", "place", "method", "ember", "seed"]).drop(columns="place")


def comparisons(items: pd.DataFrame) -> Comparisons:
    """The comparison with the base model of every run, from its item scores (columns base and edited).

    All draw the same items, so that two arms of a concept can be subtracted draw by draw.
    """
    compared = {}
    for (concept, method, ember, seed), run in ember_first(items).groupby(RUN_COLUMNS, sort=False):
        base, edited = (run[["set", "item", "metric"]].assign(value=run[side]) for side in ("base", "edited"))
        compared[str(concept), str(method), bool(ember), int(seed)] = compare(base, edited)
    return compared


def main_table(compared: Comparisons, cells: pd.DataFrame) -> pd.DataFrame:
    """One row for each arm and score: mean and interval over items and runs (seeds), and the cells chosen.

    Where there are several concepts, further rows pool all of them.
    """
    rows = []
    for (concept, arm), runs in _arms(compared).items():
        mine = cells[cells.chosen & (cells[ARM_COLUMNS] == [concept, *arm]).all(axis=1)]
        chosen = "; ".join(mine.sort_values("seed").cell.unique())
        rows += [(concept, *arm, len(runs), chosen, *score) for score in _pooled(runs)]
    return pd.DataFrame(rows, columns=[*ARM_COLUMNS, "runs", "cell", "metric", "value", "ci_low", "ci_high"])


def effect_table(compared: Comparisons) -> pd.DataFrame:
    """What EMBER adds to each other method: paired differences of every score, pooled as in ``main_table``."""
    return _differences(compared, lambda arm: Arm(arm.method) if arm.ember else None)


def control_table(compared: Comparisons, controls: Collection[str]) -> pd.DataFrame:
    """By how much each control edit of EMBER's rows scores above EMBER: paired differences as in ``effect_table``."""
    return _differences(compared, lambda arm: Arm("ember") if arm.method in controls else None)


def _differences(compared: Comparisons, beside: Callable[[Arm], Arm | None]) -> pd.DataFrame:
    """Every score of each arm less that of the arm ``beside`` it, if there is one, over their common runs."""
    arms, rows = _arms(compared), []
    for (concept, arm), runs in arms.items():
        against = beside(arm)
        other = arms.get((concept, against), {}) if against else {}
        both = {run: (scores, other[run]) for run, scores in runs.items() if run in other}
        less = {run: {name: a[name] - b[name] for name in a if name in b} for run, (a, b) in both.items()}
        rows += [(concept, arm.method, len(less), *score) for score in _pooled(less)]
    return pd.DataFrame(rows, columns=["concept", "method", "runs", "metric", "value", "ci_low", "ci_high"])


def _arms(compared: Comparisons) -> dict[tuple[str, Arm], _Runs]:
    """The runs of each arm of each concept and, if there are several concepts, of each arm on all of them."""
    arms: dict[tuple[str, Arm], _Runs] = {}
    for own in (True, False) if len({concept for concept, *_ in compared}) > 1 else (True,):
        for (concept, method, ember, seed), run in compared.items():
            scores = {m: np.append(run.value(m), run.draws[m]) for m in SCORES + FURTHER if m in run.draws}
            arms.setdefault((concept if own else ALL, Arm(method, ember)), {})[concept, seed] = scores
    return arms


def _pooled(runs: _Runs) -> list[tuple[str, float, float, float]]:
    """The scores that all of the runs have, each with its mean and interval."""
    shared = [name for name in SCORES + FURTHER if runs and all(name in scores for scores in runs.values())]
    concepts = [concept for concept, _ in runs]
    return [(name, *pooled([(s[name][0], s[name][1:]) for s in runs.values()], groups=concepts)) for name in shared]


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
    """The main table as a reader wants it: one row an arm, one column a score that any arm has, with its interval."""
    rows = []
    shown = SHOWN | {metric: title for metric, title in SHOWN_FURTHER.items() if (main.metric == metric).any()}
    for (concept, method, ember), arm in main.groupby(ARM_COLUMNS, sort=False):
        texts = dict(zip(arm.metric, interval_texts(arm, form=".2f"), strict=True))
        about = (concept, Arm(method, ember).name, arm.cell.iloc[0], arm.runs.iloc[0])
        rows.append((*about, *(texts.get(metric, MISSING) for metric in shown)))
    return pd.DataFrame(rows, columns=["concept", "method", "chosen on train", "runs", *shown.values()])


def verdicts(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Does EMBER beat its controls, and what does the frequency rule save: one row an answer.

    ``tables`` are the report's by name, those of ``_QUESTIONS`` that there are and main; the answers are over all of
    its concepts. Columns: concept, question, beside (the control), measure, runs, difference from EMBER and its 95 %
    interval over items, seeds and concepts, better (EMBER, the control, or "not shown").
    """
    concept = tables["main"].concept.iloc[-1]  # all concepts, where there are several
    answers = []
    for name, (question, asked, measure, sign) in _QUESTIONS.items():
        if name not in tables:
            continue
        rows = tables[name][tables[name].concept == concept].query(asked)
        if "edit" not in rows:
            ends = {"difference": rows.value, "difference_low": rows.ci_low, "difference_high": rows.ci_high}
            rows = rows.assign(edit=[Arm(m).name for m in rows.method], shown=rows.metric.map(SHOWN), **ends)
        for row in rows.itertuples():
            better = row.edit if sign * row.difference > 0 else "EMBER"
            sure = row.difference_low * row.difference_high > 0
            values = (row.runs, row.difference, row.difference_low, row.difference_high)
            about = (concept, question, row.edit, measure.format(**row._asdict()))
            answers.append((*about, *values, better if sure else "not shown"))
    columns = ["concept", "question", "beside", "measure", "runs", "difference", "ci_low", "ci_high", "better"]
    return pd.DataFrame(answers, columns=columns)


def headline(base: pd.DataFrame, edited: pd.DataFrame) -> pd.DataFrame:
    """EMBER alone, for a busy reader: base model, edited model and change with its 95 % interval, of the first seed."""
    lines = []
    alone = edited[(edited.method == "ember") & ~edited.ember]
    for concept, arm in alone.groupby("concept", sort=False):
        after = arm[arm.seed == arm.seed.min()].set_index(["set", "metric"])
        before = base[base.concept == concept].set_index(["set", "metric"]).value
        for (name, metric), label in PLAIN.items():
            if name in after.index:  # released concepts have no texts in another sense
                (text,) = interval_texts(after.loc[[(name, f"delta_{metric}")]], form="+.3f")
                values = (f"{before[name, metric]:.3f}", f"{after.value[name, metric]:.3f}")
                lines.append((concept, after.cell.iloc[0], label, *values, text))
    columns = ["concept", "cell", "measure (test split)", "base model", "edited", "change [95 % interval]"]
    return pd.DataFrame(lines, columns=columns)
