"""Where weights go, by argument, by $EMBER_DEVICE, or by what there is."""

import pytest
import torch
from helpers.tiny import make_model, save

from ember.errors import EmberError, UnknownNameError
from ember.models.loading import load_model
from ember.store.devices import choose_device


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs PyTorch finds."""

    def found(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.delenv("EMBER_DEVICE", raising=False)
    found(0)
    return found


@pytest.mark.parametrize(("count", "expected"), [(0, "cpu"), (2, "cuda")])
@pytest.mark.parametrize("variable", [None, "auto", "", " auto "])
def test_by_default_a_gpu_where_there_is_one(gpus, monkeypatch, count, expected, variable):
    gpus(count)
    if variable is not None:
        monkeypatch.setenv("EMBER_DEVICE", variable)
    assert choose_device() == torch.device(expected)


def test_the_variable_decides_and_an_argument_overrules_it(gpus, monkeypatch):
    gpus(2)
    for name in ("cpu", "cuda", "cuda:1"):
        monkeypatch.setenv("EMBER_DEVICE", name)
        assert choose_device() == torch.device(name)
    monkeypatch.setenv("EMBER_DEVICE", "cpu")
    assert choose_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps", "CPU"])
def test_an_unknown_device_lists_the_known(gpus, monkeypatch, name):
    monkeypatch.setenv("EMBER_DEVICE", name)
    with pytest.raises(UnknownNameError, match=r"known: auto, cpu, cuda, cuda:N\. Name it in EMBER_DEVICE"):
        choose_device()


@pytest.mark.parametrize(("count", "name", "advice"), [
    (0, "cuda", "EMBER_DEVICE=cpu"), (0, "cuda:0", "EMBER_DEVICE=cpu"), (2, "cuda:2", "cuda:0 to cuda:1"),
])  # fmt: skip
def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_do(gpus, count, name, advice):
    gpus(count)
    with pytest.raises(EmberError, match=advice):
        choose_device(name)


def test_loading_follows_the_variable(gpus, monkeypatch, tmp_path):
    folder = save(tmp_path, make_model("llama"))
    assert load_model(folder).device == torch.device("cpu")
    monkeypatch.setenv("EMBER_DEVICE", "cuda")
    monkeypatch.setattr("transformers.AutoModelForCausalLM", None)  # refused before any weights are read
    with pytest.raises(EmberError, match="EMBER_DEVICE=cpu"):
        load_model(folder)
