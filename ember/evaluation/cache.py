"""What a search needs to keep: evaluations on disk, and the edits of a grid as long as they are small."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ember.editing import Edit
from ember.errors import DamagedFileError
from ember.evaluation.evaluate import Evaluation
from ember.models.loading import LoadedModel
from ember.store.files import digest, read_sealed, sealed_dir
from ember.store.frames import read_frame, write_frame


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
