"""The command line: ``python -m ember COMMAND``."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from ember.errors import EmberError


def _reproduce(options: argparse.Namespace) -> int:
    from ember.batch.around import describe, write_run_times
    from ember.batch.preflight import require_ready
    from ember.batch.profiles import load_profile
    from ember.judging.client import open_judge
    from ember.store.paths import REPOSITORY, results_dir, results_root

    profile = load_profile(options.profile)
    print(describe(profile), flush=True)
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "all",
        "--config", f"profile={profile.name}", "--rerun-triggers", "mtime", "params", "input",
        "--rerun-incomplete", "--nolock", "--keep-going", "--resources", "gpu=1",
    ]  # fmt: skip
    # Snakemake's own notes stand beside the results they are about.
    command += ["--directory", str(results_root())]
    results_root().mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        return subprocess.run([*command, "--dry-run", "--quiet", "rules"], check=False).returncode
    if not options.no_preflight:
        for finding in require_ready(profile):
            print(finding, flush=True)
    open_judge(profile.judge)  # a required one that does not answer stops the run here
    code = subprocess.run([*command, "--quiet", "rules"], check=False).returncode
    if code:
        print(f"stopped; what finished is kept. Run the same command again to go on (exit {code}).", file=sys.stderr)
        return code
    write_run_times(profile)
    print(f"tables and figures: {os.path.relpath(results_dir(profile.name))}")
    return 0


def _preflight(options: argparse.Namespace) -> int:
    from ember.batch.memory import model_shape, needs
    from ember.batch.preflight import preflight
    from ember.batch.profiles import load_profile

    profile = load_profile(options.profile)
    shape = model_shape(profile.model)
    if shape:
        print("GB, about, where the model is on a GPU (GPU + host) or on the CPU:")
        for need in needs(profile, shape):
            print(f"  {need.stage:<50} {need.device:>6.1f} + {need.host:<6.1f} {need.cpu:>6.1f}")
    found = preflight(profile)
    for finding in found:
        print(finding)
    obstacles = sum(finding.fatal for finding in found)
    print(f"{obstacles} missing (marked !)" if obstacles else f"profile {profile.name}: ready to run here")
    return int(obstacles > 0)


def _run_notebook(options: argparse.Namespace) -> int:
    from ember.batch.runner import run_notebook

    try:
        parameters = json.loads(options.parameters)
    except ValueError as error:
        raise EmberError(f"the parameters are not JSON: {error}") from error
    if not isinstance(parameters, dict):
        raise EmberError(f"the parameters must be a JSON object, got {options.parameters}")
    manifest = run_notebook(options.notebook, parameters, progress=sys.stderr.isatty())
    about = json.loads(manifest.read_text(encoding="utf-8"))
    print(f"{manifest.stem}: {about['wall_seconds']:.0f} s, {about['peak_memory_mb']} MB")
    if "nothing_found" in about:
        print(f"nothing to edit: {about['nothing_found']}")
    return 0


def _fetch_model(options: argparse.Namespace) -> int:
    from ember.models.weights import fetch_model

    fetch_model(options.model, force=options.force)
    print(f"{options.model}: ready")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from ember.batch.prefetch import prefetch
    from ember.batch.profiles import load_profile

    profile = load_profile(options.profile)
    prefetch(profile, Path(options.record) if options.record else None, progress=sys.stderr.isatty())
    print(f"{profile.name}: {profile.model} and data are ready; the runs need no connection")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from ember.batch.expected import describe_expected
    from ember.batch.profiles import load_profile

    print(describe_expected(load_profile(options.profile), options.gpu))
    return 0


def _load(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from ember.data.ours import load_concept
    from ember.methods.ember import EmberConfig
    from ember.models.loading import load_model

    concept = load_concept(options.concept or "", folder=options.folder)
    features = tuple(options.features) if options.features else None
    config = EmberConfig(delta=options.delta, rank=options.rank, threshold=options.threshold, features=features)
    return load_model(options.model), concept, config


def _preview(options: argparse.Namespace) -> int:
    from ember.methods.ember import preview

    loaded, concept, config = _load(options)
    rows = preview(loaded, concept, config, seed=options.seed, progress=True)
    print(rows.to_string(index=False, float_format="%.2f"))
    print(f"{len(rows)} rows would change; {rows.ordinary.mean():.0%} of them belong to ordinary words")
    return 0


def _erase(options: argparse.Namespace) -> int:
    from ember.methods import METHODS

    loaded, concept, config = _load(options)
    edit = METHODS["ember"].run(loaded, concept, config, seed=options.seed, progress=True)
    folder = edit.save(options.output)
    print(f"{len(edit.changed())} rows of {loaded.name} edited; saved in {folder}")
    return 0


def _import_features(options: argparse.Namespace) -> int:
    from ember.data.ours import load_concept
    from ember.methods.published import CLASSES, import_published
    from ember.models.loading import load_model

    fields = {}
    for pair in options.field:
        role, equals, name = pair.partition("=")
        if not equals:
            raise EmberError(f"--field needs ROLE=NAME, got {pair!r}")
        fields[role] = name
    concept = load_concept(options.concept, folder=options.folder, source=options.source)
    loaded = load_model(options.model)
    classes = (*CLASSES, *options.classes)
    features = import_published(options.file, loaded, concept, fields=fields, classes=classes)
    folder = features.save(options.output)
    imported = features.settings["imported"]
    print(features.scores.head(10).to_string(index=False, float_format="%.2f"))
    print(f"{features.settings['rank']} features of {len(features.table)} tokens; saved in {folder}")
    print(f"they explain {imported['explained']:.0%} of the rows; {len(imported['unseen'])} tokens not in the texts")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from ember.batch.around import check_data, check_table
    from ember.models.loading import load_model

    source = "released" if options.released else "ours"
    loaded = None if options.no_model else load_model(options.model)
    reports = check_data(options.folder, source=source, loaded=loaded)
    print(check_table(reports).to_string(index=False))
    for report in reports:
        for check, found in report.findings.groupby("check", sort=False):
            shown = found if options.all else found.head(5)
            print(f"\n{found.subject.iloc[0]}: {check} ({len(found)})")
            print("\n".join(f"  {row.where}: {row.what}" for row in shown.itertuples()))
            if len(shown) < len(found):
                print(f"  … {len(found) - len(shown)} more; --all shows them")
    failed = sum(int((~report.table.ok).sum()) for report in reports)
    print(f"\n{failed} checks failed (marked !)" if failed else "\nall checks passed")
    return int(failed > 0)


def _fetch_data(options: argparse.Namespace) -> int:
    from ember.data.released import COMMIT, fetch_released, list_released

    folder = fetch_released()
    print(f"released data at {COMMIT[:7]}: {', '.join(list_released(folder))}")
    if options.shared:
        from ember.data.mmlu_alpaca import fetch_shared_sets

        asked = {"mmlu": options.mmlu, "alpaca": options.alpaca}
        _, commits = fetch_shared_sets({name: revision for name, revision in asked.items() if revision})
        print("; ".join(f"{name} at {commit}" for name, commit in commits.items()))
    return 0


def _refresh_notebooks(options: argparse.Namespace) -> int:
    from ember.batch.runner import list_notebooks, refresh_outputs

    # The report comes last: it reads what all others write.
    for name in options.notebooks or sorted(list_notebooks(), key="10_report".__eq__):
        refresh_outputs(name)
        print(f"{name}: checked outputs refreshed")
    return 0


def _update_readme(_: argparse.Namespace) -> int:
    from ember.batch.pages import update_readme

    update_readme()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ember", description="Erase a concept from a language model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, run, help_):  # type: ignore[no-untyped-def]
        command = commands.add_parser(name, help=help_, description=help_)
        command.set_defaults(run=run)
        return command

    command = add("reproduce", _reproduce, "run a profile's notebooks and write its tables and figures")
    command.add_argument("--profile", default="laptop")
    command.add_argument("--dry-run", action="store_true", help="only list what would run")
    command.add_argument("--no-preflight", action="store_true", help="where the notebooks run on other machines")
    command = add("preflight", _preflight, "tell what a profile's run would miss here, and the memory it takes")
    command.add_argument("--profile", default="laptop")
    command = add("plan", _plan, "list a profile's runs, what each asks a cluster for, and the hours expected")
    command.add_argument("--profile", default="laptop")
    command.add_argument("--gpu", default="a100", help="kind of GPU that the hours are computed for (default a100)")
    command = add("fetch", _fetch, "fetch all that a profile reads, so that its runs need no connection")
    command.add_argument("profile")
    command.add_argument("--record", help=argparse.SUPPRESS)
    for name, run, help_ in (
        ("erase", _erase, "make an EMBER edit and save it"),
        ("preview", _preview, "list the embedding rows that an EMBER edit would change"),
    ):
        command = add(name, run, help_)
        command.add_argument("concept", nargs="?", help="a concept of the data folder")
        command.add_argument("--folder", help="a folder with your own concept instead")
        command.add_argument("--model", default="smollm2-135m")
        command.add_argument("--delta", type=float, default=1.0, help="edit strength (default 1)")
        command.add_argument("--rank", type=int, default=300)
        command.add_argument("--threshold", type=float, help="selection threshold in bits (default 0.6)")
        command.add_argument("--features", type=int, nargs="+", help="feature numbers, instead of the threshold")
        command.add_argument("--seed", type=int, default=42)
        if name == "erase":
            command.add_argument("--output", required=True, help="folder for the edit")
    command = add("import-features", _import_features, "turn a published factorization (a pickle) into safetensors")
    command.add_argument("file")
    command.add_argument("--model", required=True)
    command.add_argument("--concept", required=True)
    command.add_argument("--source", default="released", help="whose texts of the concept: released (default) or ours")
    command.add_argument("--folder", help="where these texts are, if not fetched")
    command.add_argument(
        "--field", action="append", default=[], metavar="ROLE=NAME", help="which field is F, G or tokens (repeatable)"
    )
    command.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME",
        help="full name of a class whose attributes may be read (repeatable); it is not imported",
    )  # fmt: skip
    command.add_argument("--output", required=True, help="folder for features.safetensors and features.json")
    command = add("check-data", _check_data, "check all concepts, or one folder, for leaks, sizes and format")
    command.add_argument("folder", nargs="?", help="a folder with your own concept")
    command.add_argument(
        "--released", action="store_true", help="the authors' data instead (in the folder, or fetched)"
    )
    command.add_argument("--model", default="smollm2-135m", help="for the guesses after an empty question")
    command.add_argument("--no-model", action="store_true", help="leave out the checks that need a model")
    command.add_argument("--all", action="store_true", help="print every finding")
    command = add("fetch-data", _fetch_data, "download the data that the paper's authors released")
    command.add_argument("--shared", action="store_true", help="and MMLU and AlpacaEval, which they choose rows from")
    command.add_argument("--mmlu", metavar="REVISION", help="branch, tag or commit of cais/mmlu (default main)")
    command.add_argument("--alpaca", metavar="REVISION", help="the same of tatsu-lab/alpaca_eval")
    command = add("fetch-model", _fetch_model, "download and convert a model")
    command.add_argument("model", nargs="?", default="smollm2-135m")
    command.add_argument("--force", action="store_true", help="discard what is cached")
    command = add("run-notebook", _run_notebook, "run one notebook as a batch job")
    command.add_argument("notebook")
    command.add_argument("parameters", nargs="?", default="{}", help="JSON object of parameters")
    command = add("refresh-notebooks", _refresh_notebooks, "execute notebooks in place, keep their checked outputs")
    command.add_argument("notebooks", nargs="*")
    add("update-readme", _update_readme, "write the measured tables into README.md")
    return parser


def main() -> int:
    """Parse the command line and run the command; errors meant for users print without a traceback."""
    options = _parser().parse_args()
    try:
        return int(options.run(options))
    except (EmberError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
