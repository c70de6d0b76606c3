"""Runs a profile's notebooks: `snakemake --cores 2 --config profile=laptop`.

Each rule executes one notebook through papermill and is done when the run's manifest is there. A run is repeated when
its parameters, its code (not its prose) or the runs it needs have changed. On a Slurm cluster each run is one job:
`snakemake --profile cluster/slurm --config profile=paper-gemma`.
"""

import shlex
import sys
from json import dumps

from ember.batch.expected import request
from ember.store.files import digest, sha256_of
from ember.judging.settings import deciding
from ember.batch.runner import code_hash
from ember.store.paths import data_dir, results_dir
from ember.batch.planning import FRAMES, plan
from ember.batch.planning import frame_path, manifest_path
from ember.batch.profiles import load_profile

PROFILE = load_profile(config.get("profile", "laptop"))
JOBS = {job.name: job for job in plan(PROFILE)}
MODEL = str(results_dir(PROFILE.name) / "records" / "model.json")


def outputs(notebook):
    stem, frames = f"{notebook}__{{run}}", FRAMES.get(notebook, ())
    return [str(manifest_path(PROFILE.name, stem)), *(str(frame_path(PROFILE.name, stem, f)) for f in frames)]


def needs(notebook):
    return lambda wildcards: [
        str(manifest_path(PROFILE.name, name)) for name in JOBS[f"{notebook}__{wildcards.run}"].needs
    ]


def settings(notebook):
    return lambda wildcards: dumps(dict(JOBS[f"{notebook}__{wildcards.run}"].parameters), sort_keys=True)


def method_of(wildcards):
    return JOBS[f"03_erase_concept__{wildcards.run}"].parameters["method"]


def asked(notebook):
    """What a cluster has to reserve; more memory and time at every further attempt."""

    def reserve(what):
        return lambda wildcards, attempt: getattr(
            request(PROFILE, JOBS["__".join([notebook, *wildcards])], attempt=attempt), what
        )

    return {name: reserve(name) for name in ("gpu", "mem_mb", "runtime")}


# Two notebooks at a time: while one starts up, or waits on a single thread, the other computes.
# A cluster has no number of cores; there the profile sets the threads.
THREADS = max(1, (workflow.resource_settings.cores or 1) // 2)
# Whatever the texts are, a change of one of them changes the results.
DATA = digest(*(sha256_of(path) for path in sorted(data_dir().rglob("*")) if path.suffix in (".txt", ".json", ".jsonl")))
if PROFILE.source != "ours":
    DATA = digest(DATA, PROFILE.source)
PYTHON = shlex.quote(sys.executable)
# Compute nodes have no connection: whatever comes from the Hub was fetched by the one rule before.
RUN = f"HF_HUB_OFFLINE=1 {PYTHON} -m ember run-notebook {{params.notebook}} {{params.settings:q}}"


localrules:
    all,
    fetch,


rule all:
    input:
        [str(manifest_path(PROFILE.name, name)) for name in JOBS],


rule fetch:
    output:
        MODEL,
    params:
        profile=PROFILE.name,
    shell:
        f"{PYTHON} -m ember fetch {{params.profile:q}} --record {{output:q}}"


rule factorize_embeddings:
    input:
        ancient(MODEL),
    output:
        outputs("01_factorize_embeddings"),
    priority: 1  # much waits for it
    params:
        notebook="01_factorize_embeddings",
        settings=settings("01_factorize_embeddings"),
        fit=dumps(dict(PROFILE.fit)),
        code=code_hash("01_factorize_embeddings"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("01_factorize_embeddings"),
    shell:
        RUN


rule select_features:
    input:
        needs("02_select_features"),
    output:
        outputs("02_select_features"),
    priority: 1  # much waits for it
    params:
        notebook="02_select_features",
        settings=settings("02_select_features"),
        code=code_hash("02_select_features"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("02_select_features"),
    shell:
        RUN


rule erase_concept:
    input:
        ancient(MODEL),
        needs("03_erase_concept"),
    output:
        outputs("03_erase_concept"),
    params:
        notebook="03_erase_concept",
        settings=settings("03_erase_concept"),
        grid=lambda wildcards: dumps(
            [PROFILE.cells(method_of(wildcards)), PROFILE.sizes, deciding(PROFILE.judge)], sort_keys=True
        ),
        code=code_hash("03_erase_concept"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("03_erase_concept"),
    shell:
        RUN


rule relearn:
    input:
        ancient(MODEL),
        needs("04_relearn"),
    output:
        outputs("04_relearn"),
    params:
        notebook="04_relearn",
        settings=settings("04_relearn"),
        relearn=dumps([PROFILE.relearn["settings"], PROFILE.sizes], sort_keys=True),
        code=code_hash("04_relearn"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("04_relearn"),
    shell:
        RUN


rule localize_coherence:
    input:
        ancient(MODEL),
        needs("05_localize_coherence"),
    output:
        outputs("05_localize_coherence"),
    params:
        notebook="05_localize_coherence",
        settings=settings("05_localize_coherence"),
        localize=dumps(dict(PROFILE.localize), sort_keys=True),
        code=code_hash("05_localize_coherence"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("05_localize_coherence"),
    shell:
        RUN


rule control_edits:
    input:
        ancient(MODEL),
        needs("06_control_edits"),
    output:
        outputs("06_control_edits"),
    params:
        notebook="06_control_edits",
        settings=settings("06_control_edits"),
        trade=dumps([PROFILE.trade, PROFILE.fit], sort_keys=True),
        code=code_hash("06_control_edits"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("06_control_edits"),
    shell:
        RUN


rule factor_stability:
    input:
        ancient(MODEL),
        needs("08_factor_stability"),
    output:
        outputs("08_factor_stability"),
    params:
        notebook="08_factor_stability",
        settings=settings("08_factor_stability"),
        stability=dumps([PROFILE.stability, PROFILE.fit], sort_keys=True),
        code=code_hash("08_factor_stability"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("08_factor_stability"),
    shell:
        RUN


rule teach_and_erase:
    input:
        ancient(MODEL),
    output:
        outputs("09_teach_and_erase"),
    params:
        notebook="09_teach_and_erase",
        settings=settings("09_teach_and_erase"),
        teach=lambda wildcards: dumps([PROFILE.teach, {arm: PROFILE.cells(arm) for arm in PROFILE.grids}], sort_keys=True),
        code=code_hash("09_teach_and_erase"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("09_teach_and_erase"),
    shell:
        RUN


rule tour:
    input:
        needs("00_tour"),
    output:
        outputs("00_tour"),
    params:
        notebook="00_tour",
        settings=settings("00_tour"),
        code=code_hash("00_tour"),
        data=DATA,
    threads: THREADS
    resources:
        **asked("00_tour"),
    shell:
        RUN


rule report:
    input:
        [str(manifest_path(PROFILE.name, name)) for name in JOBS["10_report"].needs],
    output:
        str(manifest_path(PROFILE.name, "10_report")),
    params:
        notebook="10_report",
        settings=dumps(dict(JOBS["10_report"].parameters)),
        code=code_hash("10_report"),
    threads: THREADS
    resources:
        **asked("10_report"),
    shell:
        RUN
