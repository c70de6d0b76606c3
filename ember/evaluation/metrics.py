"""Efficacy, specificity, coherence and their harmonic mean, as published and as continuous twins, with intervals.

Every interval is a percentile bootstrap over items (``scipy.stats.bootstrap``), resampled in pairs with the base
model's; that of an accuracy is Wilson's. Item variance is not seed variance: these intervals hold the seed fixed.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

CHANCE = 0.25
QUESTION_METRICS = {"correct": "accuracy", "gold_prob": "gold_prob", "gold_logprob": "gold_logprob"}
PROPORTIONS = ("accuracy", "letter_correct", "letter_valid", "open_correct")


def harmonic_mean(*terms: np.ndarray | float) -> np.ndarray:
    """Harmonic mean along new axes; 0 wherever a term is ≤ 0 or not finite (the paper's convention)."""
    stacked = np.stack(np.broadcast_arrays(*[np.asarray(t, dtype=float) for t in terms]))
    good = (np.isfinite(stacked) & (stacked > 0)).all(axis=0)
    safe = np.where(good, stacked, 1.0)
    return np.where(good, len(terms) / (1 / safe).sum(axis=0), 0.0)


def retained(value: np.ndarray, base: np.ndarray, *, clip: bool) -> np.ndarray:
    """Share of the base model's advantage over chance that is left: (value − ¼)/(base − ¼).

    With ``clip`` this is the paper's multiple-choice fraction, confined to 0..1; without, it neither saturates at 1
    nor stops at 0. NaN where the base model is not above chance.
    """
    value, base = np.asarray(value, dtype=float), np.asarray(base, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(base > CHANCE, (value - CHANCE) / (base - CHANCE), np.nan)
    return np.clip(share, 0.0, 1.0) if clip else share


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion."""
    interval = stats.binomtest(round(successes), n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Comparison:
    """``summary``: one row a metric, see ``compare``. ``draws``: metric → bootstrap values [n_resamples]."""

    summary: pd.DataFrame
    draws: Mapping[str, np.ndarray]

    def value(self, metric: str, set_: str = "") -> float:
        """One value of the summary."""
        hit = self.summary[(self.summary.metric == metric) & (self.summary.set == set_)]
        return float(hit.value.iloc[0])


def compare(
    base: pd.DataFrame, edited: pd.DataFrame, *, n_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Compare an edited model's item scores with the base model's, item by item.

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
    - where such rows exist (letters, judge), the paper's own variants: ``efficacy_letter``,
      ``specificity_letter``, ``harmonic_letter`` on letter answers; ``efficacy_open``, ``specificity_open``,
      ``harmonic_open`` on open answers, of which a share min(1, accuracy/base accuracy) is left (general questions
      have no open form: by letter, or else by likelihood); ``coherence_judged`` = HM(``instruction_judged``,
      ``fluency_judged``), each min(1, score/base score); and with it ``final_judged``, ``final_letter``,
      ``final_open``. A judged score whose verdicts are all missing is NaN, and so is all that needs it.

    The same ``seed`` draws the same items, so the draws of two comparisons with one base are paired.

    Raises
    ------
    ValueError
        If the two frames do not hold the same items.
    """
    wide = _pair(base, edited)
    sets = sorted({name for name, _ in wide})
    sizes = {name: len(next(v for (s, _), v in wide.items() if s == name)[0]) for name in sets}
    names: list[tuple[str, str]] = []

    def statistic(*index: np.ndarray, axis: int = -1) -> np.ndarray:
        where = dict(zip(sets, index, strict=True))
        means: dict[tuple[str, str], Pair] = {}
        for key, (before, after) in wide.items():
            chosen = where[key[0]]
            means[key] = (_nanmean(before[chosen], axis), _nanmean(after[chosen], axis))
        table = _per_set(means) | {("", name): value for name, value in _composites(means).items()}
        names[:] = list(table)
        return np.stack([np.asarray(v, dtype=float) for v in table.values()])

    everything = tuple(np.arange(sizes[name]) for name in sets)
    point = statistic(*everything)
    with warnings.catch_warnings():
        # A statistic that is undefined in some draw (a base model at chance) is NaN there, which scipy warns about.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        draws = stats.bootstrap(
        everything, statistic, n_resamples=n_resamples, confidence_level=confidence, method="percentile",
        vectorized=True, rng=np.random.default_rng(seed), batch=200,
    ).bootstrap_distribution  # fmt: skip
    tail = 100 * (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=-1)
    rows = []
    for k, (set_, metric) in enumerate(names):
        interval = (low[k], high[k])
        if metric in PROPORTIONS:
            interval = _proportion_interval(wide, set_, metric, confidence)
        n = sizes.get(set_, sum(sizes.values()))
        rows.append((set_, metric, point[k], *interval, _effect_size(wide, set_, metric), n))
    columns = ["set", "metric", "value", "ci_low", "ci_high", "effect_size", "n"]
    by_name = {f"{set_}/{metric}" if set_ else metric: draws[k] for k, (set_, metric) in enumerate(names)}
    return Comparison(pd.DataFrame(rows, columns=columns), by_name)


Pair = tuple[np.ndarray, np.ndarray]


def pooled(
    parts: Sequence[tuple[float, np.ndarray]], *, groups: Sequence[str] = (), seed: int = 0
) -> tuple[float, float, float]:
    """Mean over runs with its 95 % interval over items and runs.

    Each part is one run's value and its bootstrap draws; every draw resamples the runs too. Runs of the same group (a
    concept) draw the same items; those of different groups, independent ones.
    """
    values, draws = np.array([value for value, _ in parts]), np.stack([draw for _, draw in parts])
    if len(set(groups)) > 1:
        numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
        mixed = [np.random.default_rng([seed, numbers[group]]).permutation(draws.shape[1]) for group in groups]
        draws = np.take_along_axis(draws, np.stack(mixed), axis=1)
    chosen = np.random.default_rng(seed).integers(0, len(parts), (len(parts), draws.shape[1]))
    means = np.take_along_axis(draws, chosen, axis=0).mean(0)
    low, high = np.nanpercentile(means, [2.5, 97.5]) if np.isfinite(means).any() else (np.nan, np.nan)
    return float(values.mean()), float(low), float(high)


def _pair(base: pd.DataFrame, edited: pd.DataFrame) -> dict[tuple[str, str], Pair]:
    """(set, metric) → (base [n], edited [n]), aligned by item."""
    keys = ["set", "metric", "item"]
    left, right = (frame.set_index(keys).value.sort_index() for frame in (base, edited))
    if not left.index.equals(right.index):
        raise ValueError("the two evaluations do not hold the same items")
    pairs: dict[tuple[str, str], Pair] = {}
    for (set_, metric), group in left.groupby(level=["set", "metric"]):
        before, after = group.to_numpy(dtype=float), right.loc[set_, metric].to_numpy(dtype=float)
        if len(before) < 2:
            raise ValueError(f"set {set_!r} holds one item; intervals need at least two")
        missing = ~(np.isfinite(before) & np.isfinite(after))  # a mean over other items is no paired change
        pairs[str(set_), str(metric)] = (np.where(missing, np.nan, before), np.where(missing, np.nan, after))
    return pairs


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over items; NaN items (an empty generation has no loss) are left out."""
    present = np.isfinite(values)
    total = np.where(present, values, 0.0).sum(axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total / present.sum(axis=axis))


def _per_set(means: Mapping[tuple[str, str], Pair]) -> dict[tuple[str, str], np.ndarray]:
    table = {}
    for (set_, metric), (before, after) in means.items():
        name = QUESTION_METRICS.get(metric, metric)
        table[set_, name] = after
        if metric != "kl":
            table[set_, f"delta_{name}"] = after - before
    return table


def _composites(means: Mapping[tuple[str, str], Pair]) -> dict[str, np.ndarray]:
    """The scores that combine several sets, from the sets' means (base, edited)."""

    def left(set_: str, metric: str, clip: bool) -> np.ndarray:
        before, after = means[set_, metric]
        return retained(after, before, clip=clip)

    def loss_ratio(set_: str, metric: str) -> np.ndarray:
        before, after = means[set_, metric]
        return np.minimum(1.0, np.exp(before - after))

    out = {"instruction": loss_ratio("instruction", "loss"), "neutral": loss_ratio("neutral", "loss")}
    if ("generation", "distinct") in means:
        distinct_before, distinct_after = means["generation", "distinct"]
        with np.errstate(divide="ignore", invalid="ignore"):
            variety = np.minimum(1.0, distinct_after / distinct_before)
        out["fluency"] = np.nan_to_num(loss_ratio("generation", "gen_loss") * variety)
    out["coherence"] = harmonic_mean(*out.values())
    for metric, clip, tag in (
        ("correct", True, ""),
        ("gold_prob", False, "_cont"),
        ("letter_correct", True, "_letter"),
    ):
        if tag == "_letter" and ("concept", metric) not in means:
            continue
        efficacy = 1 - left("concept", metric, clip)
        specificity = harmonic_mean(left("general", metric, clip), left("simdom", metric, clip))
        capped = np.minimum(efficacy, 1.0)
        out[f"efficacy{tag}"] = efficacy
        out[f"specificity{tag}"] = specificity
        out[f"harmonic{tag}"] = harmonic_mean(capped, specificity)
        if tag != "_letter":
            out[f"final{tag}"] = harmonic_mean(capped, specificity, out["coherence"])
    out |= _judged_composites(means, out)
    lost = {name: means[name, "gold_logprob"][0] - means[name, "gold_logprob"][1] for name in ("concept", "simdom")}
    out["selectivity"] = lost["concept"] - lost["simdom"]
    return out


def _judged_composites(
    means: Mapping[tuple[str, str], Pair], scores: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The paper's scores that need a judge, as far as its verdicts are there; ``scores`` are the judge-free ones."""

    def share(set_: str, metric: str) -> np.ndarray:
        before, after = means[set_, metric]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(before > 0, np.minimum(1.0, after / before), np.nan)

    out: dict[str, np.ndarray] = {}
    if ("generation", "judge_instruction") in means:
        out = {f"{name}_judged": share("generation", f"judge_{name}") for name in ("instruction", "fluency")}
        out["coherence_judged"] = _measured_mean(*out.values())
    if ("concept_open", "open_correct") in means:
        out["efficacy_open"] = 1 - share("concept_open", "open_correct")
        metric = "letter_correct" if ("general", "letter_correct") in means else "correct"
        before, after = means["general", metric]
        simdom = share("simdom_open", "open_correct")
        # A general set at chance makes the mean 0, as everywhere; a missing verdict makes it missing.
        specificity = harmonic_mean(retained(after, before, clip=True), simdom)
        out["specificity_open"] = np.where(np.isfinite(simdom), specificity, np.nan)
        out["harmonic_open"] = _measured_mean(out["efficacy_open"], out["specificity_open"])
    if "coherence_judged" in out:
        known = {**scores, **out}
        for tag, name in (("", "judged"), ("_letter", "letter"), ("_open", "open")):
            if f"efficacy{tag}" in known:
                terms = (known[f"efficacy{tag}"], known[f"specificity{tag}"])
                combined = harmonic_mean(*terms, out["coherence_judged"])
                missing = np.isnan(out["coherence_judged"]) | np.isnan(known[f"harmonic{tag}"])
                out[f"final_{name}"] = np.where(missing, np.nan, combined)
    return out


def _measured_mean(*terms: np.ndarray) -> np.ndarray:
    """Harmonic mean of judged scores; NaN where one is missing."""
    return np.where(np.isnan(terms).any(axis=0), np.nan, harmonic_mean(*terms))


def _proportion_interval(
    wide: Mapping[tuple[str, str], Pair], set_: str, name: str, confidence: float
) -> tuple[float, float]:
    """Wilson's interval over the items that have a score."""
    after = wide[set_, "correct" if name == "accuracy" else name][1]
    present = after[np.isfinite(after)]
    return wilson(present.sum(), len(present), confidence) if len(present) else (float("nan"), float("nan"))


def _effect_size(wide: Mapping[tuple[str, str], Pair], set_: str, metric: str) -> float:
    """d_z of a paired change; NaN for anything else, or where all changes are equal."""
    if not metric.startswith("delta_"):
        return float("nan")
    original = {v: k for k, v in QUESTION_METRICS.items()}
    name = metric.removeprefix("delta_")
    before, after = wide[set_, original.get(name, name)]
    change = after - before
    change = change[np.isfinite(change)]
    spread = change.std(ddof=1) if len(change) > 1 else 0.0
    return float(change.mean() / spread) if spread > 0 else float("nan")


def accuracy_table(items: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each question set with Wilson's interval: set, accuracy, ci_low, ci_high, n."""
    right = items[items.metric == "correct"].groupby("set", sort=False).value.agg(["sum", "size"])
    rows = [
        (name, row["sum"] / row["size"], *wilson(row["sum"], int(row["size"])), int(row["size"]))
        for name, row in right.iterrows()
    ]
    return pd.DataFrame(rows, columns=["set", "accuracy", "ci_low", "ci_high", "n"])


def choose(cells: Mapping[str, Comparison], *, score: str = "final_cont") -> tuple[str, pd.DataFrame]:
    """The cell with the best score; cells within one standard error of it tie, and the first listed wins.

    ``cells`` maps a label to its comparison, the gentlest setting first; all were made with one base and seed, so their
    draws are paired, and the standard error is that of the difference from the best cell. Returns the choice and a
    table cell, score, behind (distance from the best), standard_error, tie.
    """
    if not cells:
        raise ValueError("there is no cell to choose from")
    best = max(cells, key=lambda cell: cells[cell].value(score))
    rows = []
    for cell, comparison in cells.items():
        gap = cells[best].value(score) - comparison.value(score)
        error = float(np.std(cells[best].draws[score] - comparison.draws[score], ddof=1))
        rows.append((cell, comparison.value(score), gap, error, cell == best or gap <= error))
    table = pd.DataFrame(rows, columns=["cell", score, "behind", "standard_error", "tie"])
    return str(table[table.tie].cell.iloc[0]), table
