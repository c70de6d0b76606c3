"""Where an edit changes predictions: token by token, by how many edited tokens came before and how far back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from ember.editing import Edit
from ember.evaluation.resampling import draws, interval, wilson
from ember.models.loading import LoadedModel
from ember.models.scoring import sequence_scores
from ember.tokens import background_frequency

EXPOSURES = ("none", "1", "2-3", "4-7", "8 or more")
EXPOSED = ("before any edited token", "after one")
DISTANCES = ("none before", "1", "2-4", "5-16", "17 or more")


def token_changes(
    loaded: LoadedModel, edit: Edit, texts: Mapping[str, Sequence[str]], marked: Collection[int]
) -> pd.DataFrame:
    """What the edit does to the prediction of every token but the first of each text.

    ``texts`` maps sets to texts, ``marked`` are the token ids to watch for: those an EMBER edit changes. Columns: set,
    text (numbered in its set) and position, where the token stands; token; marked, whether it is one itself; before,
    how many tokens before it are, and since, how far back the last of them is (1: the token just before; NaN: none);
    loss (with the edit), change (the rise in loss) and kl (KL(p_base ‖ p_edited)), in nats.
    """
    frames = []
    for name, chosen in texts.items():
        sequences = [loaded.encode(text) for text in chosen]
        scores = sequence_scores(loaded, sequences, [1] * len(sequences), partial(edit.applied, loaded))
        for number, (ids, score) in enumerate(zip(sequences, scores, strict=True)):
            hits = np.array([i in marked for i in ids])
            last = np.maximum.accumulate(np.where(hits, np.arange(len(ids)), -1))[:-1]
            since = np.where(last < 0, np.nan, np.arange(1, len(ids)) - last)
            columns = {
                "set": name, "text": number, "position": range(1, len(ids)),
                "token": [loaded.decode([i]) for i in ids[1:]], "marked": hits[1:],
                "before": hits.cumsum()[:-1], "since": since,
                "loss": score.loss, "change": score.loss - score.base_loss, "kl": score.kl,
            }  # fmt: skip
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def by_exposure(changes: pd.DataFrame) -> pd.DataFrame:
    """``share_table`` by the number of marked tokens before (``EXPOSURES``)."""
    classes = np.digitize(changes.before, [1, 2, 4, 8])
    return share_table(changes.assign(group=np.array(EXPOSURES)[classes]), EXPOSURES)


def by_distance(changes: pd.DataFrame) -> pd.DataFrame:
    """``share_table`` by the distance to the last marked token (``DISTANCES``)."""
    classes = np.where(changes.since.isna(), 0, np.digitize(changes.since, [1, 2, 5, 17]))
    return share_table(changes.assign(group=np.array(DISTANCES)[classes]), DISTANCES)


def by_arm(tokens: pd.DataFrame) -> pd.DataFrame:
    """``share_table`` of every arm (concept, method, ember), its seeds together: before any marked token, and after.

    ``tokens`` are ``token_changes`` with columns concept, method, ember and seed.
    """
    groups = np.where(tokens.before > 0, EXPOSED[1], EXPOSED[0])
    return _each_arm(tokens.assign(group=groups), lambda part: share_table(part, EXPOSED))


def half_by_arm(tokens: pd.DataFrame) -> pd.DataFrame:
    """``concentration`` of every arm (concept, method, ember), its seeds together; ``tokens`` as in ``by_arm``."""
    return _each_arm(tokens, concentration)


def _each_arm(tokens: pd.DataFrame, table: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """A table of each arm, texts of different seeds kept apart."""
    keys = ["concept", "method", "ember"]
    tokens = tokens.assign(text=tokens.seed.astype(str) + " " + tokens.text.astype(str))
    tables = {arm: table(part) for arm, part in tokens.groupby(keys, sort=False)}
    return pd.concat(tables, names=[*keys, None]).reset_index(keys).reset_index(drop=True)


def share_table(changes: pd.DataFrame, groups: Sequence[str]) -> pd.DataFrame:
    """Of each set and value of column ``group``: how many tokens, how much they change, and their share of all KL.

    Columns: set, group, tokens, share_of_tokens, change (mean rise in loss, nats), kl (mean, nats), share_of_kl, the
    last three with 95 % intervals ``…_low`` and ``…_high`` from resampled texts, NaN where a single text bears it all.
    Groups without a token are left out.
    """
    rows = []
    for name, part in changes.groupby("set", sort=False):
        texts = part.groupby(["text", "group"])
        counts, sums = texts.size().unstack(fill_value=0), texts[["change", "kl"]].sum().unstack(fill_value=0.0)
        total, drawn = sums["kl"].to_numpy().sum(1), draws(len(counts))
        for group in (g for g in groups if g in counts):
            tokens, change, kl = (table[group].to_numpy() for table in (counts, sums["change"], sums["kl"]))
            ratios = [_ratio(change, tokens, drawn), _ratio(kl, tokens, drawn), _ratio(kl, total, drawn)]
            rows.append((name, group, int(tokens.sum()), tokens.sum() / len(part), *np.ravel(ratios)))
    measures = [f"{name}{end}" for name in ("change", "kl", "share_of_kl") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["set", "group", "tokens", "share_of_tokens", *measures])


def concentration(changes: pd.DataFrame) -> pd.DataFrame:
    """The smallest share of each set's tokens that holds half of its KL, with a 95 % interval over texts.

    0.5 where the change is the same at every token; near 0 where few tokens bear it all. NaN where nothing changes.
    Columns: set, tokens, value, ci_low, ci_high.
    """
    rows = []
    for name, part in changes.groupby("set", sort=False):
        texts = [text.kl.to_numpy() for _, text in part.groupby("text")]
        drawn = [np.concatenate([texts[k] for k in chosen]) for chosen in draws(len(texts), n_resamples=500)]
        value, *values = map(_half, [part.kl.to_numpy(), *drawn])
        rows.append((name, len(part), value, *interval(np.array(values))))
    return pd.DataFrame(rows, columns=["set", "tokens", "value", "ci_low", "ci_high"])


def _half(kl: np.ndarray) -> float:
    sums = np.sort(kl.clip(min=0))[::-1].cumsum()
    return float((np.searchsorted(sums, 0.5 * sums[-1]) + 1) / len(kl)) if sums[-1] > 0 else np.nan


def _ratio(above: np.ndarray, below: np.ndarray, drawn: np.ndarray) -> tuple[float, float, float]:
    """Ratio of two sums over texts with its interval; NaN where there is nothing to divide by, or one text alone."""
    if not below.sum() > 0:
        return (np.nan,) * 3
    divided = below[drawn].sum(1)
    ratios = above[drawn].sum(1) / np.where(divided > 0, divided, np.nan)
    low, high = interval(ratios) if (below > 0).sum() > 1 else (np.nan, np.nan)
    return float(above.sum() / below.sum()), float(low), float(high)


def most_damaged(changes: pd.DataFrame, *, top: int = 20, width: int = 6) -> pd.DataFrame:
    """The tokens whose loss rises most: set, context (the ``width`` tokens before), token, before, since, change."""
    rows = []
    for row in changes.nlargest(top, "change").itertuples():
        near = changes[(changes.set == row.set) & (changes.text == row.text)]
        near = near[near.position.between(row.position - width, row.position - 1)]
        rows.append((row.set, "".join(near.token), row.token, row.before, row.since, row.change))
    return pd.DataFrame(rows, columns=["set", "context", "token", "before", "since", "change"])


def everyday_exposure(loaded: LoadedModel, marked: Collection[int], texts: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """How much everyday text an edit of the rows ``marked`` touches.

    One row for each set of ``texts``: how many, the ``share`` with a marked token with Wilson's interval, and marked
    tokens ``per_thousand`` tokens; NaN for a set without texts. One row, ``general English``, holds
    ``expected_per_thousand``.
    """
    rows: list[tuple[object, ...]] = []
    for name, chosen in texts.items():
        hits = [[i in marked for i in loaded.encode(text, bos=False)] for text in chosen]
        touched, tokens = sum(map(any, hits)), sum(map(len, hits))
        share = touched / len(hits) if hits else np.nan
        per_thousand = 1000 * sum(map(sum, hits)) / tokens if tokens else np.nan
        rows.append((name, len(hits), share, *wilson(touched, len(hits)), per_thousand))
    rows.append(("general English", 0, *(np.nan,) * 3, expected_per_thousand(loaded, marked)))
    return pd.DataFrame(rows, columns=["set", "n", "share", "ci_low", "ci_high", "per_thousand"])


def expected_per_thousand(loaded: LoadedModel, marked: Collection[int]) -> float:
    """How many of a thousand words of general English bring a marked token, by word frequencies.

    Each form of a word counts with all of the word's frequency (``background_frequency``): an upper bound.
    """
    frequency = background_frequency(loaded)
    return 1000 * sum(frequency.get(i, 0.0) for i in marked)
