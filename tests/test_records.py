"""The files of a profile's results: put together, strictly read, and figures."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from ember.batch.planning import frame_path
from ember.batch.records import RECORD_COLUMNS, nothing_found, read_runs, save_figure
from ember.errors import DamagedFileError
from ember.store.frames import write_frame


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path))
    return tmp_path


def write(run: str, frame: str = "records", without: str = "", **values):
    """A frame of a run: records by default."""
    made = pd.DataFrame(values) if values else pd.DataFrame({c: [0, 1] for c in RECORD_COLUMNS if c != without})
    return write_frame(frame_path("p", run, frame), made)


def test_runs_are_put_together_with_their_names():
    for run in ("03_x__seed=2", "03_x__seed=1", "04_y__seed=1"):
        write(run)
    assert read_runs("p", "03_x", "records").run.tolist() == ["03_x__seed=1"] * 2 + ["03_x__seed=2"] * 2
    with pytest.raises(FileNotFoundError, match=r"'cells' of 03_x .*: python -m ember reproduce --profile p$"):
        read_runs("p", "03_x", "cells")


@pytest.mark.parametrize("column", ["weights_hash", "cell", "ci_low"])
def test_records_without_a_column_are_refused(column):
    write("03_x__seed=1")
    write("03_x__seed=2", without=column)
    with pytest.raises(DamagedFileError, match=rf"seed=2/records\.parquet lacks the record columns {column}"):
        read_runs("p", "03_x", "records")


def test_one_damaged_file_is_not_left_out():
    write("03_x__seed=1")
    write("03_x__seed=2").write_bytes(b"PAR1")
    with pytest.raises(DamagedFileError, match=r"seed=2/records\.parquet"):
        read_runs("p", "03_x", "records")


def test_a_run_that_found_nothing_is_listed_and_left_out(results):
    """Its frames are empty files; an empty file without that note is damaged."""
    write("03_x__seed=1", "cells", cell=["c1"])
    write("03_x__seed=2", "cells", cell=["c2"]).write_text("")
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
