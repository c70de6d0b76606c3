"""Frames of all runs of a profile, which have a column ``run`` → the report's tables and figures, by file name."""

from collections.abc import Callable, Collection, Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from ember.evaluation import localization, stability
from ember.evaluation import trade_curves as trade
from ember.evaluation.trade_off import RARE
from ember.reporting import control_plots, feature_plots, localization_plots, plots, relearn_plots
from ember.reporting import relearn_tables as relearned
from ember.reporting import tables as erased
from ember.store.paths import slug

Tables = dict[str, pd.DataFrame]
Figures = Iterator[tuple[str, Figure | SubFigure | None]]
Drawing = Callable[[pd.DataFrame], Axes | Figure]
ASKED = ["accuracy", "gold_prob", "letter_correct", "letter_valid", "open_correct"]


def first_seeds(items: pd.DataFrame, order: Sequence[int]) -> pd.Series:
    """Of each concept the first seed, in this order, with which EMBER found something to edit."""
    alone = items[(items.method == "ember") & ~items.ember]
    return alone.groupby("concept").seed.agg(lambda seeds: min(seeds, key=list(order).index))


def of_seeds(frame: pd.DataFrame, seeds: pd.Series) -> pd.DataFrame:
    """The rows of one seed a concept: figures of single runs show no more."""
    return frame[frame.seed == frame.concept.map(seeds)]


def figure_name(kind: str, frame: pd.DataFrame) -> str:
    """File name of a run's figure: its kind and what the frame's first row says of concept, method and seed."""
    row = frame.iloc[0]
    arm = [f"{row.method}{'-with-ember' if row.ember else ''}"] if "method" in frame else []
    return "__".join([kind, slug(row.concept), *arm, f"seed{row.seed}"])


def by_concept(frame: pd.DataFrame, **drawings: Drawing) -> Figures:
    """Of the rows of each concept, all drawings; names are KIND__CONCEPT."""
    for concept, part in frame.groupby("concept", sort=False):
        for kind, draw in drawings.items():
            yield f"{kind}__{slug(str(concept))}", draw(part).figure


def by_run(frame: pd.DataFrame, **drawings: Drawing) -> Figures:
    """Of the rows of each run, all drawings; names are ``figure_name``'s."""
    for _, part in frame.groupby("run"):
        for kind, draw in drawings.items():
            yield figure_name(kind, part), draw(part).figure


def erasure_tables(
    records: pd.DataFrame, cells: pd.DataFrame, items: pd.DataFrame, *, controls: Collection[str]
) -> Tables:
    """What each method erases, from the frames of notebook 03; with ``controls``, each beside EMBER."""
    test, train = (records[records.split == split] for split in ("test", "train"))
    edited = test[test.method != "base"]
    base = test[test.method == "base"].drop_duplicates(["concept", "set", "metric"])
    compared = erased.comparisons(items)
    main = erased.main_table(compared, cells)
    tables = {
        "base_model": base[base.metric.isin(ASKED)][["concept", "set", "metric", "value", "ci_low", "ci_high", "n"]],
        "main": main, "overview": erased.arm_overview(main), "ember_effect": erased.effect_table(compared),
        "changes": erased.change_table(edited), "headline": erased.headline(base, edited),
        "grid": erased.grid_table(train, cells),
    }  # fmt: skip
    return tables | ({"controls": erased.control_table(compared, controls)} if controls else {})


def feature_figures(loss: pd.DataFrame, scores: pd.DataFrame, preview: pd.DataFrame) -> Figures:
    """Each run's fit, features and rows, from the frames of notebooks 01 and 02."""

    def keyness(run: pd.DataFrame) -> Axes:
        chosen = run.feature[run.selected].tolist()
        return feature_plots.feature_scores(run, threshold=run.threshold.iloc[0], selected=chosen)

    def ratios(run: pd.DataFrame) -> Axes:
        return feature_plots.role_composition(run, selected=run.feature[run.selected].tolist())

    yield from by_run(loss, factorization_loss=lambda run: feature_plots.loss_curve(run.loss, total=run.total.iloc[0]))
    yield from by_run(scores, selected_features=keyness, keyness_and_ratio=ratios)
    yield from by_run(preview, token_preview=feature_plots.token_preview)


def erasure_figures(records: pd.DataFrame, cells: pd.DataFrame, items: pd.DataFrame, samples: pd.DataFrame) -> Figures:
    """Every grid, and of EMBER alone: question by question, in words, and the damage to texts."""
    train = records[(records.split == "train") & (records.set == "")]
    for (concept, seed), grids in erased.ember_first(train).groupby(["concept", "seed"], sort=False):
        chosen = cells[cells.chosen & (cells.concept == concept) & (cells.seed == seed)]
        yield f"grids__{slug(concept)}__seed{seed}", plots.grid_panels(grids, chosen)
    alone = items[(items.method == "ember") & ~items.ember & (items.metric == "gold_logprob")]
    yield from by_run(alone.assign(change=alone.edited - alone.base), item_changes=feature_plots.item_changes)
    written = samples[samples.method == "ember"]
    yield from by_run(written, generations=lambda run: plots.text_panel(run[["prompt", "base", "edited"]]))
    titles = {**plots.LABELS, "instruction": "reference responses"}
    texts = records.set.isin(["neutral", "instruction", "other_sense", "paragraph"]) & (records.metric == "delta_loss")
    damage = records[texts & (records.split == "test") & (records.method == "ember")]

    def rises(run: pd.DataFrame) -> Axes:
        title, unit = "Rise in loss on the test texts (EMBER alone)", "nats per token (95 % interval)"
        return plots.interval_bars(run.sort_values("value"), title=title, xlabel=unit, base=0.0)

    yield from by_run(damage.assign(label=damage.set.map(titles)), text_damage=rises)


def relearning_tables(
    items: pd.DataFrame, moved: pd.DataFrame, curve: pd.DataFrame, *, controls: Collection[str]
) -> Tables:
    """What comes back, from the frames of notebook 04; with ``controls``, what is left of each beside EMBER."""
    table = relearned.relearning_table(items)
    pace = ["concept", *relearned.ATTACKED, "seed", "tokens", "seconds", "tokens_per_second", "diverged"]
    tables = {
        "relearning": table, "relearning_overview": relearned.relearning_overview(table), "weights_moved": moved,
        "ember_effect_relearned": relearned.left_with_ember(items),
        "precision": relearned.precision_table(items, moved),
        "relearning_speed": curve.groupby("run").last()[pace],
    }  # fmt: skip
    return tables | ({"controls_relearned": relearned.left_beside_ember(items, controls)} if controls else {})


def relearning_figures(table: pd.DataFrame, precisions: pd.DataFrame) -> Figures:
    """What comes back: by method against tokens, by attack where there are several, and by precision."""

    def panels(part: pd.DataFrame) -> Figure:
        widest = relearned.recipe(part[part.attack == "all"], most="method")
        return relearn_plots.regained_panels(widest[(widest.metric == "gold_prob") & (widest.questions == "all")])

    def heatmap(part: pd.DataFrame) -> Axes:
        return relearn_plots.share_heatmap(relearned.recipe(part, most="attack"))

    last = relearned.final_points(table)
    several = last[last.groupby("concept").attack.transform(lambda attacks: set(attacks) != {"all"})]
    yield from by_concept(table, relearning=panels)
    yield from by_concept(several, attacks=heatmap)
    yield from by_concept(precisions, precision=relearn_plots.precision_panel)


def localization_tables(tokens: pd.DataFrame, everyday: pd.DataFrame, seeds: pd.Series) -> Tables:
    """Where predictions change, from the frames of notebook 05; the tokens hurt most are those of ``seeds``."""
    alone = of_seeds(tokens[(tokens.method == "ember") & ~tokens.ember], seeds)
    worst = [localization.most_damaged(part).assign(concept=name) for name, part in alone.groupby("concept")]
    everyday = everyday.drop(columns=["method", "ember"]).drop_duplicates(["concept", "seed", "set"])
    return {
        "localization": localization.by_arm(tokens), "half_of_change": localization.half_by_arm(tokens),
        "everyday": everyday, "most_damaged": pd.concat(worst),
    }  # fmt: skip


def localization_figures(table: pd.DataFrame, tokens: pd.DataFrame) -> Figures:
    """KL before and after an edited token by arm, and by the number of them for EMBER alone."""
    yield from by_concept(table, localization=localization_plots.arm_exposure)
    alone = tokens[(tokens.method == "ember") & ~tokens.ember]
    alone = alone.assign(text=alone.seed.astype(str) + " " + alone.text.astype(str))
    yield from by_concept(alone, exposure=lambda part: localization_plots.exposure_bars(localization.by_exposure(part)))


def trade_runs(items: pd.DataFrame) -> trade.Runs:
    """The curves of every run, from the item scores of notebook 06."""
    return {key: trade.curves(part) for key, part in items.groupby(["concept", "seed"], sort=False)}


def trade_tables(runs: trade.Runs) -> Tables:
    """What control edits take and cost, per concept and over all."""
    parts = {concept: {key: run for key, run in runs.items() if key[0] == concept} for concept, _ in runs}
    parts |= {erased.ALL: dict(runs)} if len(parts) > 1 else {}

    def each(table: Callable[..., pd.DataFrame], *edit: str) -> pd.DataFrame:
        return pd.concat(table(part, *edit).assign(concept=name) for name, part in parts.items())

    tables = {"trade": each(trade.area_table), "strengths": each(trade.strength_table)}
    rare = RARE in set(tables["trade"].edit)
    return tables | ({"spared_tokens": each(trade.equal_gain_table, RARE)} if rare else {})


def trade_figures(runs: trade.Runs, areas: pd.DataFrame, seeds: pd.Series) -> Figures:
    """The areas of every concept, and the curves of one seed each."""
    yield from by_concept(areas, trade_areas=control_plots.area_differences)
    for (concept, seed), run in runs.items():
        if seed == seeds[concept]:
            yield f"trade__{slug(concept)}", control_plots.trade_curves(trade.point_table(run))


def varied_pairs(fits: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """``stability.varied_pairs`` of each concept, from the frames of notebook 08."""
    parts = pairs.groupby("concept", sort=False)
    return pd.concat(stability.varied_pairs(fits[fits.concept == concept], part) for concept, part in parts)


def stability_table(varied: pd.DataFrame) -> pd.DataFrame:
    """Whether the same feature comes back, from ``varied_pairs``, per concept and over all."""
    return pd.concat(stability.variation_table(part).assign(concept=c) for c, part in erased.each_concept(varied))
