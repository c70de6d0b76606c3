"""How much of what an edit erased has come back, as a ratio with an interval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ember.evaluation.metrics import accuracy_table
from ember.evaluation.resampling import interval, pooled_mean_draws

KEYS = ["set", "item", "metric"]


class Share(NamedTuple):
    """What has come ``back``, after − erased, as a share of the ``gap`` base − erased, all with intervals.

    The share is NaN where the gap's interval reaches 0: nothing sure was erased, as ``note``, else empty, says.
    """

    share: float
    ci_low: float
    ci_high: float
    back: float
    back_low: float
    back_high: float
    gap: float
    gap_low: float
    gap_high: float
    n: int
    note: str


SHARE = list(Share._fields)
Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def share_regained(parts: Sequence[Part], *, n_resamples: int = 2000, seed: int = 0) -> Share:
    """Share of the erased score that has come back, pooled over parts (seeds, concepts).

    Each part holds one score a question: base, erased and after [n]. Numerator and denominator are means over parts of
    means over questions; a bootstrap draw resamples parts and, in each, questions, and the interval is the middle 95 %
    of the draws' ratios. A part that is empty, holds NaN, or whose scores are not equally many is a ``ValueError``.
    """
    changes = []
    for base, erased, after in parts:
        if not len(base) or not len(base) == len(erased) == len(after):
            raise ValueError("base, erased and after must hold the same questions, at least one")
        if not np.isfinite([base, erased, after]).all():
            raise ValueError("a score is missing")
        changes.append(np.stack([after - erased, base - erased]))
    draws = pooled_mean_draws(changes, n_resamples=n_resamples, seed=seed)
    back, gap = np.mean([change.mean(1) for change in changes], axis=0)
    (back_low, gap_low), (back_high, gap_high) = interval(draws)
    share, low, high = np.full(3, np.nan)
    note = f"gap {gap:.3f} [{gap_low:.3f}, {gap_high:.3f}] too small to divide by"
    if gap_low > 0:
        share, note = back / gap, ""
        low, high = interval(draws[0] / np.where(draws[1] > 0, draws[1], np.nan))
    values = (share, low, high, back, back_low, back_high, gap, gap_low, gap_high)
    return Share._make((*map(float, values), sum(change.shape[1] for change in changes), note))


def regained_items(base: pd.DataFrame, relearned: pd.DataFrame) -> pd.DataFrame:
    """Item scores of a relearning run beside those before it: point, tokens, set, item, metric, base, erased, after.

    ``base`` holds the unedited model's scores (set, item, metric, value), ``relearned`` the run's (tokens as well; 0
    is the edited model before training) and no item that ``base`` lacks. Points are numbered from 0.
    """
    erased = relearned[relearned.tokens == 0].drop(columns="tokens").rename(columns={"value": "erased"})
    after = relearned.rename(columns={"value": "after"})
    items = after.merge(erased, on=KEYS).merge(base[[*KEYS, "value"]].rename(columns={"value": "base"}), on=KEYS)
    if len(items) != len(after):
        raise ValueError("the unedited model was not asked all questions of the run")
    items["point"] = items.tokens.rank(method="dense").astype(int) - 1
    return items[["point", "tokens", *KEYS, "base", "erased", "after"]]


def regained_table(items: pd.DataFrame, by: Sequence[str] = (), *, metric: str = "gold_prob") -> pd.DataFrame:
    """Share regained at every point, on all questions and on those that the texts state and do not state.

    ``items`` is that of ``regained_items`` with columns stated, run and ``by``; runs with the same ``by`` are pooled.
    Columns: those of ``by``, point, tokens (mean over runs), questions, metric, base and after (means), and ``SHARE``.
    """
    rows = []
    for questions, group in _groups(items[items.metric == metric]).items():
        for key, part in group.groupby([*by, "point"], sort=False):
            runs = [run[["base", "erased", "after"]] for _, run in part.groupby("run", sort=False)]
            share = share_regained([tuple(run.to_numpy(float).T) for run in runs])
            means = (part.tokens.mean(), questions, metric, part.base.mean(), part.after.mean())
            rows.append((*key, *means, *share))
    return pd.DataFrame(rows, columns=[*by, "point", "tokens", "questions", "metric", "base", "after", *SHARE])


def _groups(items: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {"all": items, "stated": items[items.stated], "not stated": items[~items.stated]}


def net_of_reference(items: pd.DataFrame, pairing: Sequence[str]) -> pd.DataFrame:
    """The items with ``after`` lowered by what the same training does to the unedited model, question by question.

    Fine-tuning moves the scores of a model that has lost nothing, too. Runs of the unedited model have method
    ``none``; ``pairing`` names the columns in which an edited run and its reference agree (concept, attack, …); of
    several references (seeds, which order the texts) the mean is taken. Runs without a reference are left out.
    """
    keys = [*pairing, "point", *KEYS]
    unedited = items[items.method == "none"]
    reference = unedited.assign(drift=unedited.after - unedited.base).groupby(keys, as_index=False).drift.mean()
    net = items[items.method != "none"].merge(reference, on=keys)
    return net.assign(after=net.after - net.drift)


def regained_summary(items: pd.DataFrame) -> pd.DataFrame:
    """The scores of one run for the record: tokens, set, metric, value, ci_low, ci_high, effect_size, n.

    By set (``concept``, ``concept stated``, ``concept not stated``): ``accuracy``; of ``gold_prob`` and
    ``gold_logprob`` the change ``delta_…`` from before training and the share ``regained_…``, NaN where there is none.
    """
    rows = []
    for questions, part in _groups(items).items():
        for tokens, point in part.groupby("tokens"):
            for row in accuracy_table(point.assign(value=point.after)).itertuples():
                rows.append((tokens, questions, "accuracy", row.accuracy, row.ci_low, row.ci_high, row.n))
    for metric in ("gold_prob", "gold_logprob"):
        for row in regained_table(items, metric=metric).itertuples():
            where = (round(row.tokens), row.questions)
            rows.append((*where, f"delta_{metric}", row.back, row.back_low, row.back_high, row.n))
            rows.append((*where, f"regained_{metric}", row.share, row.ci_low, row.ci_high, row.n))
    table = pd.DataFrame(rows, columns=["tokens", "set", "metric", "value", "ci_low", "ci_high", "n"])
    return table.assign(set=("concept " + table["set"]).str.removesuffix(" all"), effect_size=np.nan)
