"""What a notebook opens and saves: the run's name, its caches, its records with provenance, its labelled frames."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny import NEUTRAL, make_concept, make_loaded

from ember.batch import run as module
from ember.batch.records import RECORD_COLUMNS, read_runs
from ember.batch.run import Run
from ember.data.arms import Arm
from ember.data.types import Instruction, SharedData
from ember.editing import Edit, Provenance
from ember.errors import DamagedFileError, EmberError
from ember.evaluation.evaluate import evaluate
from ember.evaluation.metrics import compare
from ember.evaluation.suite import Sizes
from ember.methods.ember import EmberConfig

SUMMARY = pd.DataFrame(
    {
        "set": ["concept", ""], "metric": ["accuracy", "final"], "value": [0.5, math.nan], "ci_low": [0.4, math.nan],
        "ci_high": [0.6, math.nan], "n": [20, 80],
    }
)  # fmt: skip


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    return tmp_path


def opened(notebook: str = "03_erase_concept", *, seed: int = 0, **parameters) -> Run:
    """A run of the smoke profile on a tiny model and concept."""
    named = {"model": "tiny", "concept_name": "Tiny Rome", "method": "ember", "ember": False, "seed": 42, **parameters}
    run = Run(notebook, profile="smoke", **named)
    run.loaded, run.concept = make_loaded(seed=seed), make_concept()
    return run


def test_the_name_holds_the_parameters():
    """The concept is a Concept in a notebook and ``concept_name`` its name; files keep the short key."""
    assert opened().name == "03_erase_concept__model=tiny__concept=tiny-rome__method=ember__ember=False__seed=42"


# Records


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> pd.DataFrame:
    run = opened(method="rmu", ember=True)
    config = EmberConfig(delta=2.0, rank=8)
    return run.records(SUMMARY, config=config, cell="delta=2", split="test", seconds=1.5)


def test_records_hold_where_they_come_from_and_missing_values_are_nan(records):
    assert tuple(records.columns) == RECORD_COLUMNS and len(records) == len(SUMMARY)
    first = records.iloc[0]
    assert (first.model, first.weights_hash, first["dtype"]) == ("tiny-llama", make_loaded().weights_hash, "float32")
    assert (first.profile, first.concept, first.method, first.seed) == ("smoke", "Tiny Rome", "rmu", 42)
    assert (first.split, first.wall_seconds, first.ember) == ("test", 1.5, True)
    assert (records.cell == "delta=2").all()
    assert first.device.startswith("cpu")
    assert json.loads(first.versions)["torch"] == torch.__version__
    config = json.loads(first.config)
    assert (config["delta"], config["rank"], config["side"]) == (2.0, 8, "input")
    assert config.keys() == vars(EmberConfig()).keys()
    assert records[["value", "ci_low"]].isna().to_numpy().tolist() == [[False, False], [True, True]]
    assert records.effect_size.isna().all()
    measured = {"value", "ci_low", "ci_high", "effect_size"}
    assert records[[c for c in RECORD_COLUMNS if c not in measured]].notna().all().all()


def test_records_of_another_arm_seed_and_model():
    other = make_loaded(seed=1)
    given = {"arm": Arm("rmu", True), "seed": 7, "concept": "Atlantis", "loaded": other}
    row = opened().records(SUMMARY, config={"a": 1}, cell="x", split="train", **given).iloc[0]
    assert (row.method, row.ember, row.seed, row.concept) == ("rmu", True, 7, "Atlantis")
    assert row.weights_hash == other.weights_hash and json.loads(row.config) == {"a": 1}
    assert row.wall_seconds >= 0


@pytest.mark.filterwarnings("ignore:The BCa")
def test_records_of_a_comparison():
    """A comparison's summary has every column that ``records`` asks for."""
    sets = {
        **dict.fromkeys(("concept", "simdom", "general"), ("correct", "gold_prob", "gold_logprob")),
        "instruction": ("loss",), "neutral": ("loss", "kl"), "generation": ("gen_loss", "distinct"),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    rows = [(s, str(k), m, rng.random()) for s, metrics in sets.items() for m in metrics for k in range(5)]
    items = pd.DataFrame(rows, columns=["set", "item", "metric", "value"])
    summary = compare(items, items.assign(value=rng.random(len(items))), n_resamples=20).summary
    out = opened().records(summary, config={"a": 1}, cell="a=1", split="train")
    assert len(out) == len(summary) > 0
    assert out[~out.metric.str.startswith("delta_")].effect_size.isna().all()


# Saving


def test_saved_frames_are_labelled(results, records, capsys):
    run = opened("04_relearn", attack="all", precision="fp32", lr=1e-5, budget=1)
    folder = run.save(records=records, curve=pd.DataFrame({"loss": [1.0]}))
    assert folder == results / "smoke" / "records" / run.name
    (curve,) = read_runs("smoke", "04_relearn", "curve").to_dict("records")
    assert curve == {
        "loss": 1.0, "attack": "all", "precision": "fp32", "lr": 1e-5, "budget": 1, "concept": "Tiny Rome",
        "method": "ember", "ember": False, "seed": 42, "run": run.name,
    }  # fmt: skip
    assert tuple(read_runs("smoke", "04_relearn", "records").columns) == (*RECORD_COLUMNS, "run")
    assert "minutes, peak memory" in capsys.readouterr().out
    opened("08_factor_stability").save(labels={"reference": "r"}, fits=pd.DataFrame({"seed": [7]}))
    (fit,) = read_runs("smoke", "08_factor_stability", "fits").drop(columns="run").to_dict("records")
    assert fit == {"seed": 7, "reference": "r"}


# Caches


@pytest.fixture
def suite(monkeypatch) -> list[str]:
    """Small shared data, and the splits that are evaluated from now on."""
    questions = [replace(q, set="general", id=f"g-{q.id}") for q in make_concept().questions if q.set == "concept"]
    instructions = [Instruction(f"i-{split}", split, "Say yes.", "Yes, I do.") for split in ("train", "test")]
    shared = SharedData(tuple(questions), {"train": NEUTRAL, "test": NEUTRAL[:2]}, tuple(instructions), NEUTRAL)
    monkeypatch.setattr("ember.evaluation.suite.load_shared", lambda source: shared)
    done: list[str] = []
    monkeypatch.setattr(module, "evaluate", lambda *a, **k: done.append(a[2]) or evaluate(*a, **k))
    return done


def small(run: Run, **train) -> Run:
    run.suite = run.suite_of(
        train=Sizes(instructions=1, generations=1, new_tokens=2, **train), test=Sizes(generations=0)
    )
    return run


def test_the_base_model_is_evaluated_once_for_all(suite, monkeypatch):
    """In whatever notebook and arm, but for each split, suite, model and code anew."""
    first = small(opened()).base("train")
    again = small(opened("04_relearn", method="rmu")).base("train")
    assert suite == ["train"]
    expected = evaluate(make_loaded(), small(opened()).suite, "train")
    for evaluation in (first, again):
        pd.testing.assert_frame_equal(evaluation.items, expected.items)
        pd.testing.assert_frame_equal(evaluation.samples, expected.samples)
    small(opened()).base("test")
    small(opened(), questions=2).base("train")
    small(opened(seed=1)).base("train")
    monkeypatch.setattr(module, "code_hash", lambda name: f"another {name}")
    small(opened()).base("train")
    assert suite == ["train", "test", "train", "train", "train"]


def test_scores_are_kept_by_weights_code_and_parts():
    computed = []

    def scores() -> pd.DataFrame:
        computed.append(1)
        return pd.DataFrame({"item": ["a"], "value": [0.5]})

    for run, parts in (
        (opened(), ("x",)), (opened(), ("x",)), (opened(), ("y",)), (opened("04_relearn"), ("x",)),
        (opened(seed=1), ("x",)),
    ):  # fmt: skip
        assert run.cached(scores, *parts).value.tolist() == [0.5]
    assert len(computed) == 4
    assert opened().folder("a", "x") != opened().folder("a", "y")
    assert opened().folder("a", "x") == opened().folder("a", "x")


# Saved edits


@pytest.fixture
def an_edit() -> Edit:
    loaded = make_loaded()
    values = {loaded.embedding_name: (torch.tensor([5, 7]), torch.zeros(2, loaded.embedding.shape[1]))}
    return Edit.from_values(loaded, values, Provenance(loaded.name, loaded.weights_hash, "blank", {"delta": 2.0}, 1))


def test_the_edit_of_an_arm_comes_back_and_a_damaged_one_is_named(results, an_edit):
    run = opened("05_localize_coherence")
    folder = an_edit.save(results / "smoke" / "edits" / opened().name)
    for arm in (None, Arm("ember")):
        kept = run.saved_edit(arm)
        assert (kept.provenance, kept.identity) == (an_edit.provenance, an_edit.identity)
    with pytest.raises(EmberError, match="run 03_erase_concept") as caught:
        run.saved_edit(Arm("rmu", True))
    missing = opened(method="rmu", ember=True).name
    assert missing in str(caught.value) and str(results / "smoke") in str(caught.value)
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:60]), Path.unlink):
        for file in folder.iterdir():
            damage(file)
        with pytest.raises(DamagedFileError, match=opened().name):
            run.saved_edit()
