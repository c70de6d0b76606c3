"""Fetching all that a profile reads from elsewhere, so that every run after it needs no connection."""

import json
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
    """Fill the caches with a profile's model, data and released autoencoders (which take the extra ``sae``).

    ``record`` is a file that, written last, says which copy of the model the profile's runs start from. What cannot be
    fetched is a ``DownloadError``, a cache that holds something else than was written a ``DamagedFileError``.
    """
    if profile.source == "released":
        fetch_released()
        fetch_shared_sets()
    spec = find_spec(profile.model)
    try:
        folder = fetch_model(profile.model)
    except OSError as error:
        if spec.origin != "hub":
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DownloadError(f"cannot fetch {spec.location}: {said}.{spec.gate}") from error
    configs = [METHODS[name].config(**cell) for name in profile.methods for cell in profile.cells(name).values()]
    released = [config for config in configs if getattr(config, "sae", "trained") != "trained"]
    wanted = {(config.sae, config.site, layer) for config in released for layer in config.layers}
    # One at a time: together they may be larger than the memory of the machine that fetches.
    nowhere: Any = SimpleNamespace(device="cpu")
    for source, kind, layer in bar(sorted(wanted), desc="autoencoders"):
        load_saes(nowhere, nowhere, kind, [layer], source=source)
    if record:
        write_text(record, json.dumps({"model": profile.model, "folder": folder.name}) + "\n")
