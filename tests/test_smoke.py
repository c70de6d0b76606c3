"""The smoke profile through Snakemake and papermill, as `python -m ember reproduce` runs it, with its result files."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from ember.batch.notebooks import list_notebooks, read_notebook
from ember.batch.profiles import load_profile
from ember.editing import Edit
from ember.store.paths import REPOSITORY

ARMS = [("ember", False), ("rmu", False), ("rmu", True), ("random_direction", False)]


def reproduce(results, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "EMBER_RESULTS": str(results), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "ember", "reproduce", "--profile", "smoke", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def results(embedded):
    """One smoke run."""
    folder = REPOSITORY / ".cache" / "results"  # the notebooks' own test reuses its cells
    shutil.rmtree(folder, ignore_errors=True)
    done = reproduce(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Profile smoke" in done.stdout
    return folder / "smoke"


def test_every_notebook_left_a_manifest_and_an_executed_copy(results):
    manifests = sorted((results / "notebooks").glob("*.json"))
    ran = [json.loads(manifest.read_text())["notebook"][:2] for manifest in manifests]
    assert ran == ["00", "01", "02", *["03"] * 4, *["04"] * 4, "05", "05", "06", "08", "09", "10"]
    for manifest in manifests:
        notebook = json.loads(manifest.with_suffix(".ipynb").read_text())
        assert all(c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code")
    times = pd.read_csv(results / "tables" / "run_times.csv")
    assert len(times) == len(manifests)
    assert (times.wall_seconds > 1).all() and (times.peak_memory_mb > 100).all()


def stdout(cell: dict) -> str:
    return "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")


@pytest.mark.parametrize("name", list_notebooks())
def test_checked_cells_print_what_is_committed(results, name):
    """With the defaults of the parameters, as a reader would run them; nbval compares the same cells (`make nbval`)."""
    copies = [json.loads(path.read_text()) for path in (results / "notebooks").glob(f"{name}*.ipynb")]
    committed = [c for c in read_notebook(name)["cells"] if "nbval-check-output" in c["metadata"].get("tags", [])]
    for cell in committed:
        printed = [stdout(c) for copy in copies for c in copy["cells"] if c["id"] == cell["id"]]
        assert stdout(cell) in printed, "".join(cell["source"])


def test_records_hold_provenance_and_no_zero_for_missing(results, monkeypatch):
    from ember.batch.records import RECORD_COLUMNS, read_runs

    monkeypatch.setenv("EMBER_RESULTS", str(results.parent))
    records = read_runs("smoke", "03_erase_concept", "records")
    assert list(records.columns[: len(RECORD_COLUMNS)]) == list(RECORD_COLUMNS)
    assert set(records.method) == {"base", "ember", "rmu", "random_direction"}
    test = records[records.split == "test"]
    assert set(zip(test[test.method != "base"].method, test[test.method != "base"].ember, strict=True)) == set(ARMS)
    assert records.cell.ne("").all()
    assert (records[records.method == "base"].cell == "base").all()
    assert set(records.dtype) == {"float32"}
    assert records.weights_hash.str.len().eq(64).all()
    assert records[~records.metric.str.startswith("delta_")].effect_size.isna().all()


def test_tables_and_figures_are_there(results):
    tables = {path.stem for path in (results / "tables").glob("*.csv")}
    assert {"base_model", "main", "changes", "headline", "grid", "features", "edited_rows", "run_times"} <= tables
    assert {"overview", "ember_effect", "generations", "lexical_damage", "nothing_found"} <= tables
    assert {"relearning", "relearning_overview", "relearning_speed", "weights_moved", "beside_the_paper"} <= tables
    assert {"localization", "everyday", "most_damaged", "trade", "spared_tokens", "controls"} <= tables
    for kind in (
        "factorization_loss", "selected_features", "grids", "item_changes", "generations", "text_damage", "methods",
        "trade_off", "ember_effect", "keyness_and_ratio", "token_preview", "relearning", "attacks", "precision",
        "localization", "exposure", "trade", "trade_areas",
    ):  # fmt: skip
        for suffix in ("png", "svg"):
            assert any((results / "figures").glob(f"{kind}__*.{suffix}")), (kind, suffix)


def test_every_arm_is_in_the_main_table_with_the_cell_that_was_chosen(results):
    main = pd.read_csv(results / "tables" / "main.csv")
    assert set(zip(main.method, main.ember, strict=True)) == set(ARMS)
    profile = load_profile("smoke")
    assert all(row.cell in profile.cells(row.method) for row in main.itertuples())
    grid = pd.read_csv(results / "tables" / "grid.csv")
    assert grid.groupby(["method", "ember"]).chosen.sum().eq(1).all()
    effects = pd.read_csv(results / "tables" / "ember_effect.csv")
    assert set(effects.method) == {"rmu"}


def test_relearning_is_measured_at_every_point_beside_the_unedited_model(results):
    table = pd.read_csv(results / "tables" / "relearning.csv")
    assert set(table.method) == {"none", "ember"}
    assert set(zip(table.attack, table.precision, strict=True)) == {
        ("all", "fp32"), ("edited_rows", "fp32"), ("all", "bf16"),
    }  # fmt: skip
    assert set(table.point) == {0, 1, 2}
    start = table[table.point == 0]
    assert (start.back == 0).all()
    unedited = start[start.method == "none"]
    assert (unedited.gap.abs() < 1e-4).all()
    assert unedited.share.isna().all()
    assert unedited.note.str.contains("nothing was erased").all()
    moved = pd.read_csv(results / "tables" / "weights_moved.csv")
    everything = moved[moved.part == "all that is trained"].set_index(["method", "attack", "precision"])
    assert everything.changed["ember", "all", "fp32"] > 0.9
    assert everything.changed["ember", "all", "bf16"] < 0.2
    assert everything["values"]["ember", "edited_rows", "fp32"] < everything["values"]["ember", "all", "fp32"] / 1000
    assert (pd.read_csv(results / "tables" / "relearning_speed.csv").tokens_per_second > 0).all()


def test_a_control_of_the_same_rows_is_measured_on_its_own(results):
    """It shares EMBER's config class: a cache that does not know the method would give it EMBER's scores."""
    items = {
        name: pd.read_parquet(next((results / "records").glob(f"03_*__method={name}__ember=False__*/items.parquet")))
        for name in ("ember", "random-direction")
    }
    ours, theirs = (frame[frame.metric == "gold_logprob"].set_index(["set", "item"]) for frame in items.values())
    assert ours.base.equals(theirs.base)
    assert not ours.edited.equals(theirs.edited)


def test_damage_is_traced_and_sits_behind_edited_tokens_for_ember_alone(results):
    table = pd.read_csv(results / "tables" / "localization.csv").set_index(["method", "ember", "set", "group"])
    assert set(table.index.get_level_values("method")) == {"ember", "rmu"}
    unexposed = table.xs("before any edited token", level="group")
    assert (unexposed.kl["ember", False] == 0).all()
    assert (unexposed.kl["rmu", False] > 0).all()


def test_control_edits_are_compared_at_every_strength(results):
    table = pd.read_csv(results / "tables" / "trade.csv")
    assert set(table.edit) == {"EMBER", "EMBER, rare tokens", "zero rows"}
    assert set(table.cost) == {"other sense", "neighbour", "everyday"}
    assert (table[table.edit == "EMBER"].difference.dropna() == 0).all()


def edit_of(results, method: str, ember: bool) -> Edit:
    (folder,) = (results / "edits").glob(f"*__method={method}__ember={ember}__*")
    return Edit.load(folder)


def test_an_arm_after_ember_is_embers_edit_with_another_on_top(results, embedded):
    ember, alone, both = (edit_of(results, *arm) for arm in ARMS[:3])
    assert [step["method"] for step in both.steps] == ["ember", "rmu"]
    assert set(both.tensors) == set(ember.tensors) | set(alone.tensors)
    assert embedded.embedding_name not in alone.tensors
    ours, theirs = (edit.tensors[embedded.embedding_name] for edit in (ember, both))
    assert ours.rows.equal(theirs.rows) and ours.values.equal(theirs.values)


def test_the_edit_is_input_side_and_only_concept_rows(results, embedded):
    edit = edit_of(results, "ember", False)
    rows = pd.read_csv(results / "tables" / "edited_rows.csv")
    assert set(edit.changed().parameter) == {embedded.embedding_name}
    assert set(edit.changed().row) == set(rows.token_id)
    assert (rows.role == "concept").all()


def test_similar_domain_is_left_alone_and_text_damage_is_lexical(results):
    changes = pd.read_csv(results / "tables" / "changes.csv")
    simdom = changes[(changes.set == "simdom") & (changes.metric == "delta_gold_logprob") & (changes.method == "ember")]
    assert len(simdom) == 1
    assert simdom.value.abs().max() < 0.05
    lexical = pd.read_csv(results / "tables" / "lexical_damage.csv", keep_default_na=False)
    untouched = lexical[(lexical.edited_tokens == "none") & (lexical.method == "ember")]
    assert len(untouched) == 1
    assert (untouched.texts.astype(int) > 0).all()
    assert (untouched.delta_loss.astype(float) == 0).all()
    assert (untouched.kl.astype(float) == 0).all()


def test_a_second_run_does_nothing(results):
    before = {path: path.stat().st_mtime_ns for path in results.glob("notebooks/*")}
    done = reproduce(results.parent)
    assert done.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in results.glob("notebooks/*")} == before


def test_a_lost_result_is_made_again_with_the_same_numbers(results):
    """What a run killed at the report leaves behind: no manifest, a table cut short."""
    main = results / "tables" / "main.csv"
    kept = main.read_bytes()
    main.write_bytes(kept[:40])
    (results / "notebooks" / "10_report.json").unlink()
    assert reproduce(results.parent).returncode == 0
    assert main.read_bytes() == kept
