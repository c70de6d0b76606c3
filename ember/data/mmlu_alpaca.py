"""The paper's general questions and instructions: rows of MMLU and AlpacaEval that its authors chose by number.

The released files hold only the numbers; the rows come from the Hugging Face Hub, at a revision that is resolved to a
commit once and recorded. Row numbers mean something only within one commit.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ember.data.released import fetch_released
from ember.data.types import SPLITS, Instruction, Question
from ember.errors import DamagedFileError, DataError, DownloadError
from ember.store.files import read_sealed, read_utf8, sealed_dir, sha256_of
from ember.store.paths import cache_dir, slug

# Data set → its repository on the Hub and the file in it. MMLU is the config "all", split test.
SETS: Mapping[str, tuple[str, str]] = {
    "mmlu": ("cais/mmlu", "all/test-00000-of-00001.parquet"),
    "alpaca": ("tatsu-lab/alpaca_eval", "alpaca_eval.json"),
}


@dataclass(frozen=True)
class SharedSets:
    """Questions of the set ``general``, instructions, and the commit (or the file's hash) that each data set has."""

    questions: tuple[Question, ...]
    instructions: tuple[Instruction, ...]
    revisions: Mapping[str, str]


def index_file(name: str, split: str) -> str:
    """Name of the released file with a data set's row numbers."""
    return f"{name}_{split}_indices.json"


def load_shared_sets(folder: str | Path | None = None) -> SharedSets:
    """The rows that the released numbers choose, in their order.

    Parameters
    ----------
    folder
        Where the files of ``index_file`` and the last parts of the names in ``SETS`` are; by default those that
        ``fetch_released`` and ``fetch_shared_sets`` cache.

    Returns
    -------
    sets
        Ids are the rows' places: ``mmlu[8153]``, ``alpaca[748]``. Nothing is left out or repaired, so that the rows
        are the paper's: an option may occur twice in a question.

    Raises
    ------
    DataError
        If a file is missing, is not of its form, or has no such row; the message names file, entry and field.
    DownloadError, DamagedFileError
        As in ``fetch_shared_sets``.
    """
    if folder is None:
        root, (places, revisions) = fetch_released(), fetch_shared_sets()
    else:
        root = Path(folder)
        places = {name: root / Path(file).name for name, (_, file) in SETS.items()}
        for path in places.values():
            if not path.exists():
                raise DataError(f"{path}: the file is missing")
        revisions = {name: f"sha256 {sha256_of(path)}" for name, path in places.items()}
    numbers = {name: {split: _numbers(root / index_file(name, split)) for split in SPLITS} for name in SETS}
    for name, by_split in numbers.items():
        both = sorted(set(by_split["train"]) & set(by_split["test"]))
        if both:
            raise DataError(f"{root / index_file(name, 'test')}: rows {both[:5]} are train rows too")
    mmlu, alpaca = _parquet(places["mmlu"]), _list(places["alpaca"])
    questions = [
        _question(places["mmlu"], row, split, _row(root / index_file("mmlu", split), k, mmlu, row))
        for split in SPLITS
        for k, row in enumerate(numbers["mmlu"][split])
    ]
    instructions = [
        _instruction(places["alpaca"], row, split, _row(root / index_file("alpaca", split), k, alpaca, row))
        for split in SPLITS
        for k, row in enumerate(numbers["alpaca"][split])
    ]
    return SharedSets(tuple(questions), tuple(instructions), revisions)


def fetch_shared_sets(revisions: Mapping[str, str] | None = None) -> tuple[dict[str, Path], dict[str, str]]:
    """The data sets' files, and the commits they are of; downloaded on first use.

    ``revisions`` says, by data set, which branch, tag or commit to take. What is not named is, on first use, ``main``
    as it then is; afterwards it is whatever commit the cache holds, and a file that is not the one recorded is an
    error.

    Raises
    ------
    DownloadError
        If a file is not in the cache and cannot be fetched.
    DamagedFileError
        If a cached file is not what was written, or is of another revision than the one asked for.
    """
    for name in sorted((revisions or {}).keys() - SETS.keys()):
        raise DataError(f"revisions must name {', '.join(SETS)}, got {name!r}")
    found = {name: _fetched(name, (revisions or {}).get(name)) for name in SETS}
    return {name: path for name, (path, _) in found.items()}, {name: commit for name, (_, commit) in found.items()}


def _fetched(name: str, revision: str | None) -> tuple[Path, str]:
    repository, file = SETS[name]
    folder = cache_dir() / "shared_sets" / slug(repository)
    path = folder / Path(file).name
    if not folder.exists():
        source, commit = _download(repository, file, revision or "main")
        about = {"repository": repository, "file": file, "revision": revision or "main", "commit": commit}
        with sealed_dir(folder, about, ours=True) as target:
            shutil.copyfile(source, target / path.name)
    about = read_sealed(folder, mend="Delete the folder")
    held, commit = about["revision"], about["commit"]
    if revision not in (None, held, commit):
        raise DamagedFileError(f"{folder} holds {held} at {commit}, not {revision}. Delete the folder to fetch that")
    return path, commit


def _download(repository: str, file: str, revision: str) -> tuple[Path, str]:
    """A file of a data set at a revision, in the Hub's own cache, and its commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (OSError, ValueError, HfHubHTTPError, EntryNotFoundError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"{repository} is not in the cache ({cache_dir()}) and could not be fetched at {revision}: {said} "
            "Fetch it once where there is a connection: python -m ember fetch-data --shared"
        ) from error
    # The Hub's cache keeps each commit in a folder of its own: snapshots/COMMIT/file.
    commit = path.parents[len(Path(file).parts) - 1].name
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise DownloadError(f"{path}: the Hub's cache does not tell which commit of {repository} this is")
    return path, commit


def _numbers(path: Path) -> list[int]:
    numbers = _list(path)
    for k, number in enumerate(numbers):
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise DataError(f"{path}, entry {k}: expected a row number, got {number!r}")
    if len(set(numbers)) < len(numbers):
        twice = next(number for k, number in enumerate(numbers) if number in numbers[:k])
        raise DataError(f"{path}: row {twice} occurs twice")
    return numbers


def _list(path: Path) -> list[Any]:
    try:
        found = json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: expected a list that is not empty")
    return found


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        table = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({(str(error).splitlines() or ['?'])[0]})") from None
    for column in ("question", "choices", "answer"):
        if column not in table:
            raise DataError(f"{path}: no column {column!r}; it holds {', '.join(map(str, table.columns))}")
    return list(table.to_dict("records"))


def _row(path: Path, k: int, rows: list[Any], number: int) -> Any:
    if number >= len(rows):
        raise DataError(f"{path}, entry {k}: row {number}, but the data set has {len(rows)} rows")
    return rows[number]


def _question(path: Path, number: int, split: str, row: Mapping[str, Any]) -> Question:
    where = f"{path}, row {number}"
    text, answer = row["question"], row["answer"]
    choices = list(row["choices"]) if hasattr(row["choices"], "__len__") else []
    if not _is_text(text):
        raise DataError(f"{where}, field 'question': expected text")
    if len(choices) != 4 or not all(map(_is_text, choices)):
        raise DataError(f"{where}, field 'choices': expected four texts")
    if not isinstance(answer, int) or answer not in range(4):
        raise DataError(f"{where}, field 'answer': expected 0..3, got {answer!r}")
    wrong = tuple(choice for k, choice in enumerate(choices) if k != answer)
    return Question(f"mmlu[{number}]", "general", split, text, choices[answer], wrong)


def _instruction(path: Path, number: int, split: str, row: Any) -> Instruction:
    for field in ("instruction", "output"):
        if not isinstance(row, dict) or not _is_text(row.get(field)):
            raise DataError(f"{path}, row {number}, field {field!r}: expected text")
    return Instruction(f"alpaca[{number}]", split, row["instruction"], row["output"])


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
