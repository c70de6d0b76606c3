"""Shared fixtures: tiny random models of two architectures with a real tokenizer, and the embedded model."""

import os
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
from helpers.tiny import make_concept, make_loaded, shrink_saes

from ember.data.types import Concept
from ember.models.loading import LoadedModel, load_model


@pytest.fixture(params=["llama", "gemma2"])
def tiny(request) -> LoadedModel:
    """A tiny random model of each architecture, fresh for every test."""
    return make_loaded(request.param)


@pytest.fixture
def tiny_concept() -> Concept:
    return make_concept()


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The embedded model; shared, so a test must leave it as it was (checked at the end of the session)."""
    from ember.models.loading import weights_hash

    loaded = load_model("smollm2-135m")
    yield loaded
    assert weights_hash(loaded.model) == loaded.weights_hash, "a test changed the shared model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty EMBER_CACHE."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EMBER_CACHE", str(folder))
    return folder


@pytest.fixture
def small_saes(cache, monkeypatch) -> None:
    """Small autoencoders in an empty cache."""
    shrink_saes(monkeypatch)
