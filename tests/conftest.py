"""Shared fixtures: tiny random models of two architectures with a real tokenizer, and the embedded model."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
from helpers.tiny import make_concept, make_loaded

from ember.batch.cli import main
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
def run(monkeypatch, capsys, cache, tmp_path):
    """Run a command in this process, with cache and results elsewhere: (exit status, output, errors)."""
    monkeypatch.setenv("EMBER_RESULTS", str(tmp_path / "results"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ember", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses the embedded model, and slow files; the longest goes first, as it runs beside all others."""
    for item in items:
        if "embedded" in getattr(item, "fixturenames", ()):
            item.add_marker("embedded")
        if item.path.stem in ("test_cluster", "test_notebooks", "test_relearning", "test_tiny_models"):
            item.add_marker("slow")
    items.sort(key=lambda item: "test_smoke" not in item.nodeid)
