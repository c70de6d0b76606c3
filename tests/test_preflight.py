"""What stops a run before it starts: each missing precondition, all of them at once, and nothing where all is there."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from helpers.commands import run  # noqa: F401
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from ember.batch.preflight import (
    Device,
    find_device,
    judge_key,
    memory,
    model_access,
    packages,
    preflight,
    require_ready,
)
from ember.batch.profiles import load_profile
from ember.errors import EmberError
from ember.models.specs import MODELS, ModelSpec

GEMMA = MODELS["gemma-2-2b-it"]
OPEN = ModelSpec(name="o/m", origin="hub", location="o/m", dtype="bfloat16")
KEY = "GEMINI_API_KEY"


def answer(kind, code: int):
    response = httpx.Response(code, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("refused", response=response)


@pytest.fixture
def hub(monkeypatch):
    """The Hub: sets what its cache holds, our token, and what it answers; nothing goes to the network."""
    state = SimpleNamespace(cached=set(), token="hf_x", error=None, asked=[], offline=False)

    def auth_check(repo):
        state.asked.append(repo)
        if state.error:
            raise state.error

    def from_cache(repo, file, revision=None):
        return next((str(p) for p in state.cached if str(p).endswith(file)), None)

    monkeypatch.setattr("huggingface_hub.auth_check", auth_check)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: state.token)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", from_cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return state


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU of 80 GB, 200 GB of memory, every package and the judge's key."""

    def without(*, gpu=True, gpu_gb=80.0, host_gb=200.0, missing=(), key=True):
        monkeypatch.delenv("EMBER_DEVICE", raising=False)
        monkeypatch.setattr("ember.batch.preflight._GPU_NODES", ("/",) if gpu else ())
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setattr("torch.cuda.device_count", lambda: int(gpu))
        monkeypatch.setattr("ember.batch.preflight.device_memory", lambda index: (gpu_gb, gpu_gb))
        monkeypatch.setattr("ember.batch.preflight.host_memory", lambda: (host_gb, host_gb))
        monkeypatch.setattr("ember.batch.preflight.find_module", lambda name: None if name in missing else name)
        monkeypatch.setenv(KEY, "k") if key else monkeypatch.delenv(KEY, raising=False)

    without()
    return without


def texts(found) -> str:
    return "\n".join(map(str, found))


# The model


def test_a_model_of_ours_or_in_a_folder_asks_nobody(hub, tmp_path):
    for spec in (MODELS["smollm2-135m"], ModelSpec(name="x", origin="folder", location=str(tmp_path))):
        assert list(model_access(spec)) == []
    assert hub.asked == []


def test_no_token(hub):
    hub.token = None
    (found,) = model_access(GEMMA)
    assert found.fatal and GEMMA.licence in found.advice and "HF_TOKEN" in found.advice and "auth login" in found.advice
    assert hub.asked == []


def test_a_model_without_a_licence_takes_no_token(hub):
    hub.token = None
    assert list(model_access(OPEN)) == [] and hub.asked == ["o/m"]


@pytest.mark.parametrize(("error", "words"), [
    (answer(GatedRepoError, 403), "no access. Accept the licence at https://huggingface.co/google/gemma-2-2b-it"),
    (answer(RepositoryNotFoundError, 404), "Check the name"),
    (answer(HfHubHTTPError, 401), "HTTP 401). Accept the licence"),
    (answer(HfHubHTTPError, 503), "HTTP 503). Try again later"),
    (httpx.ConnectError("no route to host"), "does not answer (no route to host). Connect once"),
    (OSError("no network"), "does not answer (no network)"),
], ids=str)  # fmt: skip
def test_the_hub_refuses_or_is_away(hub, error, words):
    hub.error = error
    (found,) = model_access(GEMMA)
    assert found.fatal and words in str(found)


def test_access_is_enough_and_what_is_cached_needs_none(hub, tmp_path):
    assert list(model_access(GEMMA)) == [] and hub.asked == [GEMMA.location]
    hub.error, hub.token = answer(GatedRepoError, 403), None
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}')
    hub.cached = {index, "x/config.json", "x/part-1.safetensors"}
    assert len(list(model_access(GEMMA))) == 1  # half of the weights
    hub.cached |= {"x/part-2.safetensors"}
    assert list(model_access(GEMMA)) == []
    hub.cached = {"x/config.json", "x/model.safetensors"}
    assert list(model_access(GEMMA)) == []


def test_offline_only_the_cache_counts(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (found,) = model_access(GEMMA)
    assert "fetch-model gemma-2-2b-it" in found.advice and hub.asked == []


# The machine


def test_no_gpu_for_a_large_model_unless_the_cpu_is_asked_for(machine, monkeypatch):
    machine(gpu=False)
    device, (found,) = find_device(GEMMA)
    assert device == Device() and found.fatal and "EMBER_DEVICE=cpu" in found.advice
    assert find_device(MODELS["smollm2-135m"]) == (Device(), [])
    monkeypatch.setenv("EMBER_DEVICE", "cpu")
    assert find_device(GEMMA) == (Device(), [])
    machine()
    assert find_device(GEMMA) == (Device("cuda"), [])


@pytest.mark.parametrize("name", ["cuda:3", "gpu"])
def test_a_device_that_is_not_there(machine, monkeypatch, name):
    monkeypatch.setenv("EMBER_DEVICE", name)
    _, (found,) = find_device(GEMMA)
    assert found.fatal and name in found.what and "EMBER_DEVICE" in found.what


def test_a_machine_without_a_gpu_is_not_asked_through_pytorch(machine, monkeypatch):
    machine(gpu=False)
    monkeypatch.setattr("ember.batch.preflight.choose_device", lambda: pytest.fail("PyTorch was asked"))
    assert find_device(MODELS["smollm2-135m"]) == (Device(), [])


@pytest.mark.parametrize(("gpu_gb", "host_gb", "words"), [
    (24, 200, ["relearning in bf16 with adamw", "of GPU memory, found 24 GB", "paged_adamw_8bit"]),
    (80, 8, ["GB of memory, found 8 GB", "larger machine"]),
], ids=["gpu", "host"])  # fmt: skip
def test_too_little_memory(machine, gpu_gb, host_gb, words):
    machine(gpu_gb=gpu_gb, host_gb=host_gb)
    settings = load_profile("paper-gemma")
    bf16 = replace(settings, relearn={**settings.relearn, "sweeps": settings.relearn["sweeps"][:1]})
    (found,) = memory(bf16, Device("cuda"))
    assert found.fatal and "needs about" in found.what and all(word in str(found) for word in words)
    machine()
    assert list(memory(bf16, Device("cuda"))) == []


def test_memory_that_others_use_now_is_a_statement(machine, monkeypatch):
    monkeypatch.setattr("ember.batch.preflight.host_memory", lambda: (16.0, 2.0))
    (found,) = memory(load_profile("laptop"), Device())
    assert not found.fatal and "2 of 16 GB are free now" in found.what


def test_a_model_of_unknown_size_is_a_statement(machine):
    (found,) = memory(replace(load_profile("laptop"), model="owner/other"), Device())
    assert not found.fatal and "owner/other" in found.what


def test_packages_outside_the_installation(machine):
    machine(missing=("sae_lens", "bitsandbytes"))
    profile = load_profile("paper-llama")
    found = texts(packages(profile, Device("cuda")))
    assert "llama-scope" in found and "-e '.[sae]'" in found and "pip install bitsandbytes" in found
    assert "CUDA GPU" in texts(packages(profile, Device())) and "CUDA GPU" not in found
    assert list(packages(load_profile("laptop"), Device())) == []
    machine()
    assert list(packages(profile, Device("cuda"))) == []


def test_no_judge_key(machine):
    machine(key=False)
    profile = load_profile("paper-gemma")
    (found,) = judge_key(profile)
    assert found.fatal and f"Set {KEY}" in found.advice and "judge: {}" in found.advice
    assert list(judge_key(replace(profile, judge={}))) == []
    local = {key: value for key, value in profile.judge.items() if key != "key_variable"}
    assert list(judge_key(replace(profile, judge=local))) == []


# All together


def test_everything_that_is_missing_is_told_at_once(hub, machine):
    hub.token = None
    machine(gpu=False, host_gb=8, missing=("sae_lens", "bitsandbytes"), key=False)
    with pytest.raises(EmberError) as caught:
        require_ready(load_profile("paper-llama"))
    for word in ("7 things", "HF_TOKEN", "wants a GPU", "found 8 GB", "sae-lens", "bitsandbytes", KEY):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["paper-gemma", "paper-llama"])
def test_nothing_is_told_where_all_is_there(hub, machine, name):
    assert preflight(load_profile(name)) == []


def test_the_laptop_profile_is_ready_and_asks_nobody(hub, machine, monkeypatch):
    machine(gpu=False, host_gb=8, missing=("sae_lens", "bitsandbytes"), key=False)
    assert require_ready(load_profile("laptop")) == []
    assert hub.asked == []


def test_the_command_lists_needs_and_obstacles(hub, machine, run, monkeypatch):  # noqa: F811
    machine(key=False)
    status, out, errors = run("preflight", "--profile", "paper-gemma")
    assert (status, errors) == (1, "")
    assert "relearning in bf16 with adamw" in out and "1 missing" in out and f"Set {KEY}" in out
    status, out, _ = run("preflight")
    assert status == 0 and "profile laptop: ready to run here" in out


def test_reproduce_stops_before_anything_runs(hub, machine, run, monkeypatch):  # noqa: F811
    started = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: started.append(command) or sys.exit(3))
    machine(gpu=False)
    status, _, errors = run("reproduce", "--profile", "paper-gemma")
    assert status == 1 and "wants a GPU" in errors and not started
    assert run("reproduce", "--profile", "paper-gemma", "--no-preflight")[0] == 3 and len(started) == 1
