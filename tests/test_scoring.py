"""Log-likelihoods against a slow reference, padding and batches, greedy generation, question scores, their cache."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product, takewhile
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.suites import blank, talkative
from helpers.tiny import NEUTRAL, SENTENCES, make_loaded

from ember.data.types import Question
from ember.evaluation.evaluate import PROMPT, blind_scores, question_scores
from ember.evaluation.search import EvaluationCache
from ember.models.loading import LoadedModel, weights_hash
from ember.models.scoring import continuation_ids, generate_greedy, option_logprobs, sequence_scores

TOLERANCE = 1e-4
LONG = " ".join((*SENTENCES, *NEUTRAL))  # longer than Gemma-2's sliding window of 64 tokens
PROMPTS = ["Rome stood", SENTENCES[0], LONG, "The train to the coast was late because", "She"]
OPTIONS = [" Rome", " the Roman army marched along them", " Gaul", " snow on the long line"]
TEXTS = (SENTENCES[0], NEUTRAL[0], LONG, "Rome stood", NEUTRAL[1], SENTENCES[3][:40])


@pytest.fixture(params=[(kind, bos) for kind in ("llama", "gemma2") for bos in (True, False)], ids=str)
def loaded(request) -> LoadedModel:
    """Both architectures with a tokenizer that puts a BOS before raw text and with one that does not."""
    kind, bos = request.param
    return make_loaded(kind, bos=bos)


def encoded(loaded: LoadedModel) -> tuple[list[list[int]], list[int]]:
    """The texts' token ids, and a first scored token of each."""
    sequences = [loaded.encode(text) for text in TEXTS]
    return sequences, [1, 2, 5, 1, len(sequences[4]) - 1, 3]


@torch.inference_mode()
def reference(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids) - 1, vocab] of the next token, one sequence, no padding, no cache."""
    return loaded.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)


def reference_loss(loaded: LoadedModel, ids: list[int], start: int) -> np.ndarray:
    return -reference(loaded, ids)[range(len(ids) - 1), ids[1:]].numpy()[start - 1 :]


def reference_option(loaded: LoadedModel, prompt: str, option: str) -> float:
    before, after = continuation_ids(loaded, prompt, option)
    return -reference_loss(loaded, before + after, len(before)).sum()


def test_the_parts_are_the_tokens_of_the_whole_and_all_that_is_asked_for_is_scored_or_refused(loaded):
    for prompt, continuation in product([*PROMPTS, "Rome stood ", "the Rom"], (" beside", "ans", "ad for", ".", "é")):
        before, after = continuation_ids(loaded, prompt, continuation)
        assert before + after == loaded.encode(prompt + continuation)
        assert before and after
    for spaces in (" ", "  "):  # at the end of the prompt they move to the continuation
        before, after = continuation_ids(loaded, "Rome stood" + spaces, "beside")
        assert before == loaded.encode("Rome stood")
        assert loaded.decode(after) == spaces + "beside"
    # A token over the boundary is scored.
    assert loaded.encode("the Rom") != loaded.encode("the Romans")[: len(loaded.encode("the Rom"))]
    before, after = continuation_ids(loaded, "the Rom", "ans")
    assert before == loaded.encode("the")
    assert loaded.decode(after) == " Romans"
    for continuation in ("", " ", "\n"):
        with pytest.raises(ValueError, match="empty continuation"):
            continuation_ids(loaded, "Rome stood", continuation)
    for parts in (("", "Rome"), (" ", "Rome"), ("Rom", "e")):  # nothing but a BOS can be before them
        with nullcontext() if loaded.encode("") else pytest.raises(ValueError, match="no token of"):
            assert continuation_ids(loaded, *parts)[0] == [1]
    assert sequence_scores(loaded, [], []) == []
    for first in (-1, 0, 3, 4):
        with pytest.raises(ValueError, match="at least one scored token"):
            sequence_scores(loaded, [[5, 6, 7, 8], [5, 6, 7]], [1, first])


def test_options_equal_the_reference_and_do_not_depend_on_the_batch(loaded):
    for counts in ([4] * 5, [1] * 5, [1, 2, 3, 4, 1]):
        options = [OPTIONS[:count] for count in counts]
        pairs = [(prompt, option) for prompt, some in zip(PROMPTS, options, strict=True) for option in some]
        expected = [reference_option(loaded, *pair) for pair in pairs]
        for size in (1, 8):
            scores = option_logprobs(loaded, PROMPTS, options, batch_size=size)
            assert [len(row) for row in scores] == counts
            np.testing.assert_allclose(np.concatenate(scores), expected, atol=TOLERANCE, rtol=0)


def test_options_of_a_prompt_are_scored_from_the_same_token_on_whatever_runs_beside_them(loaded):
    """Where one of them merges with the prompt, the others are scored from that token on too."""
    prompt, options = "Where did the Rom", ["ans", "e", "an army go", "x"]
    start = len(loaded.encode("Where did the"))
    (scores,) = option_logprobs(loaded, [prompt], [options])
    expected = [-reference_loss(loaded, loaded.encode(prompt + option), start).sum() for option in options]
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE, rtol=0)
    together = option_logprobs(loaded, PROMPTS, [OPTIONS] * len(PROMPTS))
    passes: list[int] = []
    loaded.model.register_forward_pre_hook(lambda *_: passes.append(1))
    # Too few tokens for any question: each runs alone.
    apart = option_logprobs(loaded, PROMPTS, [OPTIONS] * len(PROMPTS), packed_tokens=1)
    assert len(passes) == len(PROMPTS) > 1
    np.testing.assert_allclose(np.stack(apart), np.stack(together), atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="shorter"):  # a list for each prompt
        option_logprobs(loaded, PROMPTS, [OPTIONS])


def score_everything(loaded: LoadedModel) -> np.ndarray:
    edit = blank(loaded, " Roman")
    options = option_logprobs(loaded, PROMPTS, [OPTIONS] * len(PROMPTS))
    sequences, _ = encoded(loaded)
    texts = sequence_scores(loaded, sequences, [1] * len(TEXTS), partial(edit.applied, loaded))
    return np.concatenate([*options, *(part for score in texts for part in score)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_mixed_lengths_give_numbers_and_padding_does_not_leak(kind, dtype):
    """Whatever token fills the batches, on the left or the right, the scores are the same."""
    loaded = make_loaded(kind, dtype=dtype)
    assert loaded.pad_id == 0
    before = score_everything(loaded)
    assert np.isfinite(before).all()
    loaded.pad_id = 77  # it is cached
    np.testing.assert_allclose(score_everything(loaded), before, atol=1e-6, rtol=0)
    assert weights_hash(loaded.model) == loaded.weights_hash  # which scoring leaves as they were


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_losses_and_divergence_equal_the_reference_and_losses_alone_are_the_same_to_the_bit(loaded, batch_size):
    """Also with an edit applied; each token is scored once, from its start on; without one nothing diverges."""
    edit, (sequences, starts) = blank(loaded, " Roman"), encoded(loaded)
    score = partial(sequence_scores, loaded, sequences, starts, batch_size=batch_size)
    scores, plain, before = score(partial(edit.applied, loaded)), score(), [reference(loaded, ids) for ids in sequences]
    with edit.applied(loaded):
        edited, after = score(), [reference(loaded, ids) for ids in sequences]
    for k, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        np.testing.assert_allclose(plain[k].loss, reference_loss(loaded, ids, start), atol=TOLERANCE, rtol=0)
        for one in (scores[k].base_loss, plain[k].base_loss):
            np.testing.assert_array_equal(one, plain[k].loss)
        np.testing.assert_array_equal(scores[k].loss, edited[k].loss)
        assert (plain[k].kl == 0).all()
        kl = torch.nn.functional.kl_div(after[k], before[k], log_target=True, reduction="none").sum(-1)[start - 1 :]
        assert k or kl.max() > 10 * TOLERANCE
        np.testing.assert_allclose(scores[k].kl, kl, atol=TOLERANCE, rtol=0)
    assert any((score.loss != score.base_loss).any() for score in scores)
    # Only what follows an edited token changes, also in a batch with texts that change.
    (token,) = loaded.encode(" Roman", bos=False)
    scores = sequence_scores(loaded, sequences, [1] * len(TEXTS), partial(edit.applied, loaded), batch_size=batch_size)
    changed = [token in ids for ids in sequences]
    assert changed == [True, False, True, False, False, False]
    for ids, score in zip(sequences, scores, strict=True):
        first = ids.index(token) if token in ids else len(ids)
        assert (score.kl[:first] == 0).all()
        np.testing.assert_array_equal(score.loss[:first], score.base_loss[:first])
        if token in ids:
            assert score.kl[first] > TOLERANCE
            assert abs(score.loss - score.base_loss).max() > TOLERANCE


@pytest.mark.parametrize("limit", [1, 120, 10**9])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_size_of_a_group_changes_no_score(tiny, limit, batch_size):
    """Groups only save work: an edit is applied once for each; the batches are the same, so are the bits."""
    applied = Mock(side_effect=partial(blank(tiny, " Roman").applied, tiny))
    score = partial(sequence_scores, tiny, *encoded(tiny), applied, batch_size=batch_size)
    before = score()
    applied.reset_mock()
    np.testing.assert_equal(score(group_tokens=limit), before)
    groups, batches = applied.call_count, len(TEXTS) // batch_size
    assert {1: groups == batches, 120: 1 < groups < batches, 10**9: groups == 1}[limit]


@torch.inference_mode()
def argmax_loop(loaded: LoadedModel, ids: list[int], steps: int) -> list[int]:
    out = list(ids)
    for _ in range(steps):
        out.append(int(loaded.model(torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
    return list(takewhile(lambda token: token not in loaded.special_ids, out[len(ids) :]))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_greedy_generation_equals_an_argmax_loop_and_stops_before_a_special_token(loaded, batch_size):
    talkative(loaded)
    generate = partial(generate_greedy, loaded, max_new_tokens=6, batch_size=batch_size)
    prompts = [*map(loaded.encode, PROMPTS), loaded.encode_chat("Tell me about Rome.")]
    before = generate(prompts)
    assert before == [argmax_loop(loaded, ids, 6) for ids in prompts]
    assert len({token for out in before for token in out}) > 12  # a model that repeats itself shows nothing
    i, k = next((i, k) for i, out in enumerate(before) for k in range(1, 6) if out[k] not in out[:k])
    for special in (1, 2):
        swap, head = [special, before[i][k]], loaded.model.lm_head.weight
        with torch.no_grad():
            head[swap] = head[swap[::-1]]
        after = generate(prompts)
        assert after[i] == before[i][:k] and after == [argmax_loop(loaded, ids, 6) for ids in prompts]
        with torch.no_grad():
            head[swap] = head[swap[::-1]]


WORDS = ("Rome", "Gaul", "the long river", "the forum")


def question(name: str, gold: int) -> Question:
    return Question(name, "concept", "test", "Where did the Romans go?", WORDS[gold], WORDS[:gold] + WORDS[gold + 1 :])


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.pivot(index="item", columns="metric", values="value")


def test_question_scores_equal_the_reference_in_whatever_order_the_options_are(loaded):
    """The order comes from the question's id."""
    scores = wide(question_scores(loaded, [question(str(k), k) for k in range(4)]))
    prompt = PROMPT.format(question="Where did the Romans go?")
    total = np.array([reference_option(loaded, prompt, f" {word}") for word in WORDS])
    per_char = total / [len(word) for word in WORDS]
    weights = np.exp(per_char * np.mean([len(word) for word in WORDS]))
    np.testing.assert_allclose(scores.gold_logprob, per_char, atol=TOLERANCE)
    np.testing.assert_allclose(scores.gold_prob, weights / weights.sum(), atol=TOLERANCE)
    np.testing.assert_array_equal(scores.correct, per_char == per_char.max())
    questions = [question(f"q{k}", 0) for k in range(16)]
    assert {q.gold for q in questions} == {0, 1, 2, 3}
    assert np.ptp(wide(question_scores(loaded, questions)).to_numpy(), axis=0) == pytest.approx([0, 0, 0], abs=1e-5)


def test_blind_scores_are_those_of_an_empty_question_and_follow_the_prompt(loaded):
    """More than a hundred different options, some of them shared, fill several groups."""
    questions = [
        Question(f"q{k}", "concept", "test", f"What is {k}?", f"Rome {k}", (f"the forum {k}", "Gaul", f"{k} ships"))
        for k in range(40)
    ] + [question(str(k), k) for k in range(4)]
    empty, other = ([replace(q, question=text) for q in questions] for text in ("", "Who built the long road?"))
    scores, prompted = blind_scores(loaded, questions), blind_scores(loaded, questions, prompt="Q: {question}\nA:")
    for found, prompt in ((scores, "Question:\nAnswer:"), (prompted, "Q:\nA:")):  # no space ends a line
        expected = wide(question_scores(loaded, empty, prompt=prompt))
        pd.testing.assert_frame_equal(wide(found), expected, rtol=0, atol=TOLERANCE)
    assert not np.allclose(prompted.value, scores.value, atol=TOLERANCE)
    pd.testing.assert_frame_equal(scores, blind_scores(loaded, other))
    asked, asked_other = (question_scores(loaded, some).value for some in (questions, other))
    assert not np.allclose(asked, asked_other, atol=TOLERANCE)  # these do differ
    none = blind_scores(loaded, [])
    assert none.empty and none.columns.tolist() == ["item", "metric", "value"]


def test_an_edit_is_applied_to_questions_and_taken_back(tiny, tiny_concept):
    edit = blank(tiny, " Romans")
    ask = partial(question_scores, tiny, tiny_concept.questions)
    base, edited = ask(), ask(edit)
    with edit.applied(tiny):
        pd.testing.assert_frame_equal(ask(), edited)
    pd.testing.assert_frame_equal(ask(), base)
    changed = set(edited.item[(edited.value != base.value).to_numpy()])
    assert changed == {q.id for q in tiny_concept.questions if "Romans" in q.question}


def test_cache_keys_name_the_weights_as_they_are_and_the_dtype():
    loaded, half = make_loaded(), make_loaded()
    half.model.to(torch.bfloat16)  # the hash is that of float32
    assert half.weights_hash == loaded.weights_hash
    base = EvaluationCache.key(loaded, "x")
    with blank(loaded, " Roman").applied(loaded):
        edited, again = (EvaluationCache.key(m, "x") for m in (loaded, replace(loaded, parameter_hashes={})))
    assert edited == again and base == EvaluationCache.key(loaded, "x") == EvaluationCache.key(make_loaded(), "x")
    assert len({base, edited, EvaluationCache.key(half, "x"), EvaluationCache.key(loaded, "y")}) == 4
