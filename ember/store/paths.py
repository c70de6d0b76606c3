"""Where things are. Nothing here creates a directory; writers do."""

import os
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def _folder(variable: str, default: Path) -> Path:
    override = os.environ.get(variable)
    return Path(override).expanduser() if override else default


def cache_dir() -> Path:
    """Folder of downloaded and derived files: ``$EMBER_CACHE``, else ``~/.cache/ember``."""
    return _folder("EMBER_CACHE", _folder("XDG_CACHE_HOME", Path.home() / ".cache") / "ember")


def data_dir() -> Path:
    """Folder of the concept data: ``$EMBER_DATA``, else ``data/`` of this repository."""
    return _folder("EMBER_DATA", REPOSITORY / "data")


def results_root() -> Path:
    """Folder of all results: ``$EMBER_RESULTS``, else ``results/`` of this repository."""
    return _folder("EMBER_RESULTS", REPOSITORY / "results").resolve()


def results_dir(profile: str) -> Path:
    """Folder of one profile's results."""
    return results_root() / profile


def notebooks_dir() -> Path:
    """Folder of the numbered notebooks and their profiles."""
    return REPOSITORY / "notebooks"


def slug(name: str) -> str:
    """File name for a display name: ``"Ancient Rome"`` → ``"ancient-rome"``."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")
