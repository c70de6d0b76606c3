"""The paper's general questions and instructions: rows of MMLU and AlpacaEval that its authors chose by number.

The released files hold only the numbers; the rows come from the Hugging Face Hub, at a revision that is resolved to a
commit once and recorded. Row numbers mean something only within one commit.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from ember.data.reading import Some, read_json
from ember.data.released import INDICES, fetch_released
from ember.data.types import SPLITS, Instruction, Question, SharedData
from ember.errors import DamagedFileError, DataError, DownloadError
from ember.store.files import read_sealed, sealed_dir, sha256_of
from ember.store.paths import cache_dir, slug
from ember.store.validated import Listed, Loose, Text, validated

# Data set → its repository on the Hub and the file in it. MMLU is the config "all", split test.
SETS: Mapping[str, tuple[str, str]] = {
    "mmlu": ("cais/mmlu", "all/test-00000-of-00001.parquet"),
    "alpaca": ("tatsu-lab/alpaca_eval", "alpaca_eval.json"),
}
_Numbers = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
_Choices = Annotated[Listed[Text], Field(min_length=4, max_length=4)]
_MMLU: Any = create_model("Mmlu", __base__=Loose, question=Text, choices=_Choices, answer=Literal[0, 1, 2, 3])
_ALPACA: Any = create_model("Alpaca", __base__=Loose, instruction=Text, output=Text)


def load_shared_sets(folder: str | Path | None = None) -> SharedData:
    """The rows that the released numbers choose, in their order; no neutral sentences.

    ``folder`` holds the files of ``INDICES`` and the last parts of the names in ``SETS``; by default those that
    ``fetch_released`` and ``fetch_shared_sets`` cache, with their errors. Ids are the rows' places: ``mmlu[8153]``,
    ``alpaca[748]``. Nothing is left out or repaired, so that the rows are the paper's: an option may occur twice in a
    question. Revisions are commits, or the hashes of the folder's files. A ``DataError`` names file, entry and field.
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
    questions = []
    for id_, split, row in _chosen(root, "mmlu", places["mmlu"], _MMLU):
        wrong = list(row.choices)
        gold = wrong.pop(row.answer)
        questions.append(Question(id_, "general", split, row.question, gold, tuple(wrong)))
    instructions = tuple(
        Instruction(id_, split, row.instruction, row.output)
        for id_, split, row in _chosen(root, "alpaca", places["alpaca"], _ALPACA)
    )
    return SharedData(tuple(questions), {}, instructions, (), tuple(revisions.items()))


def fetch_shared_sets(revisions: Mapping[str, str] | None = None) -> tuple[dict[str, Path], dict[str, str]]:
    """The data sets' files, and the commits they are of; downloaded on first use.

    ``revisions`` says, by data set, which branch, tag or commit to take. What is not named is, on first use, ``main``
    as it then is; afterwards it is whatever commit the cache holds. A file that can not be fetched is a
    ``DownloadError``; one that is not as written, or of another revision than the one asked for, a
    ``DamagedFileError``.
    """
    revisions = revisions or {}
    for name in sorted(revisions.keys() - SETS.keys()):
        raise DataError(f"revisions must name {', '.join(SETS)}, got {name!r}")
    held = {name: _fetched(*where, revisions.get(name)) for name, where in SETS.items()}
    return {name: path for name, (path, _) in held.items()}, {name: commit for name, (_, commit) in held.items()}


def _fetched(repository: str, file: str, revision: str | None) -> tuple[Path, str]:
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
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    if not commit:
        raise DownloadError(f"{path}: the Hub's cache does not tell which commit of {repository} this is")
    return path, commit[1]


def _chosen(root: Path, name: str, path: Path, kind: Any) -> Iterator[tuple[str, str, Any]]:
    """Id, split and content of the rows of a data set that the released numbers name."""
    rows = _table(path, kind) if path.suffix == ".parquet" else validated(Some, read_json(path), str(path))
    train: list[int] = []
    for split in SPLITS:
        index = root / INDICES[name, split]
        numbers = validated(_Numbers, read_json(index), str(index), word="entry")
        for number in (number for number, count in Counter(numbers).items() if count > 1):
            raise DataError(f"{index}: row {number} occurs twice")
        if both := sorted({*numbers} & {*train})[:5]:
            raise DataError(f"{index}: rows {both} are train rows too")
        train = numbers
        for k, number in enumerate(numbers):
            if number >= len(rows):
                raise DataError(f"{index}, entry {k}: row {number}, but the data set has {len(rows)} rows")
            yield f"{name}[{number}]", split, validated(kind, rows[number], f"{path}, row {number}")


def _table(path: Path, kind: Any) -> list[Any]:
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({(str(error).splitlines() or ['?'])[0]})") from None
    for column in kind.model_fields:
        if column not in table.column_names:
            raise DataError(f"{path}: no column {column!r}; it holds {', '.join(table.column_names)}")
    return list(table.to_pylist())
