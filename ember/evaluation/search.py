"""Searching a grid: every cell measured, those without an edit named, the best chosen, the gentlest among equals.

What a search needs to keep: evaluations on disk, and edits as long as they are small.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ember.editing import Edit
from ember.errors import DamagedFileError, EmberError
from ember.evaluation.evaluate import Evaluation
from ember.evaluation.metrics import Comparison, compare
from ember.models.loading import LoadedModel
from ember.store.files import digest, read_sealed, sealed_dir
from ember.store.frames import read_frame, write_frame
from ember.store.progress import bar


@dataclass(frozen=True)
class Search:
    """A searched grid, its cells by label in the grid's order.

    ``cells``: each cell's comparison with the base model; ``seconds``: how long it took; ``failed``: why a cell has no
    edit. ``choice``: label of the chosen cell; ``table``: how near the others came (``choose``).
    """

    cells: Mapping[str, Comparison]
    seconds: Mapping[str, float]
    failed: Mapping[str, EmberError]
    choice: str
    table: pd.DataFrame

    @property
    def curve(self) -> pd.DataFrame:
        """The cells' summaries (``compare``), one under the other, with column ``cell``."""
        return pd.concat([one.summary.assign(cell=cell) for cell, one in self.cells.items()], ignore_index=True)


def search(
    cells: Iterable[str],
    measure: Callable[[str], Evaluation],
    base: pd.DataFrame,
    *,
    items: Callable[[str, Evaluation], pd.DataFrame] = lambda cell, evaluation: evaluation.items,
    score: str = "final_cont",
) -> Search:
    """Evaluate every cell of a grid, the gentlest setting first, and choose one (``choose``).

    ``measure`` evaluates a cell's edit; where it raises an ``EmberError`` there is none. If no cell gives an edit, the
    first one's is raised. ``items`` are the scores to be compared with ``base``, the base model's: a judge may add to
    those of the evaluation. Its errors end the search.
    """
    compared, seconds, failed = dict[str, Comparison](), dict[str, float](), dict[str, EmberError]()
    for cell in bar(cells, desc="grid"):
        begun = time.time()
        try:
            evaluation = measure(cell)
        except EmberError as error:
            failed[cell] = error
            continue
        compared[cell] = compare(base, items(cell, evaluation))
        seconds[cell] = time.time() - begun
    if failed and not compared:
        raise next(iter(failed.values()))
    return Search(compared, seconds, failed, *choose(compared, score=score))


def choose(cells: Mapping[str, Comparison], *, score: str = "final_cont") -> tuple[str, pd.DataFrame]:
    """The cell with the best score; cells within one standard error of it tie, and the first listed wins.

    ``cells`` maps a label to its comparison, the gentlest setting first; all were made with one base and seed, so their
    draws are paired, and the standard error is that of the difference from the best cell. Returns the choice and a
    table cell, score, behind (distance from the best), standard_error, tie.
    """
    if not cells:
        raise ValueError("there is no cell to choose from")
    values = {cell: comparison.value(score) for cell, comparison in cells.items()}
    best = max(values, key=lambda cell: values[cell])
    rows = []
    for cell, value in values.items():
        gap, error = values[best] - value, float(np.std(cells[best].draws[score] - cells[cell].draws[score], ddof=1))
        rows.append((cell, value, gap, error, cell == best or gap <= error))
    table = pd.DataFrame(rows, columns=["cell", score, "behind", "standard_error", "tie"])
    return str(table[table.tie].cell.iloc[0]), table


@dataclass(frozen=True)
class EvaluationCache:
    """Evaluations on disk, so that an interrupted grid resumes at the last finished cell.

    The key must name everything a value depends on; build it with ``key``, which puts the weights' hash first.
    """

    folder: Path

    @staticmethod
    def key(loaded: LoadedModel, *parts: object) -> str:
        """Cache key of the model's weights and dtype and whatever else the value depends on."""
        return digest(loaded.weights_hash, loaded.dtype, *parts)

    def get_or_run(self, key: str, run: Callable[[], Evaluation]) -> Evaluation:
        """The stored evaluation, or a fresh one that is stored. A damaged entry is named, dropped and redone."""
        entry = self.folder / key
        if entry.exists():
            try:
                read_sealed(entry)
                return Evaluation(read_frame(entry / "items.parquet"), read_frame(entry / "samples.parquet"))
            except DamagedFileError as error:
                warnings.warn(f"recomputing a damaged cell: {error}", stacklevel=2)
        value = run()
        with sealed_dir(entry, ours=True) as target:
            write_frame(target / "items.parquet", value.items)
            write_frame(target / "samples.parquet", value.samples)
        return value


class KeptEdits:
    """The edits of a grid by label, each made when it is asked for and kept while those kept stay small.

    An edit of a large model's matrices takes gigabytes; one that was given up is made again, and is the same. All are
    given up once they have more than ``limit`` bytes.
    """

    def __init__(self, make: Callable[[str], Edit], *, limit: float = 2e9) -> None:
        self._make, self._limit, self._kept = make, limit, dict[str, Edit]()

    def __call__(self, label: str) -> Edit:
        if label not in self._kept:
            if sum(edit.nbytes for edit in self._kept.values()) > self._limit:
                self._kept.clear()
            self._kept[label] = self._make(label)
        return self._kept[label]
