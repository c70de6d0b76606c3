"""Notebooks 01 to 05 on tiny models of the paper's architectures in bfloat16 (the smoke profile: float32)."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import yaml
from helpers.edits import EMBED
from helpers.tokenizers import KINDS, WORDS, planted, save_tiny, tokenizer_of

from ember.batch.planning import Job, plan, run_name
from ember.batch.profiles import load_profile
from ember.editing import Edit
from ember.store.paths import REPOSITORY

RUNS = ("01", "02", "03 ember", "03 ember+rmu", "04 ember", "05 ember")
RUN_ALL = """
import json, sys
from ember.batch.runner import run_notebook
for notebook, parameters in json.loads(sys.argv[1]):
    manifest = json.loads(run_notebook(notebook, parameters).read_text())
    assert "nothing_found" not in manifest, manifest
"""
SMALL = {
    "source": "ours", "concepts": ["Ancient Rome"], "methods": ["ember", "rmu"], "controls": [], "seeds": [42],
    "fit": {"rank": 16, "sparsity": 0.01, "max_iter": 200, "patience": 50},
    "grids": {"ember": {"delta": [1.0, 5.0]}, "rmu": {"layer": 2, "steps": 2, "batch_size": 2, "lr": 1e-2}},
    "sizes": {
        "train": {"questions": 4, "texts": 2, "other_texts": 0, "instructions": 2, "generations": 0,
                  "divergence": False},
        "test": {"questions": 8, "texts": 12, "other_texts": 8, "instructions": 2, "generations": 2, "new_tokens": 4,
                 "letters": True},
    },
    "localize": {"arms": ["ember"], "texts": 8},
    "trade": {"edits": [], "strengths": [], "questions": 1, "texts": 1},
    "stability": {"ranks": [], "sparsities": [], "seeds": [], "precisions": [], "questions": 1},
    "teach": {"arms": [], "tokens": 1, "lr": 0.1, "batch_size": 1, "questions": 1, "texts": 1},
    "judge": {},
}  # fmt: skip
RELEARN = {
    "settings": {"points": [60, 120], "max_tokens": 32, "gradient_checkpointing": True},
    "sweeps": [{"arms": ["ember"], "attacks": ["all"], "lrs": [1e-3], "precisions": ["bf16"]}],
}


def label(job: Job) -> str:
    method, ember = job.parameters.get("method"), job.parameters.get("ember")
    return f"{job.notebook[:2]} {'ember+' if ember else ''}{method}" if method else job.notebook[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results of the notebooks for both architectures, side by side."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "profiles").mkdir()
    for kind in KINDS:
        profile = {"model": save_tiny(root / kind, kind), "dtype": "bfloat16", "relearn": RELEARN, **SMALL}
        (root / "profiles" / f"{kind}.yaml").write_text(yaml.safe_dump(profile))
    os.environ["EMBER_PROFILES"] = str(root / "profiles")
    environment = {
        **os.environ, "EMBER_RESULTS": str(root / "results"), "EMBER_CACHE": str(root / "cache"), "TQDM_DISABLE": "1",
        "EMBER_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("EMBER_SIZES", None)

    def run(kind: str) -> None:
        chosen = [job for job in plan(load_profile(kind)) if label(job) in RUNS]
        jobs = json.dumps([(job.notebook, dict(job.parameters)) for job in chosen])
        command = [sys.executable, "-c", RUN_ALL, jobs]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr[-3000:]

    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, KINDS))
        yield root
    finally:
        del os.environ["EMBER_PROFILES"]


@pytest.fixture(params=KINDS)
def case(request, folder) -> tuple[str, Path]:
    """An architecture, and where its results are."""
    return request.param, folder / "results" / request.param


def frame(results: Path, start: str, name: str, *, method: str = "", ember: bool = False) -> pd.DataFrame:
    middle = f"*__method={method}__ember={ember}__*" if method else "*"
    (path,) = (results / "records").glob(f"{start}_{middle}/{name}.parquet")
    return pd.read_parquet(path)


def edit_of(results: Path, method: str, *, ember: bool) -> Edit:
    return Edit.load(next((results / "edits").glob(f"03_*__method={method}__ember={ember}__*")))


def test_every_notebook_ran_to_its_end_and_its_name_holds_the_folder_of_the_model_once(case):
    kind, results = case
    about = {path.stem: json.loads(path.read_text()) for path in (results / "notebooks").glob("*.json")}
    assert sorted(a["notebook"][:2] for a in about.values()) == ["01", "02", "03", "03", "04", "05"]
    assert all(stem == run_name(a["notebook"], **a["parameters"]) for stem, a in about.items())
    assert all(a["parameters"]["model"].endswith(kind) for a in about.values())


def test_the_planted_feature_is_found_and_its_rows_are_edited_and_kept_by_a_method_after_ember(case):
    kind, results = case
    preview = frame(results, "02", "preview")
    found = set(preview.token.str.strip())
    assert len(found & set(WORDS)) >= 0.5 * len(planted(tokenizer_of(kind)))
    assert (preview.role == "concept").all()
    alone, both = edit_of(results, "ember", ember=False), edit_of(results, "rmu", ember=True)
    assert set(alone.tensors) == {EMBED} < set(both.tensors)
    assert set(alone.changed().row) == set(preview.token_id)
    assert both.rows_of(EMBED) == alone.rows_of(EMBED)


def test_records_say_in_which_precision_and_where(case):
    kind, results = case
    for start, method, ember in (("03", "ember", False), ("03", "rmu", True), ("04", "ember", False)):
        records = frame(results, start, "records", method=method, ember=ember)
        assert set(records.dtype) == {"bfloat16"} and set(records.model) == {kind}
        assert records.device.str.startswith("cpu").all()
    measured = frame(results, "03", "records", method="ember")
    assert {"accuracy", "gold_prob", "letter_valid"} <= set(measured.metric)


def test_relearning_is_measured_at_every_point_and_text_before_an_edit_is_the_base_model_s_to_the_bit(case):
    _, results = case
    items = frame(results, "04", "items", method="ember")
    assert set(items.point) == {0, 1, 2} and items.after.notna().all()
    assert frame(results, "04", "moved", method="ember").changed.iloc[0] > 0.1
    tokens = frame(results, "05", "tokens", method="ember")
    untouched = tokens.before == 0
    assert untouched.any() and (tokens.change[untouched] == 0).all() and (tokens.kl[untouched] == 0).all()
    assert (tokens.change[~untouched] != 0).any()
