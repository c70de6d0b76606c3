"""The paper's two architectures with tokenizers of the real classes: BOS, padding, turns, scale, head, batches."""

import numpy as np
import pytest
import torch
from helpers.tokenizers import GEMMA_SPECIAL, KINDS, LLAMA_SPECIAL, save_tiny, texts
from transformers import GemmaTokenizerFast, PreTrainedTokenizerFast

from ember.models.loading import LoadedModel, load_model, weights_hash
from ember.models.scoring import generate_greedy, option_logprobs, sequence_losses


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
    wanted = (
        "<bos><start_of_turn>user\nWho built Rome?<end_of_turn>\n<start_of_turn>model\n"
        if is_gemma(real)
        else "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho built Rome?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert real.tokenizer.decode(ids) == wanted


def test_marks_of_turns_are_one_token_each_and_never_content(real):
    special = GEMMA_SPECIAL if is_gemma(real) else LLAMA_SPECIAL
    ids = {real.tokenizer.convert_tokens_to_ids(token) for token in special}
    assert ids <= real.special_ids
    turns = [token for token in special if "turn" in token or "header" in token]
    assert all(len(real.encode(token, bos=False)) == 1 for token in turns)


def test_padding_is_a_token_that_is_there(real):
    pad, eos = real.tokenizer.pad_token_id, real.tokenizer.eos_token_id
    assert real.pad_id == (pad if is_gemma(real) else eos)
    assert is_gemma(real) or pad is None
    ids, mask = real.pad([[5, 6, 7], [8]], left=True)
    assert ids.tolist() == [[5, 6, 7], [real.pad_id, real.pad_id, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_head_stands_alone_whether_the_checkpoint_ties_it_or_not(real):
    head = real.model.get_parameter(real.head_name)
    assert head.data_ptr() != real.embedding.data_ptr()
    assert torch.equal(head, real.embedding) is is_gemma(real)
    assert real.model.config.tie_word_embeddings is False
    before = head.detach().clone()
    with torch.no_grad():
        row = real.embedding[7].clone()
        real.embedding[7] += 1
        assert torch.equal(head, before)
        real.embedding[7] = row
    assert weights_hash(real.model) == real.weights_hash


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_layer_reads_rows_times_the_scale(real, dtype):
    loaded = load_model(real.spec.location, dtype=dtype, device="cpu")
    ids = torch.tensor([loaded.encode(texts()[0])])
    seen = {}
    layer = loaded.model.get_submodule(f"{loaded.architecture.layers}.0")
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(x=args[0]), with_kwargs=True)
    with torch.inference_mode():
        loaded.model(input_ids=ids)
    handle.remove()
    assert loaded.embedding_scale == (8.0 if is_gemma(real) else 1.0)
    assert torch.equal(seen["x"][0], loaded.embedding[ids[0]] * loaded.embedding_scale)


def test_padded_batches_score_as_single_texts_do(real):
    """Lengths differ widely, and some exceed Gemma's window."""
    sequences = [real.encode(text) for text in (*texts()[:4], " ".join(texts()[4:9]), "Rome fell.")]
    assert max(map(len, sequences)) > 64
    together, alone = (sequence_losses(real, sequences, [1] * 6, batch_size=size) for size in (6, 1))
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), atol=1e-4, rtol=0)
    options = [["Rome", "the Tiber and the sea", "a ship", "Carthage"], ["x", "y z", "grain", "roads"]]
    prompts = ["Question: Who?\nAnswer: ", texts()[0] + " "]
    together, alone = (option_logprobs(real, prompts, options, batch_size=size) for size in (16, 1))
    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=1e-3, rtol=0)


def test_left_padded_generation_is_that_of_single_prompts(real):
    prompts = [real.encode(text)[: 3 + 4 * k] for k, text in enumerate(texts()[:3])]
    together = generate_greedy(real, prompts, max_new_tokens=5)
    assert together == [generate_greedy(real, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert all(not set(ids) & real.special_ids for ids in together)
