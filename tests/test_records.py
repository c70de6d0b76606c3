"""The files of a profile's results: put together, strictly read, and figures."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from ember.batch.records import RECORD_COLUMNS, nothing_found, read_records, read_runs, save_figure, write_run
from ember.errors import DamagedFileError
from ember.store.frames import write_frame

RECORDS = pd.DataFrame({column: [0, 1] for column in RECORD_COLUMNS})
CELLS = pd.DataFrame({"cell": ["a"]})


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    return tmp_path


def test_write_run_names_the_files(results):
    folder = write_run("p", "03_x__seed=1", cells=CELLS, items=CELLS)
    assert folder == results / "p" / "records" / "03_x__seed=1"
    assert sorted(p.name for p in folder.iterdir()) == ["cells.parquet", "items.parquet"]


def test_record_files_are_put_together(tmp_path):
    paths = [write_frame(tmp_path / f"{k}.parquet", RECORDS.assign(seed=k)) for k in (2, 1)]
    assert read_records(paths).seed.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("column", ["weights_hash", "cell", "ci_low"])
def test_records_without_a_column_are_refused(tmp_path, column):
    path = write_frame(tmp_path / "records.parquet", RECORDS.drop(columns=column))
    with pytest.raises(DamagedFileError, match=rf"records\.parquet lacks .*{column}"):
        read_records([path])


def test_one_damaged_file_is_not_left_out(tmp_path):
    paths = [write_frame(tmp_path / f"{k}.parquet", RECORDS) for k in "ab"]
    paths[1].write_bytes(b"PAR1")
    with pytest.raises(DamagedFileError, match=r"b\.parquet"):
        read_records(paths)


def test_no_records_name_the_command():
    with pytest.raises(FileNotFoundError, match="python -m ember reproduce"):
        read_records([])
    with pytest.raises(FileNotFoundError, match="python -m ember reproduce --profile smoke"):
        read_runs("smoke", "03_erase_concept", "records")


def test_runs_are_read_with_their_names():
    for run in ("03_x__seed=1", "03_x__seed=2", "04_y__seed=1"):
        write_run("p", run, records=RECORDS, cells=CELLS)
    assert read_runs("p", "03_x", "cells").run.unique().tolist() == ["03_x__seed=1", "03_x__seed=2"]
    write_run("p", "03_x__seed=2", records=RECORDS.drop(columns="n"))
    with pytest.raises(DamagedFileError, match="lacks the record columns n"):
        read_runs("p", "03_x", "records")


def test_a_run_that_found_nothing_is_listed_and_left_out(results):
    """Its frames are empty files; an empty file without that note is damaged."""
    for seed in (1, 2):
        write_run("p", f"03_x__seed={seed}", cells=pd.DataFrame({"cell": [f"c{seed}"]}))
    (results / "p" / "records" / "03_x__seed=2" / "cells.parquet").write_text("")
    folder = results / "p" / "notebooks"
    folder.mkdir()
    (folder / "03_x__seed=1.json").write_text('{"notebook": "03_x"}')
    with pytest.raises(DamagedFileError, match="seed=2"):
        read_runs("p", "03_x", "cells")
    (folder / "03_x__seed=2.json").write_text('{"notebook": "03_x", "nothing_found": "no feature"}')
    assert read_runs("p", "03_x", "cells").cell.tolist() == ["c1"]
    assert nothing_found("p").to_dict("list") == {"run": ["03_x__seed=2"], "reason": ["no feature"]}


def test_figures_are_the_same_bytes_each_time(results):
    seen = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3], label="line")
        axes.fill_between([0, 1], [0, 1], hatch="/", label="area")
        axes.legend()
        save_figure(figure, "p", "curve")
        plt.close(figure)
        seen.append({p.name: p.read_bytes() for p in (results / "p" / "figures").iterdir()})
    assert seen[0] == seen[1]
    assert seen[0].keys() == {"curve.png", "curve.svg"}
