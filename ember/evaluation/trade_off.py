"""What an edit of embedding rows takes from the concept, against what it costs other text, over its strength."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from ember.data.types import Question
from ember.editing import Edit
from ember.errors import UnknownNameError
from ember.evaluation.evaluate import PROMPT, Suite, question_scores, text_scores
from ember.evaluation.localization import expected_per_thousand
from ember.evaluation.metrics import pooled
from ember.models.loading import LoadedModel

RARE = "EMBER, rare tokens"
# Name → method and settings beside its strength.
EDITS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "EMBER": ("ember", {}),
    RARE: ("ember", {"max_zipf": 4.0}),  # from zipf 4 on, words are ordinary (ember.tokens)
    "EMBER, output side": ("ember", {"side": "output"}),
    "EMBER, both sides": ("ember", {"side": "both"}),
    "random direction": ("random_direction", {}),
    "mean rows": ("mean_rows", {}),
    "matched rows": ("matched_rows", {}),
    "zero rows": ("zero_rows", {}),
    "LEACE": ("leace", {}),
    "random rows": ("random_rows", {}),
}
GAIN = ("concept", "gold_prob")
# What the edit should leave alone: the concept's words in another sense (KL, nats per token), questions on the
# neighbour (fall of the right answer's log-likelihood, nats per character), and everyday text (``_everyday``).
COSTS = ("other sense", "neighbour", "everyday")


def known_edits(names: Iterable[str]) -> dict[str, tuple[str, Mapping[str, object]]]:
    """The chosen entries of ``EDITS``.

    Raises
    ------
    UnknownNameError
        If there is no such edit.
    """
    chosen = {}
    for name in names:
        if name not in EDITS:
            raise UnknownNameError("edit", name, EDITS)
        chosen[name] = EDITS[name]
    return chosen


@dataclass(frozen=True)
class Probe:
    """The questions (by set) and texts (by set) on which edits are compared, with the unedited model's scores."""

    questions: Mapping[str, Sequence[Question]]
    texts: Mapping[str, Sequence[str]]
    base: pd.DataFrame


def make_probe(loaded: LoadedModel, suite: Suite, split: str = "test", *, progress: bool = False) -> Probe:
    """The suite's questions on concept and neighbour and its texts, scored by the unedited model.

    Sets without texts are left out: released concepts have none in another sense.
    """
    questions = {name: suite.questions[name][split] for name in ("concept", "simdom")}
    texts = {name: suite.texts[name][split] for name in ("other_sense", "neutral")}
    texts = {name: chosen for name, chosen in texts.items() if chosen}
    frames = [question_scores(loaded, chosen, progress=progress).assign(set=name) for name, chosen in questions.items()]
    frames += [text_scores(loaded, chosen, progress=progress).assign(set=name) for name, chosen in texts.items()]
    return Probe(questions, texts, pd.concat(frames, ignore_index=True))


def probe_edit(loaded: LoadedModel, probe: Probe, edit: Edit, *, progress: bool = False) -> pd.DataFrame:
    """Scores with the edit applied: set, item, metric, base, edited.

    An edit of input embeddings alone changes nothing, to the bit, where none of its tokens occurs: such items are
    not scored again. Of such an edit other-sense texts also have ``kl_sum`` (nats over the whole text) and
    ``occurrences`` (its tokens in the text), and ``general English`` how many of its tokens a thousand words bring
    (``per_thousand``, an upper bound: ember.evaluation.localization.expected_per_thousand).
    """
    inputs = set(edit.tensors) == {loaded.embedding_name}
    marked = edit.rows_of(loaded.embedding_name) if inputs else None
    frames = []
    for name, questions in probe.questions.items():
        touched = [q for q in questions if _touches(loaded, _asked(q), marked)]
        if touched:
            frames.append(question_scores(loaded, touched, edit, progress=progress).assign(set=name))
    for name, texts in probe.texts.items():
        places = [i for i, text in enumerate(texts) if _touches(loaded, [text], marked)]
        if places:
            scores = text_scores(loaded, [texts[i] for i in places], edit, progress=progress)
            scores["item"] = scores.item.astype(int).map(lambda k, places=places: str(places[k]))
            frames.append(scores.assign(set=name))
    keys = ["set", "item", "metric"]
    again = pd.concat(frames, ignore_index=True) if frames else probe.base.head(0)
    items = probe.base.rename(columns={"value": "base"}).merge(
        again.rename(columns={"value": "edited"}), on=keys, how="left"
    )
    items = items.assign(edited=items.edited.where(items.edited.notna(), items.base))[[*keys, "base", "edited"]]
    return (
        items if marked is None else pd.concat([items, _occurrences(loaded, probe, items, marked)], ignore_index=True)
    )


def _occurrences(loaded: LoadedModel, probe: Probe, items: pd.DataFrame, marked: Collection[int]) -> pd.DataFrame:
    kl = items[(items.set == "other_sense") & (items.metric == "kl")].set_index("item").edited
    rows = []
    for i, text in enumerate(probe.texts.get("other_sense", ())):
        ids = loaded.encode(text)[:-1]  # nothing is predicted after the last token
        rows.append(("other_sense", str(i), "kl_sum", 0.0, kl[str(i)] * len(ids)))
        rows.append(("other_sense", str(i), "occurrences", 0.0, float(sum(token in marked for token in ids))))
    rows.append(("general English", "", "per_thousand", 0.0, expected_per_thousand(loaded, marked)))
    return pd.DataFrame(rows, columns=["set", "item", "metric", "base", "edited"])


def _asked(question: Question) -> list[str]:
    return [f"{PROMPT.format(question=question.question)} {option}" for option in question.options]


def _touches(loaded: LoadedModel, texts: Sequence[str], marked: Collection[int] | None) -> bool:
    """Whether a token of the texts is marked; always, if all are (None)."""
    return marked is None or any(i in marked for text in texts for i in loaded.encode(text))


# Curves. x and y have one value for each strength, in rising order, along the last axis but one; draws run along the
# last.


def area(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """Mean over costs in [0, limit] of the best gain to be had at no more than that cost.

    ``x`` (cost) and ``y`` (gain) [strengths, …] are points of a path that starts at no edit, (0, 0), and is straight
    between strengths; a negative cost counts as none. Returns […].
    """
    steps = np.linspace(0, limit, 101)
    zero = np.zeros((1, *x.shape[1:]))
    x, y = np.concatenate([zero, x.clip(min=0)]), np.concatenate([zero, y])
    best = np.zeros((len(steps), *x.shape[1:]))
    for k in range(1, len(x)):
        reached = _best_on_segment(x[k - 1], x[k], y[k - 1], y[k], steps.reshape(-1, *[1] * (x.ndim - 1)))
        best = np.maximum(best, reached)
    mean: np.ndarray = best.mean(0)
    return mean


def _best_on_segment(x0: np.ndarray, x1: np.ndarray, y0: np.ndarray, y1: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Largest gain on a straight piece of the path at a cost of at most ``cost``; −∞ where it costs more throughout."""
    low, high = np.minimum(x0, x1), np.maximum(x0, x1)
    at_low, at_high = np.where(x0 <= x1, y0, y1), np.where(x0 <= x1, y1, y0)
    width = np.where(high > low, high - low, 1.0)
    along = np.clip((cost - low) / width, 0, 1)
    along = np.where(high > low, along, 1.0)
    reached = np.maximum(at_low, at_low + along * (at_high - at_low))
    reached = np.where(high > low, reached, np.maximum(y0, y1))
    return np.where(cost >= low, reached, -np.inf)


def cost_at(x: np.ndarray, y: np.ndarray, gain: float) -> np.ndarray:
    """Least cost at which the path of ``area`` reaches a gain; NaN where it never does. Shapes as there."""
    zero = np.zeros((1, *x.shape[1:]))
    x, y = np.concatenate([zero, x.clip(min=0)]), np.concatenate([zero, y])
    least = np.full(x.shape[1:], np.nan)
    for k in range(1, len(x)):
        rise = np.where(y[k] != y[k - 1], y[k] - y[k - 1], 1.0)
        crossing = np.clip((gain - y[k - 1]) / rise, 0, 1)
        at = x[k - 1] + crossing * (x[k] - x[k - 1])
        inside = (np.minimum(y[k], y[k - 1]) <= gain) & (gain <= np.maximum(y[k], y[k - 1]))
        least = np.fmin(least, np.where(inside, at, np.nan))
        least = np.fmin(least, np.where(y[k] >= gain, x[k], np.nan))
    return least


@dataclass(frozen=True)
class Curves:
    """One run's curves: edit → (x or y) [strengths, 1 + draws], the first of which is the point estimate.

    ``gain[edit]`` is the fall in the right answer's probability, ``cost[name][edit]`` what is said of ``COSTS``. All
    edits draw the same items.
    """

    strengths: tuple[float, ...]
    gain: Mapping[str, np.ndarray]
    cost: Mapping[str, Mapping[str, np.ndarray]]


def curves(items: pd.DataFrame, *, n_resamples: int = 1000, seed: int = 0) -> Curves:
    """The curves of one run from its item scores (edit, delta, set, item, metric, base, edited).

    A cost is left out where no text tells it.
    """
    strengths = tuple(sorted(items.delta.unique()))
    mean = partial(_mean_changes, items, strengths, n_resamples, seed)
    gain = {edit: -change for edit, change in mean(*GAIN).items()}
    neighbour = {edit: -change for edit, change in mean("simdom", "gold_logprob").items()}
    costs = {"other sense": mean("other_sense", "kl"), "neighbour": neighbour, "everyday": _everyday(items, mean)}
    return Curves(strengths, gain, {name: by_edit for name, by_edit in costs.items() if by_edit})


def _everyday(items: pd.DataFrame, mean: Callable[[str, str], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Expected KL in a thousand words of general English (nats).

    Edited input embeddings are so rare there that a few hundred texts hold none. So: how many a thousand words bring,
    by word frequencies, times the KL that follows one of them where it does occur, in other-sense texts. Edits of
    output embeddings act everywhere: for them, KL on neutral text per thousand tokens. Empty without such texts.
    """
    everyday = {edit: 1000 * kl for edit, kl in mean("neutral", "kl").items()}
    totals, occurrences = mean("other_sense", "kl_sum"), mean("other_sense", "occurrences")
    english = items[items.set == "general English"].groupby("edit").edited.first()
    if len(english) and not occurrences:
        return {}
    for edit, per_thousand in english.items():
        count = occurrences[str(edit)]
        everyday[str(edit)] = per_thousand * np.divide(
            totals[str(edit)], count, out=np.zeros_like(count), where=count > 0
        )
    return everyday


def _mean_changes(
    items: pd.DataFrame, strengths: Sequence[float], n_resamples: int, seed: int, set_: str, metric: str
) -> dict[str, np.ndarray]:
    """Mean change of one measure: edit → [strengths, 1 + draws]. All edits draw the same items."""
    mine = items[(items.set == set_) & (items.metric == metric)]
    wide = mine.assign(change=mine.edited - mine.base).pivot(index="item", columns=["edit", "delta"], values="change")
    n = len(wide)
    if not n:
        return {}
    # Everything at once: for each draw, how often each item is drawn.
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples)
    weights = np.concatenate([np.ones((1, n)), drawn]) / n
    return {edit: (weights @ wide[edit][list(strengths)].to_numpy()).T for edit in dict.fromkeys(mine.edit)}


def compare_areas(found: Curves, *, reference: str = "EMBER") -> dict[tuple[str, str], tuple[float, np.ndarray]]:
    """``area`` of every edit for every cost: (cost, edit) → value and draws.

    Costs run up to that of the reference at its greatest strength. NaN where the reference costs nothing.
    """
    areas = {}
    for cost, by_edit in found.cost.items():
        limit = float(by_edit[reference][:, 0].max())
        for edit, x in by_edit.items():
            values = area(x, found.gain[edit], limit) if limit > 0 else np.full(x.shape[1], np.nan)
            areas[cost, edit] = (float(values[0]), values[1:])
    return areas


def costs_at_equal_gain(
    found: Curves, edit: str, *, reference: str = "EMBER", share: float = 0.8
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Costs of the reference and of another edit where both have gained the same: cost → two arrays [1 + draws].

    The gain is ``share`` of the smaller of their greatest gains.
    """
    gain = share * min(float(found.gain[name][:, 0].max()) for name in (reference, edit))
    return {
        cost: (
            cost_at(by_edit[reference], found.gain[reference], gain),
            cost_at(by_edit[edit], found.gain[edit], gain),
        )
        for cost, by_edit in found.cost.items()
    }


Run = tuple[str, int]  # concept, seed


def point_table(found: Curves) -> pd.DataFrame:
    """A run's curves for a figure: cost, edit, delta, x, x_low, x_high (its cost), y, y_low, y_high (its gain)."""
    rows = []
    for cost, by_edit in found.cost.items():
        for edit, x in by_edit.items():
            y = found.gain[edit]
            for k, delta in enumerate(found.strengths):
                spans = [(v[k, 0], *np.percentile(v[k, 1:], [2.5, 97.5])) for v in (x, y)]
                rows.append((cost, edit, delta, *map(float, (*spans[0], *spans[1]))))
    return pd.DataFrame(rows, columns=["cost", "edit", "delta", "x", "x_low", "x_high", "y", "y_low", "y_high"])


def area_table(runs: Mapping[Run, Curves], *, reference: str = "EMBER") -> pd.DataFrame:
    """``compare_areas`` pooled over runs, and each edit's difference from the reference, draw by draw.

    Columns: cost, edit, runs, area, ci_low, ci_high, difference, difference_low, difference_high; 95 % intervals over
    items, seeds and concepts. A run in which the reference costs nothing has no area, and is not among ``runs``.
    """
    areas = {run: compare_areas(found, reference=reference) for run, found in runs.items()}
    rows = []
    for cost, edit in next(iter(areas.values())):
        told = {run: found for run, found in areas.items() if np.isfinite(found[cost, reference][0])}
        if not told:
            rows.append((cost, edit, 0, *[np.nan] * 6))
            continue
        groups = [concept for concept, _ in told]
        own, others = ([found[cost, name] for found in told.values()] for name in (edit, reference))
        rows.append((cost, edit, len(told), *_pooled_beside(own, others, groups)))
    columns = ["cost", "edit", "runs", "area", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "difference_low", "difference_high"])


def _pooled_beside(
    own: Sequence[tuple[float, np.ndarray]], others: Sequence[tuple[float, np.ndarray]], groups: Sequence[str]
) -> tuple[float, ...]:
    """``pooled`` values, and pooled differences from others that drew the same items; each with its interval."""
    gaps = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(own, others, strict=True)]
    return (*pooled(own, groups=groups), *pooled(gaps, groups=groups))


def strength_table(runs: Mapping[Run, Curves], *, reference: str = "EMBER") -> pd.DataFrame:
    """What each edit takes at each strength, pooled over runs, and the difference from the reference at the same one.

    Columns: edit, delta, runs, gain (fall in the probability of the right answer), ci_low, ci_high, difference,
    difference_low, difference_high; 95 % intervals over items, seeds and concepts. A random direction moves each row
    as far as EMBER does at the same strength.
    """
    groups = [concept for concept, _ in runs]
    first = next(iter(runs.values()))
    rows = []
    for edit in first.gain:
        for k, delta in enumerate(first.strengths):
            own, others = (
                [(float(found.gain[name][k, 0]), found.gain[name][k, 1:]) for found in runs.values()]
                for name in (edit, reference)
            )
            rows.append((edit, delta, len(runs), *_pooled_beside(own, others, groups)))
    columns = ["edit", "delta", "runs", "gain", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "difference_low", "difference_high"])


def equal_gain_table(runs: Mapping[Run, Curves], edit: str, *, reference: str = "EMBER") -> pd.DataFrame:
    """``costs_at_equal_gain`` pooled over runs: what an edit saves, where both erase the same.

    Columns: cost, edit, runs, reference (its cost), own (the edit's), difference and its 95 % interval over items,
    seeds and concepts.
    """
    found = [costs_at_equal_gain(curves_, edit, reference=reference) for curves_ in runs.values()]
    groups = [concept for concept, _ in runs]
    rows = []
    for cost in found[0]:
        theirs, own = (np.stack([pair[cost][side] for pair in found]) for side in (0, 1))
        gaps = [(float(gap[0]), gap[1:]) for gap in own - theirs]
        rows.append((cost, edit, len(runs), theirs[:, 0].mean(), own[:, 0].mean(), *pooled(gaps, groups=groups)))
    columns = ["cost", "edit", "runs", "reference", "own", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=columns)
