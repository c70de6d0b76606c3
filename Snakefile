"""Runs a profile's notebooks: `snakemake --cores 2 --config profile=laptop`.

Each rule executes one notebook through papermill and is done when the run's manifest is there. A run is repeated when
its parameters, its code (not its prose), what it reads of the profile or the runs it needs have changed. On a Slurm
cluster each run is one job: `snakemake --profile cluster/slurm --config profile=paper-gemma`.
"""

import shlex
import sys
from json import dumps

from pydantic_core import to_jsonable_python

from ember.batch import planning
from ember.batch.notebooks import code_hash
from ember.batch.planning import frame_path, manifest_path, plan
from ember.batch.profiles import load_profile
from ember.judging.settings import deciding
from ember.models.specs import find_spec
from ember.store.files import digest, sha256_of
from ember.store.paths import data_dir, results_dir

PROFILE = load_profile(config.get("profile", "laptop"))
JOBS = {job.name: job for job in plan(PROFILE)}
CELLS = {method: PROFILE.cells(method) for method in PROFILE.grids}
NOTEBOOKS = sorted({job.notebook for job in JOBS.values()})
MODEL = str(results_dir(PROFILE.name) / "records" / "model.json")

# Two notebooks at a time: while one starts up, or waits on a single thread, the other computes.
# A cluster has no number of cores; there the profile sets the threads.
THREADS = max(1, (workflow.resource_settings.cores or 1) // 2)
# What a cluster reserves, set by hand: every further attempt gets as much again. A model that comes in a package is
# small and takes no GPU.
SMALL = find_spec(PROFILE.model).origin == "wheel"
MEMORY_MB, MINUTES = 8_000 if SMALL else 48_000, 240
# Whatever the texts are, a change of one of them changes the results.
DATA = digest(*(sha256_of(path) for path in sorted(data_dir().rglob("*")) if path.suffix in (".txt", ".json", ".jsonl")))
if PROFILE.source != "ours":
    DATA = digest(DATA, PROFILE.source)
PYTHON = shlex.quote(sys.executable)


def stem(notebook):
    """Name of a rule's runs: `run` stands for the parameters, which the report has none of."""
    return notebook if notebook in JOBS else f"{notebook}__{{run}}"


def of_job(notebook, value):
    """A value of the rule's run, worked out when its wildcards are known."""
    return lambda wildcards: value(JOBS["__".join([notebook, *wildcards])])


def needs(job):
    return [str(manifest_path(PROFILE.name, name)) for name in job.needs]


def reads(job):
    """The parts of the profile that decide a run's results, besides its parameters."""
    parts = {
        planning.FACTORIZE: [PROFILE.fit],
        planning.ERASE: [CELLS.get(job.parameters.get("method")), PROFILE.sizes, deciding(PROFILE.judge)],
        planning.RELEARN: [PROFILE.relearn.settings, PROFILE.sizes],
        planning.LOCALIZE: [PROFILE.localize],
        planning.CONTROL: [PROFILE.trade, PROFILE.fit],
        planning.STABILITY: [PROFILE.stability, PROFILE.fit],
        planning.TEACH: [PROFILE.teach, CELLS],
    }
    return dumps(to_jsonable_python(parts.get(job.notebook)), sort_keys=True)


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


for notebook in NOTEBOOKS:

    rule:
        name:
            notebook.split("_", 1)[1]
        input:
            ancient(MODEL),
            of_job(notebook, needs),
        output:
            str(manifest_path(PROFILE.name, stem(notebook))),
            [str(frame_path(PROFILE.name, stem(notebook), frame)) for frame in planning.FRAMES.get(notebook, ())],
        priority: int(notebook in (planning.FACTORIZE, planning.SELECT))  # much waits for them
        params:
            notebook=notebook,
            settings=of_job(notebook, lambda job: dumps(dict(job.parameters), sort_keys=True)),
            reads=of_job(notebook, reads),
            code=code_hash(notebook),
            data=DATA,
        threads: THREADS
        resources:
            gpu=int(not SMALL and notebook != planning.REPORT),
            mem_mb=lambda wildcards, attempt: MEMORY_MB * attempt,
            runtime=lambda wildcards, attempt: MINUTES * attempt,
        # Compute nodes have no connection: what comes from the Hub was fetched by the one rule before.
        shell:
            f"HF_HUB_OFFLINE=1 TQDM_DISABLE=1 {PYTHON} -m ember run-notebook {{params.notebook}} {{params.settings:q}}"
