"""Batch runs on a cluster: what each job asks for, the Snakemake profile, and that nothing needs a connection."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ember.batch.planning import plan
from ember.batch.profiles import load_profile
from ember.store.paths import REPOSITORY

SNAKEFILE = (REPOSITORY / "Snakefile").read_text(encoding="utf-8")
PROFILE = yaml.safe_load((REPOSITORY / "cluster" / "slurm" / "config.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["paper-gemma", "paper-llama", "smoke"])
def dry(request, tmp_path_factory) -> tuple[str, str]:
    """A profile's name, and what a dry run prints with no connection, no token, no GPU and empty caches."""
    folder = tmp_path_factory.mktemp(request.param)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GEMINI_"))}
    environment |= {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    environment |= {"EMBER_RESULTS": str(folder), "EMBER_CACHE": str(folder), "HF_HOME": str(folder)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds", "--cores", "1"]
    command += ["--config", f"profile={request.param}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.rglob("*.json"))
    return request.param, done.stdout + done.stderr


def test_a_dry_run_lists_one_job_a_run(dry):
    name, text = dry
    jobs = plan(load_profile(name))
    assert re.search(rf"^total +{len(jobs) + 2}$", text, re.M)  # and: fetch, all
    assert text.count(" -m ember run-notebook ") == len(jobs)


def test_each_run_of_a_large_model_asks_for_one_gpu(dry):
    name, text = dry
    asked = re.findall(r"^ +resources: .*\bgpu=(\d), runtime=(\d+), mem_mb=(\d+)", text, re.M)
    runs, large = len(plan(load_profile(name))), name != "smoke"
    assert len(asked) == runs and {int(minutes) for _, minutes, _ in asked} == {240}
    assert {int(memory) for *_, memory in asked} == {48_000 if large else 8_000}
    assert sum(gpu == "1" for gpu, *_ in asked) == (runs - 1) * large  # the report loads no model


def test_a_further_attempt_gets_more():
    """Which a dry run does not show."""
    for name in ("mem_mb", "runtime"):
        assert re.search(rf"^ +{name}=lambda wildcards, attempt: \w+ \* attempt,$", SNAKEFILE, re.M)
    # Retries of a rule are nested in those of the profile, and Slurm's own would start a run beside another.
    assert PROFILE["retries"] > 0 and PROFILE["slurm-no-requeue"] is True
    assert not re.search(r"^ +retries:", SNAKEFILE, re.M)


def test_only_the_fetch_may_need_a_connection(dry):
    name, text = dry
    commands = re.findall(r"^.* -m ember (?!run-notebook).*$", text, re.M)
    assert len(commands) == 1 and re.search(rf" -m ember fetch {name} --record ", commands[0])
    for command in re.findall(r"^.* -m ember run-notebook .*$", text, re.M):
        assert re.search(r"(^|: ) *HF_HUB_OFFLINE=1 TQDM_DISABLE=1 \S+ -m ember run-notebook ", command)
    assert re.search(r"^localrules:\n    all,\n    fetch,$", SNAKEFILE, re.M)


def test_the_cluster_profile_covers_every_rule():
    """Without a number of cores the Snakefile's own threads would be 1 here and half the node's there."""
    rules = {job.notebook.split("_", 1)[1] for job in plan(load_profile("laptop"))}
    assert PROFILE["executor"] == "slurm" and set(PROFILE["set-threads"]) == rules


@pytest.mark.parametrize(("gpu", "gpus"), [(1, " --gpus=1"), (0, "")])
def test_the_sbatch_line(gpu, gpus):
    """What the plugin makes of a run's resources; `snakemake --profile cluster/slurm` submits this."""
    submit = pytest.importorskip("snakemake_executor_plugin_slurm.submit_string", reason="the extra `slurm`")
    utils = pytest.importorskip("snakemake_executor_plugin_slurm.utils")

    class Resources(dict):
        __getattr__ = dict.__getitem__

    job = SimpleNamespace(threads=4, resources=Resources(gpu=gpu, mem_mb=48_000, runtime=240))
    given = {"run_uuid": "u", "slurm_logfile": Path("log"), "comment_str": "c", "account": "", "partition": ""}
    line = submit.get_submit_command(job, given | {"workdir": None}) + utils.set_gres_string(job)
    assert " --mem 48000 " in line and " -t 240 " in line
    assert " --cpus-per-task=4" in line or " --cpus-per-gpu=4" in line
    assert ("--gpus" in line) == bool(gpus) and line.endswith(gpus)
