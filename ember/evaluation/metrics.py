"""Efficacy, specificity, coherence and their harmonic mean, as published and as continuous twins, with intervals.

Every interval is a percentile bootstrap over items (``resampling``), resampled in pairs with the base model's; that of
an accuracy is Wilson's. Item variance is not seed variance: these intervals hold the seed fixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ember.evaluation.resampling import interval, statistic_draws, wilson

CHANCE = 0.25
Pairs = Mapping[tuple[str, str], np.ndarray]  # (set, metric) → of the base model and the edited one [2, …]
PROPORTIONS = ("accuracy", "letter_correct", "letter_valid", "open_correct")


def harmonic_mean(*terms: np.ndarray | float) -> np.ndarray:
    """Harmonic mean along new axes; 0 wherever a term is ≤ 0 or not finite (the paper's convention)."""
    stacked = np.stack(np.broadcast_arrays(*[np.asarray(t, dtype=float) for t in terms]))
    good = (np.isfinite(stacked) & (stacked > 0)).all(axis=0)
    safe = np.where(good, stacked, 1.0)
    return np.where(good, len(terms) / (1 / safe).sum(axis=0), 0.0)


@np.errstate(divide="ignore", invalid="ignore")
def retained(value: np.ndarray, base: np.ndarray, *, clip: bool) -> np.ndarray:
    """Share of the base model's advantage over chance that is left: (value − ¼)/(base − ¼).

    With ``clip`` this is the paper's multiple-choice fraction, confined to 0..1; without, it neither saturates at 1
    nor stops at 0. NaN where the base model is not above chance.
    """
    base = np.asarray(base, dtype=float)
    share = np.where(base > CHANCE, (np.asarray(value, dtype=float) - CHANCE) / (base - CHANCE), np.nan)
    return np.clip(share, 0.0, 1.0) if clip else share


@dataclass(frozen=True)
class Comparison:
    """``summary``: one row a metric, see ``compare``. ``draws``: metric → bootstrap values [n_resamples]."""

    summary: pd.DataFrame
    draws: Mapping[str, np.ndarray]

    def value(self, metric: str, set_: str = "") -> float:
        """One value of the summary."""
        hit = self.summary[(self.summary.metric == metric) & (self.summary.set == set_)]
        return float(hit.value.iloc[0])


def compare(base: pd.DataFrame, edited: pd.DataFrame, *, n_resamples: int = 2000, seed: int = 0) -> Comparison:
    """Compare an edited model's item scores with the base model's, item by item; ``ValueError`` if items differ.

    The summary has columns set, metric, value, ci_low, ci_high, effect_size, n:

    - per set, the edited model's ``accuracy``, ``gold_prob``, ``gold_logprob``, ``loss``, ``kl``, …, and the paired
      changes ``delta_…`` from the base model with effect size d_z (mean over standard deviation of the changes);
    - ``selectivity``: how much more log-likelihood (nats per character) concept questions lose than simdom ones;
    - ``efficacy``, ``specificity``, ``harmonic``, ``final``: the paper's formulas on accuracy (paper, section 4);
    - the same with ``_cont``: on ``gold_prob``, not clipped (only the efficacy inside a harmonic mean is capped at
      1: below chance is not more erased);
    - ``coherence`` = HM(``instruction``, ``fluency``, ``neutral``), each in 0..1: exp(−rise in loss per token) of
      reference responses and of held-out text, and for greedy text exp(−rise of its loss under the base model)
      times its share of unrepeated trigrams relative to the base model's (left out where nothing was generated);
    - where such rows exist (letters, judge), the paper's own variants: efficacy, specificity and harmonic with
      ``_letter`` on letter answers, and with ``_open`` on open answers, of which a share min(1, accuracy/base accuracy)
      is left (general questions have no open form: by letter, or else by likelihood); ``coherence_judged`` =
      HM(``instruction_judged``, ``fluency_judged``), each min(1, score/base score); and with it ``final_judged``,
      ``final_letter``, ``final_open``. A judged score whose verdicts are all missing is NaN, as is all that needs it.

    The same ``seed`` draws the same items, so the draws of two comparisons with one base are paired.
    """
    pairs = _pair(base, edited)
    sizes = {name: pair.shape[1] for (name, _), pair in pairs.items()}

    @np.errstate(divide="ignore", invalid="ignore")
    def scores(*positions: np.ndarray, axis: int = -1) -> dict[tuple[str, str], np.ndarray]:
        chosen = dict(zip(sizes, positions, strict=True))
        drawn = {key: pair[:, chosen[key[0]]] for key, pair in pairs.items()}
        # NaN items are left out: an empty generation has no loss.
        means = {key: np.nansum(pair, axis=axis) / np.isfinite(pair).sum(axis=axis) for key, pair in drawn.items()}
        table = {}
        for (set_, metric), (before, after) in means.items():
            table[set_, metric] = after
            if metric != "kl":
                table[set_, f"delta_{metric}"] = after - before
        return table | {("", name): value for name, value in _composites(means).items()}

    def statistic(*positions: np.ndarray, axis: int) -> np.ndarray:
        return np.stack(list(scores(*positions, axis=axis).values()))

    point = scores(*map(np.arange, sizes.values()))
    drawn = statistic_draws(list(sizes.values()), statistic, n_resamples=n_resamples, seed=seed)
    rows = []
    for (set_, metric), value, low, high in zip(point, point.values(), *interval(drawn), strict=True):
        if metric in PROPORTIONS:
            low, high = wilson(np.nansum(pairs[set_, metric][1]), int(np.isfinite(pairs[set_, metric][1]).sum()))
        n = sizes.get(set_, sum(sizes.values()))
        rows.append((set_, metric, float(value), low, high, _effect_size(pairs, set_, metric), n))
    columns = ["set", "metric", "value", "ci_low", "ci_high", "effect_size", "n"]
    names = [f"{set_}/{metric}" if set_ else metric for set_, metric in point]
    return Comparison(pd.DataFrame(rows, columns=columns), dict(zip(names, drawn, strict=True)))


def _pair(base: pd.DataFrame, edited: pd.DataFrame) -> Pairs:
    """Item scores of both, aligned by item."""
    keys = ["set", "metric", "item"]
    frames = [frame.assign(metric=frame.metric.replace("correct", "accuracy")) for frame in (base, edited)]
    before, after = (frame.set_index(keys).value.sort_index() for frame in frames)
    if not before.index.equals(after.index):
        raise ValueError("the two evaluations do not hold the same items")
    both = pd.DataFrame({"base": before, "edited": after}, dtype=float)
    both[~np.isfinite(both).all(axis=1)] = np.nan  # a mean over other items is no paired change
    pairs = {(str(s), str(m)): part.to_numpy().T.copy() for (s, m), part in both.groupby(level=["set", "metric"])}
    for (set_, _), pair in pairs.items():
        if pair.shape[1] < 2:
            raise ValueError(f"set {set_!r} holds one item; intervals need at least two")
    return pairs


def _composites(means: Pairs) -> dict[str, np.ndarray]:
    """The scores that combine several sets, from the sets' means (base, edited)."""

    def left(set_: str, metric: str, clip: bool) -> np.ndarray:
        before, after = means[set_, metric]
        return retained(after, before, clip=clip)

    def loss_ratio(set_: str, metric: str) -> np.ndarray:
        before, after = means[set_, metric]
        return np.minimum(1.0, np.exp(before - after))

    out = {"instruction": loss_ratio("instruction", "loss"), "neutral": loss_ratio("neutral", "loss")}
    if ("generation", "distinct") in means:
        out["fluency"] = np.nan_to_num(loss_ratio("generation", "gen_loss") * _kept(means["generation", "distinct"]))
    out["coherence"] = harmonic_mean(*out.values())
    kinds = [("accuracy", True, ""), ("gold_prob", False, "_cont"), ("letter_correct", True, "_letter")]
    for metric, clip, tag in kinds if ("concept", "letter_correct") in means else kinds[:2]:
        efficacy = 1 - left("concept", metric, clip)
        capped = np.minimum(efficacy, 1.0)
        specificity = harmonic_mean(left("general", metric, clip), left("simdom", metric, clip))
        out |= {f"efficacy{tag}": efficacy, f"specificity{tag}": specificity}
        out[f"harmonic{tag}"] = harmonic_mean(capped, specificity)
        if tag != "_letter":
            out[f"final{tag}"] = harmonic_mean(capped, specificity, out["coherence"])
    out |= _judged_composites(means, out)
    lost = [before - after for before, after in (means[name, "gold_logprob"] for name in ("concept", "simdom"))]
    return out | {"selectivity": lost[0] - lost[1]}


def _judged_composites(means: Pairs, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The paper's scores that need a judge, as far as its verdicts are there; ``scores`` are the judge-free ones."""
    out: dict[str, np.ndarray] = {}
    if ("generation", "judge_instruction") in means:
        out = {f"{name}_judged": _kept(means["generation", f"judge_{name}"]) for name in ("instruction", "fluency")}
        out["coherence_judged"] = _measured_mean(*out.values())
    if ("concept_open", "open_correct") in means:
        out["efficacy_open"] = 1 - _kept(means["concept_open", "open_correct"])
        before, after = means.get(("general", "letter_correct"), means["general", "accuracy"])
        simdom = _kept(means["simdom_open", "open_correct"])
        # A general set at chance makes the mean 0, as everywhere; a missing verdict makes it missing.
        specificity = harmonic_mean(retained(after, before, clip=True), simdom)
        out["specificity_open"] = np.where(np.isfinite(simdom), specificity, np.nan)
        out["harmonic_open"] = _measured_mean(out["efficacy_open"], out["specificity_open"])
    if "coherence_judged" in out:
        known = {**scores, **out}
        for tag, name in (("", "judged"), ("_letter", "letter"), ("_open", "open")):
            if f"efficacy{tag}" in known:
                combined = harmonic_mean(known[f"efficacy{tag}"], known[f"specificity{tag}"], out["coherence_judged"])
                missing = np.isnan(out["coherence_judged"]) | np.isnan(known[f"harmonic{tag}"])
                out[f"final_{name}"] = np.where(missing, np.nan, combined)
    return out


def _kept(pair: np.ndarray) -> np.ndarray:
    """Share of the base model's score that is left, at most 1; NaN where that is 0."""
    before, after = pair
    return np.where(before > 0, np.minimum(1.0, after / before), np.nan)


def _measured_mean(*terms: np.ndarray) -> np.ndarray:
    """Harmonic mean of judged scores; NaN where one is missing."""
    return np.where(np.isnan(terms).any(axis=0), np.nan, harmonic_mean(*terms))


def _effect_size(pairs: Pairs, set_: str, metric: str) -> float:
    """d_z of a paired change; NaN for anything else, or where all changes are equal."""
    if not metric.startswith("delta_"):
        return np.nan
    before, after = pairs[set_, metric.removeprefix("delta_")]
    change = (after - before)[np.isfinite(after)]
    spread = change.std(ddof=1) if len(change) > 1 else 0.0
    return float(change.mean() / spread) if spread > 0 else np.nan


def accuracy_table(items: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each question set with Wilson's interval: set, accuracy, ci_low, ci_high, n."""
    right = items[items.metric == "correct"].groupby("set", sort=False).value.agg(["sum", "size"])
    rows = [(name, total / n, *wilson(total, n), n) for name, total, n in right.itertuples()]
    return pd.DataFrame(rows, columns=["set", "accuracy", "ci_low", "ci_high", "n"])
