"""Records with provenance; damaged, missing and half-written result files."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny import make_loaded

from ember.batch.records import (
    RECORD_COLUMNS,
    RunContext,
    nothing_found,
    read_records,
    read_runs,
    save_figure,
    saved_edit,
    write_run,
)
from ember.editing import Edit, Provenance
from ember.errors import DamagedFileError, EmberError
from ember.methods.ember import EmberConfig
from ember.store.frames import write_frame

SUMMARY = pd.DataFrame(
    {
        "set": ["concept", ""],
        "metric": ["accuracy", "final"],
        "value": [0.5, math.nan],
        "ci_low": [0.4, math.nan],
        "ci_high": [0.6, math.nan],
        "effect_size": [math.nan, math.nan],
        "n": [20, 80],
    }
)


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


@pytest.fixture(scope="module")
def records(loaded) -> pd.DataFrame:
    context = RunContext(loaded, "smoke", "Tiny Rome", "ember", False, 42)
    config = EmberConfig(delta=2.0, rank=8)
    return context.records(SUMMARY, config=config, cell="delta=2", split="test", wall_seconds=1.5)


# Records


def test_records_have_exactly_the_columns(records):
    assert tuple(records.columns) == RECORD_COLUMNS
    assert len(records) == len(SUMMARY)


def test_records_hold_where_they_come_from(records, loaded):
    first = records.iloc[0]
    assert (first.model, first.weights_hash, first["dtype"]) == ("tiny-llama", loaded.weights_hash, "float32")
    assert (first.profile, first.concept, first.method, first.seed) == ("smoke", "Tiny Rome", "ember", 42)
    assert (first.split, first.wall_seconds, first.ember) == ("test", 1.5, False)
    assert (records.cell == "delta=2").all()
    assert first.device.startswith("cpu")


def test_records_hold_the_library_versions(records):
    import torch

    assert json.loads(records.versions[0])["torch"] == torch.__version__


def test_records_hold_the_whole_config(records):
    config = json.loads(records.config[0])
    assert (config["delta"], config["rank"], config["side"]) == (2.0, 8, "input")
    assert config.keys() == vars(EmberConfig()).keys()


def test_no_provenance_is_missing(records):
    measured = {"value", "ci_low", "ci_high", "effect_size"}
    assert records[[c for c in RECORD_COLUMNS if c not in measured]].notna().all().all()


@pytest.mark.filterwarnings("ignore:The BCa")
def test_records_of_a_comparison():
    """A comparison's summary has every column that ``records`` asks for."""
    from ember.evaluation.metrics import compare

    sets = {
        **dict.fromkeys(("concept", "simdom", "general"), ("correct", "gold_prob", "gold_logprob")),
        "instruction": ("loss",), "neutral": ("loss", "kl"), "generation": ("gen_loss", "distinct"),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    rows = [(s, str(k), m, rng.random()) for s, metrics in sets.items() for m in metrics for k in range(5)]
    items = pd.DataFrame(rows, columns=["set", "item", "metric", "value"])
    edited = items.assign(value=rng.random(len(items)))
    summary = compare(items, edited, n_resamples=20).summary
    out = RunContext(make_loaded(), "smoke", "x", "ember", True, 1).records(
        summary, config={"a": 1}, cell="a=1", split="train", wall_seconds=0.0
    )
    assert len(out) == len(summary) > 0
    assert out[~out.metric.str.startswith("delta_")].effect_size.isna().all()


# Writing


def test_write_run_names_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    folder = write_run("p", "03_x__seed=1", cells=SUMMARY, items=SUMMARY)
    assert folder == tmp_path / "p" / "records" / "03_x__seed=1"
    assert sorted(p.name for p in folder.iterdir()) == ["cells.parquet", "items.parquet"]


# Reading


def test_record_files_are_put_together(tmp_path, records):
    paths = [write_frame(tmp_path / f"{k}.parquet", records.assign(seed=k)) for k in (2, 1)]
    assert read_records(paths).seed.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("column", ["weights_hash", "cell", "ci_low"])
def test_records_without_a_column_are_refused(tmp_path, records, column):
    path = write_frame(tmp_path / "records.parquet", records.drop(columns=column))
    with pytest.raises(DamagedFileError, match=rf"records\.parquet lacks .*{column}"):
        read_records([path])


def test_one_damaged_file_is_not_left_out(tmp_path, records):
    paths = [write_frame(tmp_path / f"{k}.parquet", records) for k in "ab"]
    paths[1].write_bytes(b"PAR1")
    with pytest.raises(DamagedFileError, match=r"b\.parquet"):
        read_records(paths)


def test_no_records_name_the_command():
    with pytest.raises(FileNotFoundError, match="python -m ember reproduce"):
        read_records([])


def test_no_runs_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m ember reproduce --profile smoke"):
        read_runs("smoke", "03_erase_concept", "records")


def test_runs_are_read_with_their_names(tmp_path, monkeypatch, records):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    for run in ("03_x__seed=1", "03_x__seed=2", "04_y__seed=1"):
        write_run("p", run, records=records, cells=SUMMARY)
    assert read_runs("p", "03_x", "cells").run.unique().tolist() == ["03_x__seed=1", "03_x__seed=2"]
    write_run("p", "03_x__seed=2", records=records.drop(columns="n"))
    with pytest.raises(DamagedFileError, match="lacks the record columns n"):
        read_runs("p", "03_x", "records")


# Saved edits

RUN = "03_erase_concept__concept=tiny-rome__method=ember__ember=False__seed=1"


@pytest.fixture
def an_edit(loaded) -> Edit:
    values = {loaded.embedding_name: (torch.tensor([5, 7]), torch.zeros(2, loaded.embedding.shape[1]))}
    return Edit.from_values(loaded, values, Provenance(loaded.name, loaded.weights_hash, "blank", {"delta": 2.0}, 1))


def test_the_edit_of_a_run_comes_back(tmp_path, monkeypatch, an_edit, loaded):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    an_edit.save(tmp_path / "p" / "edits" / RUN)
    found = saved_edit("p", RUN)
    assert found.provenance == an_edit.provenance
    assert found.identity == an_edit.identity
    with found.applied(loaded):
        assert not loaded.embedding[[5, 7]].any()


@pytest.mark.parametrize(
    ("profile", "run"), [("p", RUN.replace("seed=1", "seed=2")), ("other", RUN), ("p", RUN.replace("ember", "rmu"))]
)
def test_an_edit_that_was_not_saved_names_the_run_and_what_to_do(tmp_path, monkeypatch, an_edit, profile, run):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    an_edit.save(tmp_path / "p" / "edits" / RUN)
    with pytest.raises(EmberError, match="run 03_erase_concept") as caught:
        saved_edit(profile, run)
    assert run in str(caught.value) and str(tmp_path / profile) in str(caught.value)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated"])
def test_a_damaged_saved_edit_is_named(tmp_path, monkeypatch, an_edit, damage):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    folder = an_edit.save(tmp_path / "p" / "edits" / RUN)
    for file in folder.iterdir():
        file.unlink() if damage == "empty" else file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DamagedFileError, match=RUN):
        saved_edit("p", RUN)


# Figures


def test_figures_are_the_same_bytes_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    seen = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3], label="line")
        axes.fill_between([0, 1], [0, 1], hatch="/", label="area")
        axes.legend()
        save_figure(figure, "p", "curve")
        plt.close(figure)
        seen.append({p.name: p.read_bytes() for p in (tmp_path / "p" / "figures").iterdir()})
    assert seen[0] == seen[1]
    assert seen[0].keys() == {"curve.png", "curve.svg"}


def test_a_run_that_found_nothing_is_listed_and_left_out(tmp_path, monkeypatch):
    """Its frames are empty files; an empty file without that note is damaged."""
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    for seed in (1, 2):
        write_run("p", f"03_x__seed={seed}", cells=pd.DataFrame({"cell": [f"c{seed}"]}))
    (tmp_path / "p" / "records" / "03_x__seed=2" / "cells.parquet").write_text("")
    folder = tmp_path / "p" / "notebooks"
    folder.mkdir()
    (folder / "03_x__seed=1.json").write_text('{"notebook": "03_x"}')
    with pytest.raises(DamagedFileError, match="seed=2"):
        read_runs("p", "03_x", "cells")
    (folder / "03_x__seed=2.json").write_text('{"notebook": "03_x", "nothing_found": "no feature"}')
    assert read_runs("p", "03_x", "cells").cell.tolist() == ["c1"]
    assert nothing_found("p").to_dict("list") == {"run": ["03_x__seed=2"], "reason": ["no feature"]}
