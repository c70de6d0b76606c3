"""Batched log-likelihoods of continuations and texts, and greedy generation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from ember.models.loading import LoadedModel
from ember.store.progress import bar

T = TypeVar("T")
_BATCH_TOKENS = 2048  # distributions are made for no more at once: 2 GB at a vocabulary of 256,000


def continuation_ids(loaded: LoadedModel, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Split the token ids of ``prompt + continuation`` into the prompt's and the continuation's.

    A space at the end of the prompt, and a token that spans the boundary, belong to the continuation. An empty
    continuation, or nothing left to condition on, is a ``ValueError``.
    """
    if not continuation.strip():
        raise ValueError(f"empty continuation after {prompt!r}")
    whole, before = loaded.encode(prompt + continuation), loaded.encode(prompt.rstrip(" "))
    shared = 0
    while shared < min(len(before), len(whole) - 1) and before[shared] == whole[shared]:
        shared += 1
    if shared == 0:
        raise ValueError(f"no token of {prompt!r} precedes the continuation {continuation!r}")
    return whole[:shared], whole[shared:]


@torch.inference_mode()
def option_logprobs(
    loaded: LoadedModel,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    packed_tokens: int = 512,
) -> list[np.ndarray]:
    """Log-likelihood (nats, summed over tokens) of every option after its prompt.

    Each prompt runs through the model once for all its options, packed with others into ``packed_tokens``. Where one
    option merges with the prompt's last token, all are scored from that token on. Returns [n_options] for each prompt.
    """
    split = []
    for prompt, choices in zip(prompts, options, strict=True):
        pairs = [continuation_ids(loaded, prompt, choice) for choice in choices]
        shared = min(len(before) for before, _ in pairs)
        split.append((pairs[0][0][:shared], [before[shared:] + after for before, after in pairs]))

    def fits(run: Sequence[tuple[list[int], list[list[int]]]]) -> bool:
        return sum(len(prompt) + sum(len(option) - 1 for option in some) for prompt, some in run) <= packed_tokens

    packs = chain.from_iterable(_runs(chunk, fits) for chunk in _batches(split, batch_size, "options"))
    return [score for pack in packs for score in _score_options(loaded, pack)]


def _score_options(loaded: LoadedModel, pack: Sequence[tuple[list[int], list[list[int]]]]) -> list[np.ndarray]:
    """Score prompts and options (token ids) laid end to end; a token sees those before it in its prompt and option."""
    # What the model reads (nothing follows an option's last token): token, position, prompt, option or 0 in the prompt.
    read: list[tuple[int, int, int, int]] = []
    scored: list[tuple[int, int, int]] = []  # place whose distribution tells how likely the token is, token, option
    count = 0
    for k, (prompt, options) in enumerate(pack):
        read += [(token, position, k, 0) for position, token in enumerate(prompt)]
        last = len(read) - 1
        for number, option in enumerate(options, 1):
            places = [last, *range(len(read), len(read) + len(option) - 1)]
            scored += [(place, token, count) for place, token in zip(places, option, strict=True)]
            read += [(token, position, k, number) for position, token in enumerate(option[:-1], len(prompt))]
            count += 1
    ids, positions, prompts, parts = torch.tensor(read, device=loaded.device).T.contiguous()
    seen = (prompts[:, None] == prompts) & ((parts == 0) | (parts[:, None] == parts))
    place, token, option = torch.tensor(scored, device=loaded.device).T
    kept, row = place.unique(return_inverse=True)
    mask = packed_mask(loaded, seen.tril(), positions)
    inputs = {"input_ids": ids[None], "attention_mask": mask, "position_ids": positions[None]}
    logits = loaded.model(**inputs, use_cache=False, logits_to_keep=kept).logits[0]
    totals = torch.zeros(count, device=loaded.device)
    totals.index_add_(0, option, logits.float().log_softmax(-1)[row, token])
    return np.split(totals.cpu().numpy(), np.cumsum([len(options) for _, options in pack])[:-1])


def packed_mask(
    loaded: LoadedModel, seen: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """``attention_mask`` of texts laid end to end in one sequence of n tokens.

    ``seen`` [n, n] tells which tokens each token sees, ``positions`` [n] where they stand in their own text. Additive,
    [1, 1, n, n]; one for each type of layer where a sliding window would cut one of the texts.
    """

    def additive(seen: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(seen.shape, dtype=loaded.embedding.dtype, device=seen.device)
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[None, None]

    config = loaded.model.config
    window = getattr(config, "sliding_window", None)
    if window is None or int(positions.max()) < window:
        return additive(seen)
    near = additive(seen & (positions[:, None] - positions < window))
    types = getattr(config, "layer_types", None)
    return {"full_attention": additive(seen), "sliding_attention": near} if types else near


class TokenScores(NamedTuple):
    """Per-token scores of one sequence: ``loss`` and ``base_loss`` (nats) and ``kl`` (nats, base ‖ edited)."""

    loss: np.ndarray
    base_loss: np.ndarray
    kl: np.ndarray


@torch.inference_mode()
def sequence_scores(
    loaded: LoadedModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    edited: Callable[[], AbstractContextManager[None]] | None = None,
    *,
    batch_size: int = 8,
    group_tokens: int = 2048,
) -> list[TokenScores]:
    """Next-token loss with and without an edit, and the divergence between the two.

    ``edited()`` is a context in which the edit is applied, entered once for batches of ``group_tokens`` together, whose
    base distributions are held meanwhile (0.4 GB at a vocabulary of 49,152); None: there is no edit. Sequence i is
    scored from token ``starts[i]`` (at least 1) on. ``kl`` is KL(p_base ‖ p_edited) of each next-token distribution.
    """
    if any(not 1 <= start < len(sequence) for sequence, start in zip(sequences, starts, strict=True)):
        raise ValueError("every sequence needs at least one scored token after its first")

    def padded_tokens(chunk: Sequence[int]) -> int:
        return len(chunk) * max(len(sequences[i]) for i in chunk)

    scores: dict[int, TokenScores] = {}
    chunks = _batches(sorted(range(len(sequences)), key=lambda i: len(sequences[i])), batch_size, "texts")
    batches = chain.from_iterable(_runs(chunk, lambda run: padded_tokens(run) <= _BATCH_TOKENS) for chunk in chunks)
    for group in _runs(batches, lambda run: sum(map(padded_tokens, run)) <= group_tokens):
        padded = [loaded.pad([sequences[i] for i in chunk]) for chunk in group]
        bases = [_next_logprobs(loaded, ids, mask) for ids, mask in padded]
        with edited() if edited else nullcontext():
            for chunk, (ids, mask), base in zip(group, padded, bases, strict=True):
                after = _next_logprobs(loaded, ids, mask) if edited else base
                loss, base_loss = (-x.gather(2, ids[:, 1:, None]).squeeze(2).cpu().numpy() for x in (after, base))
                kl = (base.exp() * (base - after)).sum(-1).cpu().numpy() if edited else np.zeros_like(loss)
                for row, i in enumerate(chunk):
                    span = slice(starts[i] - 1, len(sequences[i]) - 1)
                    scores[i] = TokenScores(loss[row, span], base_loss[row, span], kl[row, span])
    return [scores[i] for i in range(len(sequences))]


def _next_logprobs(loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1)


@torch.inference_mode()
def generate_greedy(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 40, batch_size: int = 16
) -> list[list[int]]:
    """Greedy continuations (token ids, without the end token) of tokenized prompts."""
    results: list[list[int]] = []
    for chunk in _batches(prompts, batch_size, "generate"):
        ids, mask = loaded.pad(chunk, left=True)
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": loaded.pad_id}
        out = loaded.model.generate(input_ids=ids, attention_mask=mask, **settings)
        for row in out[:, ids.shape[1] :].tolist():
            stop = next((k for k, i in enumerate(row) if i in loaded.special_ids), len(row))
            results.append(row[:stop])
    return results


def _batches(items: Sequence[T], size: int, label: str) -> Iterable[Sequence[T]]:
    return bar([items[i : i + size] for i in range(0, len(items), size)], desc=label)


def _runs(items: Iterable[T], fits: Callable[[list[T]], bool]) -> Iterator[list[T]]:
    """The items in order, in runs that fit; one that fits nowhere makes a run of its own."""
    run: list[T] = []
    for item in items:
        if run and not fits([*run, item]):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
