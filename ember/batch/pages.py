"""The README, the pages of docs/ and the data card: their tables, generated from results, profiles, code and data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ember.batch.around import busy_seconds
from ember.batch.profiles import Profile, load_profile
from ember.errors import EmberError
from ember.evaluation.data_checks import check_data, check_table
from ember.store.paths import REPOSITORY, notebooks_dir

if TYPE_CHECKING:  # brings torch, which most commands do without
    from ember.models.loading import LoadedModel

PAPER_PROFILES = ("paper-gemma", "paper-llama")


def data_tables(loaded: LoadedModel) -> dict[str, str]:
    """The data card's generated blocks: the check report, and the base model's accuracy on all test questions."""
    from ember.data.ours import list_concepts, load_concept, load_shared
    from ember.evaluation.evaluate import question_scores
    from ember.evaluation.metrics import accuracy_table

    frames = []
    for name, questions in [
        *((n, load_concept(n).questions) for n in list_concepts()),
        ("shared", load_shared().questions),
    ]:
        test = [q for q in questions if q.split == "test"]
        items = question_scores(loaded, test).assign(set=[q.set for q in test for _ in range(3)])
        frames.append(accuracy_table(items).assign(data=name))
    accuracy = pd.concat(frames)[["data", "set", "accuracy", "ci_low", "ci_high", "n"]]
    return {
        "report": check_table(check_data(loaded=loaded)).to_markdown(index=False, disable_numparse=True),
        "accuracy": accuracy.to_markdown(index=False, floatfmt=".3f"),
    }


def readme_tables() -> dict[str, str]:
    """The README's generated blocks: main results, notebooks with run times, benchmarks, default settings."""
    from ember.reporting.tables import ALL

    laptop, full = _tables("laptop"), _tables("full")
    return {
        "overview": _markdown(laptop / "overview.csv", without=("concept", "runs")),
        "full": _markdown(full / "overview.csv", only={"concept": ALL}, without=("chosen on train",)),
        "full_hours": _hours(full),
        "effect": _effects(full / "ember_effect.csv", only=ALL),
        "notebooks": _notebooks(laptop / "run_times.csv"),
        "benchmarks": _benchmarks(REPOSITORY / "results" / "benchmarks.csv"),
        "settings": _settings(load_profile("laptop")),
        "total": f"{busy_seconds(pd.read_csv(laptop / 'run_times.csv')) / 60:.0f} minutes",
    }


def results_tables() -> dict[str, str]:
    """The generated blocks of docs/results.md: relearning, localization, controls, stability, arrival."""
    from ember.reporting.tables import ALL

    laptop, full, attacks, controls = map(_tables, ("laptop", "full", "attacks", "controls"))
    return {
        "headline": _markdown(laptop / "headline.csv", without=("concept", "cell")),
        "relearning": _markdown(
            laptop / "relearning_overview.csv", without=("concept", "attack", "precision", "lr", "runs")
        ),
        "attacks": _markdown(
            attacks / "relearning_overview.csv",
            only={"concept": ALL, "attack": "all", "precision": "bf16_master", "lr": "0.0001"},
        ),
        "attacks_hours": _hours(attacks),
        "precision": _precisions(attacks / "precision.csv", only=ALL),
        "localization": _localized(laptop / "localization.csv"),
        "controls_hours": _hours(controls),
        "verdicts": _verdicts(controls / "verdicts.csv"),
        "strengths": _beside_ember(full / "strengths.csv", only=ALL, value="gain", across="delta", title="delta={:g}"),
        "trade": _beside_ember(controls / "trade.csv", only=ALL, value="area", across="cost", title="against {}"),
        "stability": _stability(controls / "stability.csv", only=ALL),
        "arrival": _arrivals(full),
    }


def _tables(profile: str) -> Path:
    """Where the committed tables of a profile are, wherever a run now would write."""
    return REPOSITORY / "results" / profile / "tables"


def _hours(tables: Path) -> str:
    return f"{busy_seconds(pd.read_csv(tables / 'run_times.csv')) / 3600:.1f} hours"


def _notebooks(run_times: Path) -> str:
    """Each notebook, what it shows and what its runs took, as Markdown."""
    runs = pd.read_csv(run_times)
    times = runs.groupby("notebook").agg(
        runs=("run", "size"), wall_seconds=("wall_seconds", "max"), peak_memory_mb=("peak_memory_mb", "max")
    )
    lines = ["| notebook | shows | runs | run time, at most | peak memory |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb")):
        shows = json.loads(path.read_text(encoding="utf-8"))["metadata"]["ember"]["shows"]
        cost = "– | – | –"
        if path.stem in times.index:
            row = times.loc[path.stem]
            cost = f"{row.runs:.0f} | {row.wall_seconds:.0f} s | {row.peak_memory_mb / 1024:.1f} GB"
        lines.append(f"| [`{path.stem}`](notebooks/{path.name}) | {shows} | {cost} |")
    return "\n".join(lines)


def _settings(profile: Profile) -> str:
    """Every setting of every method, its default and what the profile uses, as Markdown."""
    from ember.methods import METHODS
    from ember.methods.ember import EmberConfig

    lines = ["| method | setting | default | laptop profile |", "| --- | --- | --- | --- |"]
    own = {name: method for name, method in METHODS.items() if name == "ember" or method.config is not EmberConfig}
    for name, method in own.items():
        used = {**profile.grids.get(name, {}), **(profile.fit if name in profile.factorizing else {})}
        for setting in fields(method.config):
            shown = used.get(setting.name, setting.default)
            shown = " · ".join(map(str, shown)) if isinstance(shown, list) else shown
            lines.append(f"| {name} | `{setting.name}` | {setting.default} | {shown} |")
    return "\n".join(lines)


def _markdown(path: Path, *, only: Mapping[str, str] | None = None, without: Sequence[str] = ()) -> str:
    """A CSV table as Markdown, its numbers as they stand: the rows with the values of ``only``, or all.

    Columns that are the same in every row may be left out.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column, value in (only or {}).items():
        table = table[table[column] == value]
    for column in without:
        if len(set(table[column])) > 1:
            raise EmberError(f"{path}: column {column!r} is not the same in every row")
    return _lines(table.drop(columns=[*(only or {}), *without]))


def _effects(path: Path, *, only: str) -> str:
    """EMBER's effect on the four main scores of each method as Markdown."""
    from ember.reporting.tables import SHOWN, arm_name

    table = pd.read_csv(path)
    table = table[table.concept == only]
    text = [f"{r.value:+.2f} [{r.ci_low:+.2f}, {r.ci_high:+.2f}]" for r in table.itertuples()]
    wide = table.assign(text=text).pivot(index="method", columns="metric", values="text")[list(SHOWN)]
    wide.index = pd.Index([arm_name(method, False) for method in wide.index], name="method")
    return _lines(wide.rename(columns=SHOWN).reset_index())


def _precisions(path: Path, *, only: str) -> str:
    """What training precision does, as Markdown."""
    table = pd.read_csv(path)
    table = table[table.concept == only]
    shown = {
        "arm": table.arm, "lr": table.lr.map("{:g}".format), "tokens": table.tokens.map("{:.0f}".format),
        "precision": table.precision, "weights that changed": table.changed.map("{:.1%}".format),
        "edit undone": table.travelled.map(lambda v: "–" if pd.isna(v) else f"{v:.3%}"),
        "came back (probability)": _spans(table, "back"),
        "came back (nats/char)": _spans(table, "back{}_logprob", "+.4f"),
    }  # fmt: skip
    return _lines(pd.DataFrame(shown))


def _spans(table: pd.DataFrame, name: str, form: str = "+.3f") -> list[str]:
    """Values and intervals, if any, from columns NAME, NAME_low, NAME_high; the ending may be inside: ``a{}_b``."""
    name = name if "{}" in name else f"{name}{{}}"
    columns = (table[name.format(end)] for end in ("", "_low", "_high"))
    return [
        "–" if pd.isna(value) else f"{value:{form}}" + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")
        for value, low, high in zip(*columns, strict=True)
    ]


def _localized(path: Path) -> str:
    """KL before the first edited token and after one, by texts and arm, as Markdown."""
    from ember.evaluation.localization import EXPOSED
    from ember.reporting.plots import LABELS
    from ember.reporting.tables import arm_name

    table = pd.read_csv(path)
    table = table.assign(kl_text=_spans(table, "kl", ".3f"), arm=list(map(arm_name, table.method, table.ember)))
    wide = table.pivot(index=["arm", "set"], columns="group", values="kl_text").fillna("–")
    shares = table[table.group == EXPOSED[1]].set_index(["arm", "set"]).share_of_tokens
    rows = []
    for arm, texts in dict.fromkeys(zip(table.arm, table.set, strict=True)):
        share = shares.get((arm, texts), 0.0)
        rows.append((LABELS[texts], f"{share:.0%}", arm, *(wide.loc[(arm, texts), group] for group in EXPOSED)))
    columns = ["texts", "tokens after an edited one", "arm", *(f"KL {group}" for group in EXPOSED)]
    return _lines(pd.DataFrame(rows, columns=columns).sort_values("texts", kind="stable"))


def _beside_ember(path: Path, *, only: str, value: str, across: str, title: str) -> str:
    """EMBER's values, and for other edits the difference from them, by what column ``across`` says, as Markdown."""
    table = pd.read_csv(path)
    table = table[table.concept == only]
    own = _spans(table.rename(columns={"ci_low": f"{value}_low", "ci_high": f"{value}_high"}), value, ".3f")
    pairs = zip(table.edit, own, _spans(table, "difference"), strict=True)
    table = table.assign(text=[mine if edit == "EMBER" else gap for edit, mine, gap in pairs])
    wide = table.pivot(index="edit", columns=across, values="text").loc[list(dict.fromkeys(table.edit))]
    return _lines(wide[list(dict.fromkeys(table[across]))].rename(columns=title.format).reset_index())


def _verdicts(path: Path) -> str:
    """The answers that need one number each, as Markdown."""
    table = pd.read_csv(path)
    table = table[
        (table.measure == "final score") | table.question.isin(["left after relearning", "cost at equal erasure"])
    ]
    spans = _spans(table.rename(columns={"ci_low": "difference_low", "ci_high": "difference_high"}), "difference")
    shown = table[["question", "beside", "measure"]].assign(difference=spans, better=table.better)
    return _lines(shown.rename(columns={"difference": "difference from EMBER"}))


def _stability(path: Path, *, only: str) -> str:
    """What comes back when one thing of the fit varies, as Markdown."""
    table = pd.read_csv(path)
    table = table[table.concept == only]
    shown = {"what differs": table.varied, "pairs of fits": table.pairs.astype(str)}
    shown |= {"same feature selected again": table.returned.map("{:.0%}".format)}
    for measure, title in (
        ("cosine", "absolute cosine of the two"), ("same", "share of all features found again"),
        ("rows_jaccard", "overlap of edited rows"),
    ):  # fmt: skip
        shown[title] = _spans(table, measure, ".2f")
    return _lines(pd.DataFrame(shown).replace("nan%", "–"))


def _arrivals(tables: Path) -> str:
    """Where erasing what was taught arrives, and what it does to the taught copy otherwise, as Markdown."""
    from ember.reporting.tables import arm_name

    table = pd.read_csv(tables / "arrival.csv").rename(columns={"ci_low": "share_low", "ci_high": "share_high"})
    damage = pd.read_csv(tables / "taught_damage.csv")
    damage = damage[damage.reference == "taught"].rename(columns={"ci_low": "change_low", "ci_high": "change_high"})

    def texts(frame: pd.DataFrame, column: str, form: str) -> dict[tuple[str, bool], str]:
        return dict(zip(zip(frame.method, frame.ember, strict=True), _spans(frame, column, form), strict=True))

    likely = table[table.metric == "gold_prob"]
    general = damage[(damage.set == "general") & (damage.metric == "gold_prob")]
    columns = {
        "arrival (probability)": texts(likely, "share", ".2f"),
        "arrival (log-likelihood)": texts(table[table.metric == "gold_logprob"], "share", ".2f"),
        "general knowledge (probability)": texts(general, "change", "+.2f"),
        "neutral text, loss (nats/token)": texts(damage[damage.set == "neutral"], "change", "+.2f"),
    }
    arms = list(zip(likely.method, likely.ember, strict=True))
    shown = {"arm": [arm_name(*arm) for arm in arms], "cell": likely.cell}
    return _lines(pd.DataFrame(shown | {title: [found[arm] for arm in arms] for title, found in columns.items()}))


def _benchmarks(path: Path) -> str:
    """What was timed beside what, as Markdown."""
    table = pd.read_csv(path)
    shown = {"work": table.work, "compared with": table.compared_with}
    for side, title in (("ours", "this package"), ("theirs", "that")):
        amounts = zip(table[side], table.unit, strict=True)
        shown[title] = ["–" if pd.isna(value) else f"{value:.3g} {unit}" for value, unit in amounts]
    shown["ratio"] = table.ratio.map(lambda v: "–" if pd.isna(v) else f"{v:.1f}")
    limits = zip(table.target, table.ratio, table.unit, strict=True)
    shown["target"] = [f"≤ {target:g} {unit}" if pd.isna(ratio) else f"≥ {target:g}" for target, ratio, unit in limits]
    return _lines(pd.DataFrame(shown))


def _lines(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table.to_numpy())])


def fill_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """``text`` with every block between ``<!-- NAME -->`` and ``<!-- /NAME -->`` replaced by its generated content."""
    for name, block in blocks.items():
        gap = "" if "\n" not in block else "\n"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if not pattern.search(text):
            raise EmberError(f"the document has no block named {name!r}")
        filled = f"<!-- {name} -->{gap}{block}{gap}<!-- /{name} -->"
        text = pattern.sub(filled.replace("\\", r"\\"), text)
    return text


def paper_tables() -> dict[str, str]:
    """The generated blocks of docs/paper-scale.md: expected hours and cost, memory, and what was measured here."""
    from ember.batch.expected import GPUS, SUSTAINED, SUSTAINED_BANDWIDTH, expected_table
    from ember.batch.memory import model_shape, needs

    hours, memory = [], []
    for name in PAPER_PROFILES:
        profile = load_profile(name)
        for kind, gpu in GPUS.items():
            table = expected_table(profile, kind)
            total = float(table.hours.sum())
            shown = {"profile": name, "GPU": gpu.name, "runs": str(table.runs.sum())}
            shown |= {"longest run": f"{table.longest.max():.1f} h", "all runs, one by one": f"{total:.0f} h"}
            hours.append(shown | {"dollars": f"{total * gpu.dollars:.0f}, at {gpu.dollars:g} an hour"})
        shape = model_shape(profile.model)
        for need in needs(profile, shape) if shape else ():
            gigabytes = {"GPU": f"{need.device:.0f} GB", "host": f"{need.host:.0f} GB"}
            memory.append({"profile": name, "stage": need.stage, **gigabytes})
    speed = pd.read_csv(REPOSITORY / "results" / "attacks" / "tables" / "relearning_speed.csv")
    speed = speed[(speed.attack == "all") & (speed.lr == 1e-4)].groupby("precision").tokens_per_second.median()
    measured = pd.DataFrame({"precision": speed.index, "trained tokens a second": speed.map("{:.0f}".format)})
    peaks = [f"{g.name}: {g.bf16 / 1e12:g} ({g.fp32 / 1e12:g}) and {g.bandwidth / 1e12:g}" for g in GPUS.values()]
    return {
        "hours": _lines(pd.DataFrame(hours)),
        "memory": _lines(pd.DataFrame(memory)),
        "speed": _lines(measured),
        "peaks": "; ".join(peaks),
        "sustained": f"{SUSTAINED:.0%} of the operations and {SUSTAINED_BANDWIDTH:.0%} of the bytes",
    }


PAGES: Mapping[str, Callable[[], Mapping[str, str]]] = {
    "README.md": readme_tables,
    "docs/results.md": results_tables,
    "docs/paper-scale.md": paper_tables,
}


def render_page(page: str, text: str) -> str:
    """The text of a page of ``PAGES`` with its generated blocks renewed."""
    return fill_blocks(text, PAGES[page]())


def update_readme() -> None:
    """Write the generated tables into the README and the pages of docs/."""
    from ember.store.files import write_text

    for page in PAGES:
        path = REPOSITORY / page
        write_text(path, render_page(page, path.read_text(encoding="utf-8")))
