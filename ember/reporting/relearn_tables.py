"""Records of relearning → its tables."""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from ember.data.arms import UNEDITED
from ember.evaluation.resampling import draws, pooled
from ember.relearning.attacks import PRECISIONS
from ember.relearning.regained import net_of_reference, regained_table
from ember.reporting.format import MISSING, arm_names, interval_texts
from ember.reporting.tables import ALL, each_concept, ember_first

RECIPE = ["precision", "lr", "budget"]
ATTACKED = ["method", "ember", "attack", *RECIPE]
_BACK = ["back", "back_low", "back_high"]
# A measure's ends are called NAME_low and NAME_high, but for these columns of ``precision_table``.
LIKELIHOOD_ENDS = {f"back_{end}_logprob": f"back_logprob_{end}" for end in ("low", "high")}


def relearning_table(items: pd.DataFrame) -> pd.DataFrame:
    """Every attack on every arm, per concept and over all of them: what came back at each point, and the accuracy.

    ``items`` are the item scores of all relearning runs (column run tells them apart). Columns: concept, those of
    ``ATTACKED``, seeds, runs, diverged (any run), accuracy (after; mean over runs), and those of ``regained_table``,
    for ``gold_prob`` and ``gold_logprob``; ``net_…`` are the same, net of what the attack does to the unedited model.
    """
    tables = []
    keys = [*ATTACKED, "point", "questions"]
    renamed = {name: f"net_{name}" for name in (*_BACK, "share")}
    renamed |= {"ci_low": "net_share_low", "ci_high": "net_share_high"}
    for concept, part in each_concept(ember_first(items)):
        right = part[part.metric == "correct"]
        groups = {"all": right, "stated": right[right.stated], "not stated": right[~right.stated]}
        accuracy = pd.concat(groups, names=["questions"]).groupby(keys).after.mean().rename("accuracy").reset_index()
        seeds = part.groupby(ATTACKED, as_index=False).agg(
            seeds=("seed", "nunique"), runs=("run", "nunique"), diverged=("diverged", "any")
        )
        net = net_of_reference(part, ["concept", "attack", *RECIPE])
        for metric in ("gold_prob", "gold_logprob"):
            table = regained_table(part, ATTACKED, metric=metric).merge(accuracy, on=keys).merge(seeds, on=ATTACKED)
            if len(net):
                beside = regained_table(net, ATTACKED, metric=metric).rename(columns=renamed)
                table = table.merge(beside[[*keys, *renamed.values()]], on=keys, how="left")
            tables.append(table.assign(concept=concept))
    whole = pd.concat(tables, ignore_index=True)
    # Rounding its weights may move the unedited model's scores: a gap, but none to divide by.
    unedited = whole.method == UNEDITED
    whole.loc[unedited, ["share", "ci_low", "ci_high"]] = np.nan
    whole.loc[unedited, "note"] = "nothing was erased: no gap to divide by"
    front = ["concept", *ATTACKED, "seeds", "runs", "diverged"]
    return whole[front + [column for column in whole if column not in front]]


def final_points(table: pd.DataFrame, *, metric: str = "gold_prob") -> pd.DataFrame:
    """The last point of every attack on every arm, on all questions, with the arm's name in column arm."""
    rows = table[(table.metric == metric) & (table.questions == "all")]
    last = rows.loc[sorted(rows.groupby(["concept", *ATTACKED]).point.idxmax())]
    return last.assign(arm=arm_names(last))


def relearning_overview(table: pd.DataFrame) -> pd.DataFrame:
    """The last points as a reader wants them: one row an attack and arm, with intervals."""
    last, likelihood = final_points(table), final_points(table, metric="gold_logprob")
    net = [  # missing where the unedited model was not attacked
        interval_texts(rows, "net_share", ".0%") if "net_share" in rows else MISSING for rows in (last, likelihood)
    ]
    # What a run that diverged has shown ends early.
    tokens = last.tokens.round().astype(int).astype(str) + np.where(last.diverged, " (diverged)", "")
    return pd.DataFrame(
        {
            "concept": last.concept, "arm": last.arm, "attack": last.attack, "precision": last.precision,
            "lr": last.lr, "runs": last.runs, "tokens": tokens, "accuracy after": last.accuracy.round(3),
            "erased (probability)": interval_texts(last, "gap", "+.3f"),
            "came back": interval_texts(last, "back", "+.3f"),
            "share": interval_texts(last, "share", ".0%"), "net share": net[0], "net share (log-likelihood)": net[1],
        }
    ).reset_index(drop=True)  # fmt: skip


def recipe(table: pd.DataFrame, *, most: str) -> pd.DataFrame:
    """The rows of the recipe that covers most values of column ``most``; of several, fp32, then the lowest rate."""
    counts = table.groupby(RECIPE, as_index=False)[most].nunique()
    counts["rounded"] = counts.precision != "fp32"
    best = counts.sort_values([most, "rounded", "lr", "budget"], ascending=[False, True, True, True]).iloc[0]
    return table[(table[RECIPE] == best[RECIPE]).all(axis=1)]


def left_beside_ember(items: pd.DataFrame, controls: Collection[str]) -> pd.DataFrame:
    """By how much less is known after an attack on each control edit of EMBER's rows than after one on EMBER.

    Paired question by question, at the last point, in probability and log-likelihood (nats per character) of the right
    answer; negative: the control leaves less. Columns: concept, method, attack, ``RECIPE``, metric, runs, value,
    ci_low, ci_high (95 % interval over questions, seeds and concepts).
    """
    own = items[(items.method == "ember") & ~items.ember].drop(columns="method")
    return _known_beside(items[items.method.isin(controls)], own, [])


def left_with_ember(items: pd.DataFrame) -> pd.DataFrame:
    """As ``left_beside_ember``, for each method after EMBER beside alone; negative: with EMBER less is left."""
    alone = items[~items.ember & ~items.method.isin([UNEDITED, "ember"])]
    return _known_beside(items[items.ember], alone, ["method"])


def _known_beside(first: pd.DataFrame, second: pd.DataFrame, also: Sequence[str]) -> pd.DataFrame:
    """What is known at the last point, first less second; paired by concept, seed, attack, question and ``also``."""
    attack = ["attack", *RECIPE, "metric"]
    keys = ["concept", "seed", *attack, "item", *also]
    first, second = (part[part.point == part.groupby("run").point.transform("max")] for part in (first, second))
    both = first.merge(second[[*keys, "after"]], on=keys, suffixes=("", "_beside"))
    both = both.assign(gap=both.after - both.after_beside)
    rows = []
    for concept, part in each_concept(both):
        for key, group in part.groupby(["method", *attack], sort=False):
            runs = {run: part.gap for run, part in group.groupby(["concept", "seed"], sort=False)}
            means = [(gap.mean(), gap.to_numpy()[draws(len(gap))].mean(1)) for gap in runs.values()]
            rows.append((concept, *key, len(runs), *pooled(means, groups=[name for name, _ in runs])))
    return pd.DataFrame(rows, columns=["concept", "method", *attack, "runs", "value", "ci_low", "ci_high"])


def precision_table(items: pd.DataFrame, moved: pd.DataFrame) -> pd.DataFrame:
    """What the precision of the attack on all parameters does: one row a concept, lr, budget, arm and precision.

    Of each arm, lr and budget only the runs (concept and seed) that were made in every precision with which it was
    tried, so that they can be compared; nothing where that was float32 alone. Columns: concept, arm, ``RECIPE``, runs,
    tokens, changed (share of trained values that moved at all), travelled (share of the edited rows' displacement
    undone) and, in probability and log-likelihood (nats per character) of the right answer, what came back with its
    95 % interval.
    """
    keys = ["concept", "arm", *RECIPE]
    columns = [*keys, "runs", "tokens", "changed", "travelled", *_BACK, *(f"{name}_logprob" for name in _BACK)]
    items, moved = (_in_every_precision(frame[frame.attack == "all"]) for frame in (items, moved))
    if not len(items):
        return pd.DataFrame(columns=columns)
    table = relearning_table(items)
    likelihood = final_points(table, metric="gold_logprob")[[*keys, *_BACK]]
    movements = pd.concat(mean_movement(moved, concept).assign(concept=concept) for concept in table.concept.unique())
    last = final_points(table).merge(likelihood, on=keys, suffixes=("", "_logprob")).merge(movements, on=keys)
    last["place"] = last.precision.map(list(PRECISIONS).index)
    return last.sort_values(["concept", "lr", "budget", "arm", "place"])[columns].reset_index(drop=True)


def _in_every_precision(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of runs made in every precision that their arm, lr and budget were tried in, if that was more than one."""
    arm = ["method", "ember", "lr", "budget"]
    tried = rows.groupby(arm).precision.transform("nunique")
    made = rows.groupby([*arm, "concept", "seed"]).precision.transform("nunique")
    return rows[(tried > 1) & (made == tried)]


def mean_movement(moved: pd.DataFrame, concept: str) -> pd.DataFrame:
    """Mean share of values changed and way back of edited rows, per arm and ``RECIPE`` of a concept or of ``ALL``."""
    mine = moved[(moved.attack == "all") & ((moved.concept == concept) | (concept == ALL))]
    everything = mine.part == "all that is trained"
    parts = {"changed": mine.changed.where(everything), "travelled": mine.travelled.where(~everything)}
    return mine.assign(arm=arm_names(mine), **parts).groupby(["arm", *RECIPE])[list(parts)].mean().reset_index()


def beside_the_paper(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Accuracy after the paper's attack (all parameters, the recipe of most arms), in the columns of its figures."""
    last = final_points(table)
    last = recipe(last[last.attack == "all"], most="arm")
    source = [f"here: {p.concept}, {p.tokens:.0f} tokens, lr {p.lr:g}, {p.precision}" for p in last.itertuples()]
    columns = {"figure": "accuracy on concept questions after relearning", "model": model, "arm": last.arm}
    return pd.DataFrame({**columns, "value": last.accuracy.round(3), "source": source})
