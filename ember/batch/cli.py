"""The command line: ``python -m ember COMMAND``. Each command imports what it needs, and nothing before that."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ember
from ember.errors import EmberError
from ember.store.paths import results_dir

Command = Callable[[argparse.Namespace], int | None]
_PARSER = argparse.ArgumentParser(prog="python -m ember", description="Erase a concept from a language model.")
_COMMANDS = _PARSER.add_subparsers(required=True, metavar="COMMAND")


def _argument(name: str, help: str | None = None, **options: Any) -> tuple[str, dict[str, Any]]:
    return name, {"help": help, **options}


def _command(*arguments: tuple[str, dict[str, Any]]) -> Callable[[Command], Command]:
    """Make a function the command of its name; its docstring is the help, what it returns the exit status."""

    def add(run: Command) -> Command:
        command = _COMMANDS.add_parser(run.__name__.replace("_", "-"), help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        for name, options in arguments:
            command.add_argument(name, **options)
        return run

    return add


def _profile(name: str) -> Any:
    from ember.batch.profiles import load_profile

    return load_profile(name)


_PROFILE = _argument("--profile", type=_profile, default="laptop")


@_command(_PROFILE, _argument("--dry-run", "only list what would run", action="store_true"),
          _argument("--no-preflight", "where the notebooks run on other machines", action="store_true"))  # fmt: skip
def reproduce(options: argparse.Namespace) -> int:
    """Run a profile's notebooks and write its tables and figures."""
    from ember.batch import runner
    from ember.batch.preflight import require_ready
    from ember.batch.times import describe, write_run_times
    from ember.judging.client import open_judge

    print(describe(options.profile), flush=True)
    if options.dry_run:
        return runner.run_profile(options.profile, "--dry-run")
    for finding in [] if options.no_preflight else require_ready(options.profile):
        print(finding, flush=True)
    open_judge(options.profile.judge)  # a required one that does not answer stops the run here
    code = runner.run_profile(options.profile)
    if code:
        print(f"stopped; what finished is kept. Run the same command again to go on (exit {code}).", file=sys.stderr)
        return code
    write_run_times(options.profile)
    print(f"tables and figures: {os.path.relpath(results_dir(options.profile.name))}")
    return 0


@_command(_PROFILE)
def preflight(options: argparse.Namespace) -> int:
    """Tell what a profile's run would miss here."""
    from ember.batch import preflight as checks

    found = checks.preflight(options.profile)
    for finding in found:
        print(finding)
    obstacles = sum(finding.fatal for finding in found)
    print(f"{obstacles} missing (marked !)" if obstacles else f"profile {options.profile.name}: ready to run here")
    return int(obstacles > 0)


@_command(_PROFILE)
def plan(options: argparse.Namespace) -> None:
    """List a profile's runs, and how long each took when it was last measured."""
    from ember.batch.times import describe

    print(describe(options.profile))


@_command(_argument("profile", type=_profile), _argument("--record", argparse.SUPPRESS, type=Path))
def fetch(options: argparse.Namespace) -> None:
    """Fetch all that a profile reads, so that its runs need no connection."""
    from ember.batch.prefetch import prefetch

    prefetch(options.profile, options.record)
    print(f"{options.profile.name}: {options.profile.model} and data are ready; the runs need no connection")


_EDIT = (
    _argument("concept", "a concept of the data folder", nargs="?", default=""),
    _argument("--folder", "a folder with your own concept instead"),
    _argument("--model", default="smollm2-135m"),
    _argument("--delta", "edit strength (default 1)", type=float, default=1.0),
    _argument("--rank", type=int, default=300),
    _argument("--threshold", "selection threshold in bits (default 0.6)", type=float),
    _argument("--features", "feature numbers, instead of the threshold", type=int, nargs="+", default=()),
    _argument("--seed", type=int, default=42),
)


def _chosen(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, concept and settings of an edit."""
    concept = ember.load_concept(options.concept, folder=options.folder)
    chosen = {name: getattr(options, name) for name in ("delta", "rank", "threshold")}
    config = ember.METHODS["ember"].config(**chosen, features=tuple(options.features) or None)
    return ember.load_model(options.model), concept, config


@_command(*_EDIT)
def preview(options: argparse.Namespace) -> None:
    """List the embedding rows that an EMBER edit would change."""
    rows = ember.preview(*_chosen(options), seed=options.seed)
    print(rows.to_string(index=False, float_format="%.2f"))
    print(f"{len(rows)} rows would change; {rows.ordinary.mean():.0%} of them belong to ordinary words")


@_command(*_EDIT, _argument("--output", "folder for the edit", required=True))
def erase(options: argparse.Namespace) -> None:
    """Make an EMBER edit and save it."""
    loaded, concept, config = _chosen(options)
    edit = ember.METHODS["ember"].run(loaded, concept, config, seed=options.seed)
    print(f"{len(edit.changed())} rows of {loaded.name} edited; saved in {edit.save(options.output)}")


def _role(pair: str) -> list[str]:
    if "=" not in pair:
        raise EmberError(f"--field needs ROLE=NAME, got {pair!r}")
    return pair.split("=", 1)


@_command(_argument("file"), _argument("--model", required=True), _argument("--concept", required=True),
          _argument("--source", "whose texts of the concept: released (default) or ours", default="released"),
          _argument("--folder", "where these texts are, if not fetched"),
          _argument("--field", "which field is F, G or tokens (repeatable)", metavar="ROLE=NAME", type=_role,
                    action="append", default=[]),
          _argument("--class", "full name of a class whose attributes may be read (repeatable); it is not imported",
                    metavar="NAME", dest="classes", action="append", default=[]),
          _argument("--output", "folder for features.safetensors and features.json", required=True))  # fmt: skip
def import_features(options: argparse.Namespace) -> None:
    """Turn a published factorization (a pickle) into safetensors."""
    from ember.methods.published import CLASSES, import_published

    concept = ember.load_concept(options.concept, folder=options.folder, source=options.source)
    fields, classes = dict(options.field), (*CLASSES, *options.classes)
    features = import_published(options.file, ember.load_model(options.model), concept, fields=fields, classes=classes)
    folder = features.save(options.output)
    imported = features.settings["imported"]
    print(features.scores.head(10).to_string(index=False, float_format="%.2f"))
    print(f"{features.settings['rank']} features of {len(features.table)} tokens; saved in {folder}")
    print(f"they explain {imported['explained']:.0%} of the rows; {len(imported['unseen'])} tokens not in the texts")


@_command(_argument("folder", "a folder with your own concept", nargs="?"),
          _argument("--released", "the authors' data instead (in the folder, or fetched)", action="store_true"),
          _argument("--model", "for the guesses after an empty question", default="smollm2-135m"),
          _argument("--no-model", "leave out the checks that need a model", action="store_true"),
          _argument("--all", "print every finding", action="store_true"))  # fmt: skip
def check_data(options: argparse.Namespace) -> int:
    """Check all concepts, or one folder, for leaks, sizes and format."""
    from ember.evaluation import data_checks

    loaded = None if options.no_model else ember.load_model(options.model)
    source = "released" if options.released else "ours"
    reports = data_checks.check_data(options.folder, source=source, loaded=loaded)
    print(data_checks.check_table(reports).to_string(index=False))
    for check, found in (group for report in reports for group in report.findings.groupby("check", sort=False)):
        shown = found if options.all else found.head(5)
        print(f"\n{found.subject.iloc[0]}: {check} ({len(found)})")
        print(*(f"  {row.where}: {row.what}" for row in shown.itertuples()), sep="\n")
        if len(shown) < len(found):
            print(f"  … {len(found) - len(shown)} more; --all shows them")
    failed = sum(int((~report.table.ok).sum()) for report in reports)
    print(f"\n{failed} checks failed (marked !)" if failed else "\nall checks passed")
    return int(failed > 0)


@_command(_argument("--shared", "and MMLU and AlpacaEval, which they choose rows from", action="store_true"),
          _argument("--mmlu", "branch, tag or commit of cais/mmlu (default main)", metavar="REVISION"),
          _argument("--alpaca", "the same of tatsu-lab/alpaca_eval", metavar="REVISION"))  # fmt: skip
def fetch_data(options: argparse.Namespace) -> None:
    """Download the data that the paper's authors released."""
    from ember.data.mmlu_alpaca import fetch_shared_sets
    from ember.data.released import COMMIT, fetch_released, list_released

    print(f"released data at {COMMIT[:7]}: {', '.join(list_released(fetch_released()))}")
    if options.shared:
        asked = {name: value for name in ("mmlu", "alpaca") if (value := getattr(options, name))}
        _, commits = fetch_shared_sets(asked)
        print("; ".join(f"{name} at {commit}" for name, commit in commits.items()))


@_command(_argument("model", nargs="?", default="smollm2-135m"),
          _argument("--force", "discard what is cached", action="store_true"))  # fmt: skip
def fetch_model(options: argparse.Namespace) -> None:
    """Download and convert a model."""
    from ember.models import weights

    weights.fetch_model(options.model, force=options.force)
    print(f"{options.model}: ready")


@_command(_argument("notebook"), _argument("parameters", "JSON object of parameters", nargs="?", default="{}"))
def run_notebook(options: argparse.Namespace) -> None:
    """Run one notebook as a batch job."""
    from ember.batch import runner

    try:
        parameters = json.loads(options.parameters)
    except ValueError as error:
        raise EmberError(f"the parameters are not JSON: {error}") from error
    manifest = runner.run_notebook(options.notebook, parameters)
    about = json.loads(manifest.read_text(encoding="utf-8"))
    print(f"{manifest.stem}: {about['wall_seconds']:.0f} s")
    if "nothing_found" in about:
        print(f"nothing to edit: {about['nothing_found']}")


def main() -> int:
    """Parse the command line and run the command; errors meant for users print without a traceback."""
    try:
        options = _PARSER.parse_args()
        return options.run(options) or 0
    except (EmberError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
