"""One command fetches all that a profile reads; after it a Hub model loads without a connection."""

import json
import os
import subprocess
import sys

import pytest
from helpers.tiny import make_loaded

from ember.batch import prefetch as module
from ember.batch.prefetch import prefetch
from ember.batch.profiles import load_profile
from ember.errors import DownloadError

COMMIT = "c0ffee" + "0" * 34
LAYERS = {
    "paper-gemma": ("gemma-scope", [4, 8, 12, 16, 20], [3, 4, 8, 14, 18, 19, 20, 23, 24, 25]),
    "paper-llama": ("llama-scope", [8, 12, 16, 20, 24], [10, 16, 17, 18, 19, 21, 22, 23, 26, 30]),
}


@pytest.fixture
def fetched(monkeypatch, tmp_path) -> list:
    """What is fetched, in order; nothing is downloaded."""
    done: list = []
    monkeypatch.setattr(module, "fetch_released", lambda: done.append("released data"))
    monkeypatch.setattr(module, "fetch_shared_sets", lambda: done.append("shared sets"))
    monkeypatch.setattr(module, "fetch_model", lambda name: done.append(name) or tmp_path / "snapshot")
    monkeypatch.setattr(module, "load_saes", lambda _, __, kind, layers, source: done.append((source, kind, *layers)))
    return done


@pytest.mark.parametrize("name", LAYERS)
def test_the_paper_s_profiles_need_model_data_and_autoencoders(fetched, tmp_path, name):
    profile, (source, residual, mlp_out) = load_profile(name), LAYERS[name]
    prefetch(profile, tmp_path / "model.json")
    assert fetched[:3] == ["released data", "shared sets", profile.model]
    wanted = [(source, "residual", k) for k in residual] + [(source, "mlp_out", k) for k in mlp_out]
    assert sorted(fetched[3:]) == sorted(wanted)
    assert json.loads((tmp_path / "model.json").read_text()) == {"model": profile.model, "folder": "snapshot"}


def test_our_own_profiles_need_the_model_alone(fetched):
    prefetch(load_profile("laptop"))
    assert fetched == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("fails", "error", "words"),
    [
        ("load_saes", DownloadError("no connection"), "no connection"),
        ("fetch_model", OSError("401 Client Error.\nmore"), r"gemma-2-2b-it: 401 Client Error\. The weights are gated"),
    ],
)
def test_a_failure_is_one_line_and_leaves_no_record(fetched, monkeypatch, tmp_path, fails, error, words):
    """The record is what the Snakefile takes for done; what is gated is told with the licence's page."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(module, fails, refuse)
    with pytest.raises(DownloadError, match=words) as caught:
        prefetch(load_profile("paper-gemma"), tmp_path / "model.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "model.json").exists()
    assert fails == "load_saes" or "https://huggingface.co/google/gemma-2-2b-it" in str(caught.value)


@pytest.mark.slow
def test_a_fetched_hub_model_loads_offline(tmp_path):
    """As a compute node sees it: the Hub's cache as a snapshot download leaves it, and no connection."""
    loaded = make_loaded()
    folder = tmp_path / "hub" / "models--owner--tiny"
    snapshot = folder / "snapshots" / COMMIT
    loaded.model.save_pretrained(snapshot)
    loaded.tokenizer.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    code = (
        "from ember.models.loading import load_model; from ember.models.weights import fetch_model; "
        "print(load_model('owner/tiny', device='cpu').base_hash, fetch_model('owner/tiny'))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    def load_offline() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    done = load_offline()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [loaded.weights_hash, str(snapshot)]
    (folder / "refs" / "main").unlink()
    done = load_offline()
    assert done.returncode == 1 and "DownloadError" in done.stderr
