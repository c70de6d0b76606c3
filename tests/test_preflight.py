"""What stops a run before it starts: each missing precondition, all of them at once, and nothing where all is there."""

import sys
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from ember.batch import preflight as module
from ember.batch.preflight import find_device, judge_key, model_access, packages, preflight, require_ready
from ember.batch.profiles import load_profile
from ember.errors import EmberError
from ember.models.specs import MODELS, ModelSpec

GEMMA = MODELS["gemma-2-2b-it"]
KEY = "GEMINI_API_KEY"
INDEX = '{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}'


def answer(kind, code: int):
    return kind("refused", response=httpx.Response(code, request=httpx.Request("GET", "https://huggingface.co")))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub: an empty cache, our token, and what it answers; nothing goes to the network."""
    state = SimpleNamespace(token="hf_x", error=None, asked=[], folder=tmp_path / "hub")

    def auth_check(repo):
        state.asked.append(repo)
        if state.error:
            raise state.error

    monkeypatch.setattr("huggingface_hub.auth_check", auth_check)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: state.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(state.folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return state


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU, every package and the judge's key; or without."""

    def without(*, gpu=True, missing=(), key=True):
        monkeypatch.delenv("EMBER_DEVICE", raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setattr("torch.cuda.device_count", lambda: int(gpu))
        monkeypatch.setattr(module, "find_module", lambda name: None if name in missing else name)
        monkeypatch.setenv(KEY, "k") if key else monkeypatch.delenv(KEY, raising=False)

    without()
    return without


def texts(found) -> str:
    return "\n".join(map(str, found))


# The model


def test_a_model_of_ours_or_in_a_folder_asks_nobody_nor_does_one_that_takes_a_token(hub, tmp_path):
    for spec in (MODELS["smollm2-135m"], ModelSpec(name="x", origin="folder", location=str(tmp_path))):
        assert list(model_access(spec)) == []
    hub.token = None
    (found,) = model_access(GEMMA)
    assert found.fatal and GEMMA.licence in found.advice and "HF_TOKEN" in found.advice and "auth login" in found.advice
    assert hub.asked == []
    assert list(model_access(ModelSpec(name="o/m", origin="hub", location="o/m"))) == [] and hub.asked == ["o/m"]


@pytest.mark.parametrize(("error", "words"), [
    (answer(GatedRepoError, 403), "no access. Accept the licence at https://huggingface.co/google/gemma-2-2b-it"),
    (answer(RepositoryNotFoundError, 404), "check the name"),
    (answer(HfHubHTTPError, 401), "(HTTP 401). Accept the licence"),
    (answer(HfHubHTTPError, 503), "(HTTP 503). Try again later"),
    (httpx.ConnectError("no route to host"), "does not answer (no route to host). Connect once"),
    (OSError("no network"), "does not answer (no network)"),
], ids=str)  # fmt: skip
def test_the_hub_refuses_or_is_away(hub, error, words):
    hub.error = error
    (found,) = model_access(GEMMA)
    assert found.fatal and words in str(found) and GEMMA.location in str(found)


@pytest.mark.parametrize(("files", "complete"), [
    ({"config.json": "{}", "model.safetensors": ""}, True), ({"config.json": "{}"}, False),
    ({"model.safetensors": ""}, False),
    ({"config.json": "{}", "model.safetensors.index.json": INDEX, "part-1.safetensors": ""}, False),
    ({"config.json": "{}", "model.safetensors.index.json": INDEX, "part-1.safetensors": "",
      "part-2.safetensors": ""}, True),
], ids=["one file", "no weights", "no config", "half", "parts"])  # fmt: skip
def test_what_is_cached_whole_needs_no_access(hub, files, complete):
    assert list(model_access(GEMMA)) == [] and hub.asked == [GEMMA.location]  # access is enough
    hub.error = answer(GatedRepoError, 403)
    repository = hub.folder / "models--google--gemma-2-2b-it"
    snapshot = repository / "snapshots" / ("c0ffee" + "0" * 34)
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    assert len(list(model_access(GEMMA))) == int(not complete)


def test_offline_only_the_cache_counts(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (found,) = model_access(GEMMA)
    assert "fetch-model gemma-2-2b-it" in found.advice and hub.asked == []


# The machine


@pytest.mark.parametrize(("gpu", "asked", "device", "words"), [
    (False, "", "cpu", ("wants a GPU", "EMBER_DEVICE=cpu")), (False, "cpu", "cpu", ()), (True, "", "cuda", ()),
    (True, "cuda:3", "cpu", ("cuda:3", "EMBER_DEVICE")), (True, "gpu", "cpu", ("'gpu'", "EMBER_DEVICE")),
])  # fmt: skip
def test_a_large_model_wants_a_gpu_unless_the_cpu_is_asked_for(machine, monkeypatch, gpu, asked, device, words):
    machine(gpu=gpu)
    monkeypatch.setenv("EMBER_DEVICE", asked)
    kind, found = find_device(GEMMA)
    assert kind == device and len(found) == bool(words)
    assert all(finding.fatal and word in str(finding) for finding in found for word in words)
    assert gpu or find_device(MODELS["smollm2-135m"]) == ("cpu", [])


def test_packages_outside_the_installation(machine):
    machine(missing=("sae_lens", "bitsandbytes"))
    profile = load_profile("paper-llama")
    found = texts(packages(profile, "cuda"))
    assert "llama-scope" in found and "-e '.[sae]'" in found and "pip install bitsandbytes" in found
    assert "CUDA GPU" in texts(packages(profile, "cpu")) and "CUDA GPU" not in found
    assert list(packages(load_profile("laptop"), "cpu")) == []
    machine()
    assert list(packages(profile, "cuda")) == []


def test_no_judge_key(machine):
    machine(key=False)
    profile = load_profile("paper-gemma")
    (found,) = judge_key(profile)
    assert found.fatal and f"Set {KEY}" in found.advice and "judge: {}" in found.advice
    for judge in ({}, {key: value for key, value in profile.judge.items() if key != "key_variable"}):
        assert list(judge_key(profile.model_copy(update={"judge": judge}))) == []


# All together


def test_everything_that_is_missing_is_told_at_once(hub, machine):
    hub.token = None
    machine(gpu=False, missing=("sae_lens", "bitsandbytes"), key=False)
    with pytest.raises(EmberError) as caught:
        require_ready(load_profile("paper-llama"))
    for word in ("6 missing", "HF_TOKEN", "wants a GPU", "CUDA GPU", "sae-lens", "bitsandbytes", KEY):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["paper-gemma", "paper-llama"])
def test_where_all_is_there_the_profile_s_needs_alone_are_told(hub, machine, name):
    (found,) = preflight(load_profile(name))
    assert not found.fatal and "estimated, not measured" in found.what and "GB of GPU memory" in found.what


def test_the_laptop_profile_is_ready_and_asks_nobody(hub, machine):
    machine(gpu=False, missing=("sae_lens", "bitsandbytes"), key=False)
    assert require_ready(load_profile("laptop")) == []
    assert hub.asked == []


def test_the_command_lists_needs_and_obstacles(hub, machine, run):
    machine(key=False)
    status, out, errors = run("preflight", "--profile", "paper-gemma")
    assert (status, errors) == (1, "")
    assert "estimated, not measured" in out and "1 missing" in out and f"Set {KEY}" in out
    status, out, _ = run("preflight")
    assert status == 0 and "profile laptop: ready to run here" in out


def test_reproduce_stops_before_anything_runs(hub, machine, run, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: started.append(command) or sys.exit(3))
    machine(gpu=False)
    status, _, errors = run("reproduce", "--profile", "paper-gemma")
    assert status == 1 and "wants a GPU" in errors and not started
    assert run("reproduce", "--profile", "paper-gemma", "--no-preflight")[0] == 3 and len(started) == 1
