"""Tables on disk: written whole or not at all, and read strictly."""

from pathlib import Path

import pandas as pd

from ember.errors import DamagedFileError
from ember.store.files import atomic_file


def write_frame(path: Path, frame: pd.DataFrame) -> Path:
    """Write a frame as parquet or, by the suffix, CSV; atomically."""
    with atomic_file(path) as temporary:
        if path.suffix == ".csv":
            frame.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
        else:
            frame.to_parquet(temporary, index=False)
    return path


def read_frame(path: Path) -> pd.DataFrame:
    """Read what ``write_frame`` wrote; a missing or damaged file is an error that names it, never an empty table."""
    try:
        if path.suffix != ".csv":
            return pd.read_parquet(path)
        if not path.read_text(encoding="utf-8").endswith("\n"):
            raise ValueError("it ends in the middle of a line")
        return pd.read_csv(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's and pandas' parse errors are both
        raise DamagedFileError(f"{path} is damaged ({error}). Delete it and run the notebook that writes it") from error
