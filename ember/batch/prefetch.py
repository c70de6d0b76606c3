"""Fetching all that a profile reads from elsewhere, so that every run after it needs no connection."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ember.batch.profiles import Profile
from ember.data.mmlu_alpaca import fetch_shared_sets
from ember.data.released import fetch_released
from ember.errors import DownloadError
from ember.methods import METHODS
from ember.methods.sae import load_saes
from ember.models.specs import find_spec
from ember.models.weights import fetch_model
from ember.store.files import write_text
from ember.store.progress import bar


def prefetch(profile: Profile, record: Path | None = None) -> None:
    """Fill the caches with a profile's model, data and released autoencoders.

    ``record`` is a file that, written last, says which copy of the model the profile's runs start from.

    Raises
    ------
    DownloadError, DamagedFileError
        If something cannot be fetched, or what the cache holds is not what was written.
    EmberError
        If the profile uses released autoencoders and the extra ``sae`` is not installed.
    """
    if profile.source == "released":
        fetch_released()
        fetch_shared_sets()
    folder = _model(profile.model)
    # One at a time: together they may be larger than the memory of the machine that fetches.
    nowhere: Any = SimpleNamespace(device="cpu")
    for source, kind, layer in bar(sorted(set(_released(profile))), desc="autoencoders"):
        load_saes(nowhere, nowhere, kind, [layer], source=source)
    if record:
        write_text(record, json.dumps({"model": profile.model, "folder": folder.name}) + "\n")


def _model(name: str) -> Path:
    spec = find_spec(name)
    try:
        return fetch_model(name)
    except OSError as error:
        if spec.origin != "hub":
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DownloadError(f"cannot fetch {spec.location}: {said}.{spec.gate}") from error


def _released(profile: Profile) -> Iterator[tuple[str, str, int]]:
    """Source, kind of site and layer of every released autoencoder that the grids of the profile's methods name."""
    for name in profile.methods:
        for cell in profile.cells(name).values():
            config = METHODS[name].config(**cell)
            source = getattr(config, "sae", "trained")
            if source != "trained":
                yield from ((source, config.site, layer) for layer in config.layers)
