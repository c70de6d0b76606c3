"""Write the tables of the README and of the pages in docs/ from committed results, profiles and code: `make readme`.

A script of the repository, not of the package: whoever installs the package has no README to write.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import pandas as pd

from ember.batch.profiles import Profile, load_profile
from ember.batch.times import busy_seconds
from ember.data.arms import Arm
from ember.errors import EmberError
from ember.evaluation.localization import EXPOSED
from ember.methods import METHODS
from ember.methods.ember import EmberConfig
from ember.reporting.format import MISSING, arm_names, fill_blocks, interval_texts, markdown
from ember.reporting.plots import LABELS
from ember.reporting.relearn_tables import LIKELIHOOD_ENDS
from ember.reporting.tables import ALL, SHOWN
from ember.store.files import write_text
from ember.store.paths import REPOSITORY, notebooks_dir


def readme_tables() -> dict[str, str]:
    """The README's generated blocks: main results, notebooks with run times, benchmarks, default settings."""
    laptop, full = _tables("laptop"), _tables("full")
    return {
        "overview": _csv(laptop / "overview.csv", without=("concept", "runs")),
        "full": _csv(full / "overview.csv", only={"concept": ALL}, without=("chosen on train",)),
        "full_hours": _hours(full),
        "effect": _effects(full / "ember_effect.csv"),
        "notebooks": _notebooks(laptop / "run_times.csv"),
        "benchmarks": _benchmarks(REPOSITORY / "results" / "benchmarks.csv"),
        "settings": _settings(load_profile("laptop")),
        "total": f"{busy_seconds(pd.read_csv(laptop / 'run_times.csv')) / 60:.0f} minutes",
    }


def results_tables() -> dict[str, str]:
    """The generated blocks of docs/results.md: relearning, localization, controls, stability, arrival."""
    laptop, full, attacks, controls = map(_tables, ("laptop", "full", "attacks", "controls"))
    recipe = ("concept", "attack", "precision", "lr", "runs")
    one = {"concept": ALL, "attack": "all", "precision": "bf16_master", "lr": "0.0001"}
    single = "question in ['left after relearning', 'cost at equal erasure'] or measure == 'final score'"
    return {
        "headline": _csv(laptop / "headline.csv", without=("concept", "cell")),
        "relearning": _csv(laptop / "relearning_overview.csv", without=recipe),
        "attacks": _csv(attacks / "relearning_overview.csv", only=one),
        "attacks_hours": _hours(attacks),
        "precision": _titled(_everywhere(attacks / "precision.csv").rename(columns=LIKELIHOOD_ENDS), {
            "arm": "arm", "lr": ("lr", "g"), "tokens": ("tokens", ".0f"), "precision": "precision",
            "weights that changed": ("changed", ".1%"), "edit undone": ("travelled", ".3%"),
            "came back (probability)": ("back", "+.3f"), "came back (nats/char)": ("back_logprob", "+.4f"),
        }),
        "localization": _localized(laptop / "localization.csv"),
        "controls_hours": _hours(controls),
        "verdicts": _titled(pd.read_csv(controls / "verdicts.csv").query(single), {
            "question": "question", "beside": "beside", "measure": "measure",
            "difference from EMBER": ("difference", "+.3f"), "better": "better",
        }),
        "strengths": _beside_ember(full / "strengths.csv", "gain", across="delta", title="delta={:g}"),
        "trade": _beside_ember(controls / "trade.csv", "area", across="cost", title="against {}"),
        "stability": _titled(_everywhere(controls / "stability.csv"), {
            "what differs": "varied", "pairs of fits": "pairs", "same feature selected again": ("returned", ".0%"),
            "absolute cosine of the two": ("cosine", ".2f"), "share of all features found again": ("same", ".2f"),
            "overlap of edited rows": ("rows_jaccard", ".2f"),
        }),
        "arrival": _arrivals(full),
    }  # fmt: skip


def paper_tables() -> dict[str, str]:
    """The generated blocks of docs/paper-scale.md: what the profiles take, as they say, and what was measured here."""
    needs = {f"`{name}`": load_profile(name).needs for name in ("paper-gemma", "paper-llama")}
    speed = pd.read_csv(_tables("attacks") / "relearning_speed.csv")
    speed = speed[(speed.attack == "all") & (speed.lr == 1e-4)].groupby("precision").tokens_per_second.median()
    measured = pd.DataFrame({"precision": speed.index, "trained tokens a second": speed.map("{:.0f}".format)})
    return {"needs": markdown(pd.DataFrame(needs.items(), columns=["profile", "needs"])), "speed": markdown(measured)}


def _tables(profile: str) -> Path:
    """Where the committed tables of a profile are, wherever a run now would write."""
    return REPOSITORY / "results" / profile / "tables"


def _everywhere(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    return table[table.concept == ALL]


def _hours(tables: Path) -> str:
    return f"{busy_seconds(pd.read_csv(tables / 'run_times.csv')) / 3600:.1f} hours"


def _titled(table: pd.DataFrame, columns: Mapping[str, str | tuple[str, str]]) -> str:
    """Columns under their titles as Markdown, as they stand or in a form, with their intervals."""
    texts = {title: table[c] if isinstance(c, str) else interval_texts(table, *c) for title, c in columns.items()}
    return markdown(pd.DataFrame(texts))


def _csv(path: Path, *, only: Mapping[str, str] | None = None, without: Sequence[str] = ()) -> str:
    """A CSV table as it stands: its rows with the values of ``only``, but for columns that say the same in each."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column, value in (only or {}).items():
        table = table[table[column] == value]
    for column in without:
        if len(set(table[column])) > 1:
            raise EmberError(f"{path}: column {column!r} is not the same in every row")
    return markdown(table.drop(columns=[*(only or {}), *without]))


def _notebooks(run_times: Path) -> str:
    runs, rows = pd.read_csv(run_times), []
    for path in sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb")):
        shows = json.loads(path.read_text(encoding="utf-8"))["metadata"]["ember"]["shows"]
        mine = runs[runs.notebook == path.stem]
        took = (len(mine), f"{mine.wall_seconds.max():.0f} s", f"{mine.peak_memory_mb.max() / 1024:.1f} GB")
        rows.append((f"[`{path.stem}`](notebooks/{path.name})", shows, *(took if len(mine) else [MISSING] * 3)))
    return markdown(pd.DataFrame(rows, columns=["notebook", "shows", "runs", "run time, at most", "peak memory"]))


def _settings(profile: Profile) -> str:
    """Every plain setting of every method, its default and what the profile uses, as Markdown."""
    rows = []
    for name, method in METHODS.items():
        if name != "ember" and method.config is EmberConfig:  # shares the settings of EMBER
            continue
        used = {**profile.grids.get(name, {}), **(dict(profile.fit) if name in profile.factorizing else {})}
        for setting in fields(method.config):
            if not is_dataclass(setting.default):
                shown = used.get(setting.name, setting.default)
                shown = " · ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
                rows.append((name, f"`{setting.name}`", str(setting.default), shown))
    return markdown(pd.DataFrame(rows, columns=["method", "setting", "default", f"{profile.name} profile"]))


def _effects(path: Path) -> str:
    table = _everywhere(path)
    wide = table.assign(text=interval_texts(table)).pivot(index="method", columns="metric", values="text")[list(SHOWN)]
    return markdown(wide.rename(columns=SHOWN, index=lambda method: Arm(method).name).reset_index())


def _localized(path: Path) -> str:
    """KL before the first edited token and after one, by texts and arm, as Markdown."""
    table, rows = pd.read_csv(path), []
    for (method, ember, texts), part in table.groupby(["method", "ember", "set"], sort=False):
        kl = dict(zip(part.group, interval_texts(part, "kl", ".3f"), strict=True))
        share = part.share_of_tokens[part.group == EXPOSED[1]].sum()
        rows.append((LABELS[texts], f"{share:.0%}", Arm(method, ember).name, *(kl.get(g, MISSING) for g in EXPOSED)))
    columns = ["texts", "tokens after an edited one", "arm", *(f"KL {group}" for group in EXPOSED)]
    return markdown(pd.DataFrame(rows, columns=columns).sort_values("texts", kind="stable"))


def _beside_ember(path: Path, value: str, *, across: str, title: str) -> str:
    """EMBER's values, and for other edits the difference from them, by what column ``across`` says, as Markdown."""
    table = _everywhere(path)
    own, gaps = interval_texts(table, value, ".3f"), interval_texts(table, "difference", "+.3f")
    text = [mine if edit == "EMBER" else gap for edit, mine, gap in zip(table.edit, own, gaps, strict=True)]
    wide = table.assign(text=text).pivot(index="edit", columns=across, values="text")
    wide = wide.loc[table.edit.unique(), table[across].unique()]
    return markdown(wide.rename(columns=title.format).reset_index())


def _arrivals(tables: Path) -> str:
    """Where erasing what was taught arrives, and what it does to the taught copy otherwise, as Markdown."""
    table, damage = pd.read_csv(tables / "arrival.csv"), pd.read_csv(tables / "taught_damage.csv")
    likely, damage = table[table.metric == "gold_prob"], damage[damage.reference == "taught"]
    general = damage[(damage.set == "general") & (damage.metric == "gold_prob")]
    shown = {"arm": arm_names(likely), "cell": likely.cell}
    for title, frame, column, form in (
        ("arrival (probability)", likely, "share", ".2f"),
        ("arrival (log-likelihood)", table[table.metric == "gold_logprob"], "share", ".2f"),
        ("general knowledge (probability)", general, "change", "+.2f"),
        ("neutral text, loss (nats/token)", damage[damage.set == "neutral"], "change", "+.2f"),
    ):
        texts = dict(zip(arm_names(frame), interval_texts(frame, column, form), strict=True))
        shown[title] = [texts[arm] for arm in shown["arm"]]
    return markdown(pd.DataFrame(shown))


def _benchmarks(path: Path) -> str:
    table = pd.read_csv(path)
    for side in ("ours", "theirs"):
        table[side] = (table[side].map("{:.3g} ".format) + table.unit).where(table[side].notna(), MISSING)
    target = table.target.map("{:g}".format)
    table["target"] = ("≥ " + target).where(table.ratio.notna(), "≤ " + target + " " + table.unit)
    columns = {"work": "work", "compared with": "compared_with", "this package": "ours", "that": "theirs"}
    return _titled(table, {**columns, "ratio": ("ratio", ".1f"), "target": "target"})


PAGES: Mapping[str, Callable[[], Mapping[str, str]]] = {
    "README.md": readme_tables,
    "docs/results.md": results_tables,
    "docs/paper-scale.md": paper_tables,
}


def render_page(page: str, text: str) -> str:
    """The text of a page of ``PAGES`` with its generated blocks renewed."""
    return fill_blocks(text, PAGES[page]())


if __name__ == "__main__":
    for name in PAGES:
        path = REPOSITORY / name
        write_text(path, render_page(name, path.read_text(encoding="utf-8")))
