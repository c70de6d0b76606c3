"""What each command of the command line does; imports are deferred, so that each loads only what it needs."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from ember.errors import EmberError


def reproduce(options: argparse.Namespace) -> int:
    """Run a profile's notebooks and write its tables and figures."""
    from ember.batch.preflight import require_ready
    from ember.batch.profiles import load_profile
    from ember.batch.times import describe, write_run_times
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


def preflight(options: argparse.Namespace) -> int:
    """Tell what a profile's run would miss here."""
    from ember.batch import preflight as checks
    from ember.batch.profiles import load_profile

    profile = load_profile(options.profile)
    found = checks.preflight(profile)
    for finding in found:
        print(finding)
    obstacles = sum(finding.fatal for finding in found)
    print(f"{obstacles} missing (marked !)" if obstacles else f"profile {profile.name}: ready to run here")
    return int(obstacles > 0)


def run_notebook(options: argparse.Namespace) -> int:
    """Run one notebook as a batch job."""
    from ember.batch import runner

    try:
        parameters = json.loads(options.parameters)
    except ValueError as error:
        raise EmberError(f"the parameters are not JSON: {error}") from error
    if not isinstance(parameters, dict):
        raise EmberError(f"the parameters must be a JSON object, got {options.parameters}")
    manifest = runner.run_notebook(options.notebook, parameters, progress=sys.stderr.isatty())
    about = json.loads(manifest.read_text(encoding="utf-8"))
    print(f"{manifest.stem}: {about['wall_seconds']:.0f} s")
    if "nothing_found" in about:
        print(f"nothing to edit: {about['nothing_found']}")
    return 0


def fetch_model(options: argparse.Namespace) -> int:
    """Download and convert a model."""
    from ember.models.weights import fetch_model

    fetch_model(options.model, force=options.force)
    print(f"{options.model}: ready")
    return 0


def fetch(options: argparse.Namespace) -> int:
    """Fetch all that a profile reads, so that its runs need no connection."""
    from ember.batch.prefetch import prefetch
    from ember.batch.profiles import load_profile

    profile = load_profile(options.profile)
    prefetch(profile, Path(options.record) if options.record else None)
    print(f"{profile.name}: {profile.model} and data are ready; the runs need no connection")
    return 0


def plan(options: argparse.Namespace) -> int:
    """List a profile's runs, and how long each took when it was last measured."""
    from ember.batch.profiles import load_profile
    from ember.batch.times import describe

    print(describe(load_profile(options.profile)))
    return 0


def _load(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from ember.data.ours import load_concept
    from ember.methods.ember import EmberConfig
    from ember.models.loading import load_model

    concept = load_concept(options.concept or "", folder=options.folder)
    features = tuple(options.features) if options.features else None
    config = EmberConfig(delta=options.delta, rank=options.rank, threshold=options.threshold, features=features)
    return load_model(options.model), concept, config


def preview(options: argparse.Namespace) -> int:
    """List the embedding rows that an EMBER edit would change."""
    from ember.methods.ember import preview as changed_rows

    loaded, concept, config = _load(options)
    rows = changed_rows(loaded, concept, config, seed=options.seed)
    print(rows.to_string(index=False, float_format="%.2f"))
    print(f"{len(rows)} rows would change; {rows.ordinary.mean():.0%} of them belong to ordinary words")
    return 0


def erase(options: argparse.Namespace) -> int:
    """Make an EMBER edit and save it."""
    from ember.methods import METHODS

    loaded, concept, config = _load(options)
    edit = METHODS["ember"].run(loaded, concept, config, seed=options.seed)
    folder = edit.save(options.output)
    print(f"{len(edit.changed())} rows of {loaded.name} edited; saved in {folder}")
    return 0


def import_features(options: argparse.Namespace) -> int:
    """Turn a published factorization (a pickle) into safetensors."""
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


def check_data(options: argparse.Namespace) -> int:
    """Check all concepts, or one folder, for leaks, sizes and format."""
    from ember.evaluation import data_checks
    from ember.models.loading import load_model

    source = "released" if options.released else "ours"
    loaded = None if options.no_model else load_model(options.model)
    reports = data_checks.check_data(options.folder, source=source, loaded=loaded)
    print(data_checks.check_table(reports).to_string(index=False))
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


def fetch_data(options: argparse.Namespace) -> int:
    """Download the data that the paper's authors released."""
    from ember.data.released import COMMIT, fetch_released, list_released

    folder = fetch_released()
    print(f"released data at {COMMIT[:7]}: {', '.join(list_released(folder))}")
    if options.shared:
        from ember.data.mmlu_alpaca import fetch_shared_sets

        asked = {"mmlu": options.mmlu, "alpaca": options.alpaca}
        _, commits = fetch_shared_sets({name: revision for name, revision in asked.items() if revision})
        print("; ".join(f"{name} at {commit}" for name, commit in commits.items()))
    return 0


def refresh_notebooks(options: argparse.Namespace) -> int:
    """Execute notebooks in place, keep their checked outputs."""
    from ember.batch.notebooks import list_notebooks
    from ember.batch.runner import refresh_outputs

    for name in options.notebooks or list_notebooks():  # the report, which reads what all others write, is the last
        refresh_outputs(name)
        print(f"{name}: checked outputs refreshed")
    return 0


def update_readme(_: argparse.Namespace) -> int:
    """Write the measured tables into README.md."""
    from ember.batch.pages import update_readme

    update_readme()
    return 0
