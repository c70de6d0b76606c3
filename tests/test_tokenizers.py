"""The paper's two architectures with tokenizers of the real classes: BOS, padding, turns."""

import pytest
from helpers.tokenizers import GEMMA_SPECIAL, KINDS, LLAMA_SPECIAL, save_tiny, texts
from transformers import GemmaTokenizerFast, PreTrainedTokenizerFast

from ember.models.loading import LoadedModel, load_model

GEMMA_CHAT = "<bos><start_of_turn>user\nWho built Rome?<end_of_turn>\n<start_of_turn>model\n"
LLAMA_CHAT = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho built Rome?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module", params=KINDS)
def real(request, tmp_path_factory) -> LoadedModel:
    return load_model(save_tiny(tmp_path_factory.mktemp(request.param), request.param), device="cpu")


def is_gemma(loaded: LoadedModel) -> bool:
    return loaded.architecture.scaled_embedding


def test_the_tokenizer_comes_back_as_its_class_and_raw_text_has_one_bos(real):
    assert type(real.tokenizer) is (GemmaTokenizerFast if is_gemma(real) else PreTrainedTokenizerFast)
    assert real.tokenizer.bos_token == ("<bos>" if is_gemma(real) else "<|begin_of_text|>")
    for text in texts()[:50]:
        ids = real.encode(text)
        assert ids[:1] == [real.tokenizer.bos_token_id] and ids.count(real.tokenizer.bos_token_id) == 1
        assert real.encode(text, bos=False) == ids[1:]
        assert real.tokenizer(text)["input_ids"] == ids
        assert real.decode(ids) == text
    for word in (" Rome", " Roman", " Caesar"):  # a concept's words are tokens
        (token,) = real.encode(f"a{word}", bos=False)[1:]
        assert real.decode([token]) == word


def test_chat_has_one_bos_although_template_and_tokenizer_both_bring_it(real):
    ids = real.encode_chat("  Who built Rome? ")
    assert ids.count(real.tokenizer.bos_token_id) == 1
    # Passing the template's text on as raw text is what doubles it.
    doubled = real.tokenizer(real.tokenizer.decode(ids))["input_ids"]
    assert doubled.count(real.tokenizer.bos_token_id) == 2
    assert real.tokenizer.decode(ids) == (GEMMA_CHAT if is_gemma(real) else LLAMA_CHAT)


def test_marks_of_turns_are_one_token_each_and_padding_is_a_token_that_is_there(real):
    special = GEMMA_SPECIAL if is_gemma(real) else LLAMA_SPECIAL
    ids = {real.tokenizer.convert_tokens_to_ids(token) for token in special}
    assert ids <= real.special_ids
    turns = [token for token in special if "turn" in token or "header" in token]
    assert all(len(real.encode(token, bos=False)) == 1 for token in turns)
    pad, eos = real.tokenizer.pad_token_id, real.tokenizer.eos_token_id
    assert real.pad_id == (pad if is_gemma(real) else eos)
    assert is_gemma(real) or pad is None
    ids, mask = real.pad([[5, 6, 7], [8]], left=True)
    assert ids.tolist() == [[5, 6, 7], [real.pad_id, real.pad_id, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
