"""Batched log-likelihoods of continuations and texts, and greedy generation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ember.models.loading import LoadedModel
from ember.store.progress import bar

_GROUP_TOKENS = 1500  # whole distributions are held for so many: 0.3 GB at a vocabulary of 49,152
_PACKED_TOKENS = 512  # attention looks at each of them from each
_BATCH_TOKENS = 2048  # and made for no more at once: 2 GB at a vocabulary of 256,000


def continuation_ids(loaded: LoadedModel, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Split the token ids of ``prompt + continuation`` into the prompt's and the continuation's.

    A space at the end of the prompt moves to the continuation, and a token that spans the boundary belongs to the
    continuation, so that everything the continuation needs is scored.

    Raises
    ------
    ValueError
        If the continuation is empty, or nothing is left to condition on.
    """
    if not continuation.strip():
        raise ValueError(f"empty continuation after {prompt!r}")
    stripped = prompt.rstrip(" ")
    whole = loaded.encode(prompt + continuation)
    before = loaded.encode(stripped)
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
    progress: bool = False,
) -> list[np.ndarray]:
    """Log-likelihood (nats, summed over tokens) of every option after its prompt.

    Each prompt runs through the model once and serves all its options. Where one option merges with the prompt's last
    token, all of them are scored from that token on. Returns one array [n_options] a prompt.
    """
    split = []
    for prompt, choices in zip(prompts, options, strict=True):
        pairs = [continuation_ids(loaded, prompt, choice) for choice in choices]
        shared = min(len(before) for before, _ in pairs)
        split.append(_Branches(pairs[0][0][:shared], [before[shared:] + after for before, after in pairs]))
    scores: list[np.ndarray] = []
    for chunk in _batches(list(range(len(split))), batch_size, progress, "options"):
        for pack in _packs([split[i] for i in chunk]):
            scores += _score_options(loaded, pack)
    return scores


class _Branches(NamedTuple):
    """Token ids of a prompt and of the options that follow it."""

    prompt: list[int]
    options: list[list[int]]

    @property
    def read(self) -> int:
        """How many tokens the model reads: nothing follows an option's last token."""
        return len(self.prompt) + sum(len(option) - 1 for option in self.options)


def _packs(branches: Sequence[_Branches]) -> Iterator[list[_Branches]]:
    """Runs of at most ``_PACKED_TOKENS`` tokens, or of one longer prompt with its options."""
    pack: list[_Branches] = []
    for one in branches:
        if pack and sum(other.read for other in (*pack, one)) > _PACKED_TOKENS:
            yield pack
            pack = []
        pack.append(one)
    yield pack


def _score_options(loaded: LoadedModel, pack: Sequence[_Branches]) -> list[np.ndarray]:
    """Score prompts and options laid end to end, without padding.

    A token sees those before it in its prompt and its option: ``owner`` holds, of each token, its prompt and its option
    (0: it belongs to the prompt). What the model gives at a row of ``kept`` scores the tokens that ``scored`` pairs
    with it.
    """
    ids: list[int] = []
    positions: list[int] = []
    owner: list[tuple[int, int]] = []
    kept: list[int] = []
    scored: list[tuple[int, int, int]] = []  # row of kept, token, option
    count = 0
    for k, (prompt, options) in enumerate(pack):
        ids += prompt
        positions += range(len(prompt))
        owner += [(k, 0)] * len(prompt)
        kept.append(len(ids) - 1)
        last = len(kept) - 1
        for number, option in enumerate(options, 1):
            rows = [last, *range(len(kept), len(kept) + len(option) - 1)]
            scored += [(row, token, count) for row, token in zip(rows, option, strict=True)]
            count += 1
            kept += range(len(ids), len(ids) + len(option) - 1)
            ids += option[:-1]
            positions += range(len(prompt), len(prompt) + len(option) - 1)
            owner += [(k, number)] * (len(option) - 1)
    where = torch.tensor(positions, device=loaded.device)
    prompts, parts = torch.tensor(owner, device=loaded.device).T
    seen = (prompts[:, None] == prompts) & ((parts == 0) | (parts[:, None] == parts))
    logits = loaded.model(
        input_ids=torch.tensor([ids], device=loaded.device),
        attention_mask=packed_mask(loaded, seen.tril(), where),
        position_ids=where[None],
        use_cache=False,
        logits_to_keep=torch.tensor(kept, device=loaded.device),
    ).logits[0]
    row, token, option = torch.tensor(scored, device=loaded.device).T
    totals = torch.zeros(count, device=loaded.device)
    totals.index_add_(0, option, logits.float().log_softmax(-1)[row, token])
    return np.split(totals.cpu().numpy(), np.cumsum([len(options) for _, options in pack])[:-1])


def packed_mask(
    loaded: LoadedModel, seen: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """``attention_mask`` of texts laid end to end in one sequence of n tokens.

    ``seen`` [n, n] tells which tokens each token sees, ``positions`` [n] where they stand in their own text. The mask
    is additive, [1, 1, n, n]; it is one for each type of layer where a sliding window would cut one of the texts.
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


@dataclass(frozen=True)
class TokenScores:
    """Per-token scores of one sequence: ``loss`` and ``base_loss`` (nats) and ``kl`` (nats, base ‖ edited)."""

    loss: np.ndarray
    base_loss: np.ndarray
    kl: np.ndarray


@torch.inference_mode()
def sequence_losses(
    loaded: LoadedModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> list[np.ndarray]:
    """Next-token loss (nats) of each token of sequence i from token ``starts[i]`` (at least 1) on."""
    losses: list[np.ndarray] = [np.empty(0)] * len(sequences)
    for chunk in _text_batches(_scorable(sequences, starts), sequences, batch_size, progress):
        ids, mask = loaded.pad([list(sequences[i]) for i in chunk])
        rows = _token_losses(_next_logprobs(loaded, ids, mask), ids)
        for row, i in zip(rows, chunk, strict=True):
            losses[i] = row[starts[i] - 1 : len(sequences[i]) - 1]
    return losses


@torch.inference_mode()
def sequence_scores(
    loaded: LoadedModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    edited: Callable[[], AbstractContextManager[None]] | None = None,
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> list[TokenScores]:
    """Next-token loss with and without an edit, and the divergence between the two.

    ``edited()`` is a context in which the edit is applied, entered for some texts at a time; None: there is no edit.
    Sequence i is scored from token ``starts[i]`` (at least 1) on. ``kl`` is KL(p_base ‖ p_edited) of each next-token
    distribution.
    """
    scores: list[TokenScores | None] = [None] * len(sequences)
    for group in _groups(_scorable(sequences, starts), sequences, batch_size, progress):
        batches = [loaded.pad([list(sequences[i]) for i in chunk]) for chunk in group]
        bases = [_next_logprobs(loaded, ids, mask) for ids, mask in batches]
        with edited() if edited else nullcontext():
            for chunk, (ids, mask), base in zip(group, batches, bases, strict=True):
                after = _next_logprobs(loaded, ids, mask) if edited else base
                kl = (base.exp() * (base - after)).sum(-1).cpu().numpy()
                loss, base_loss = _token_losses(after, ids), _token_losses(base, ids)
                for row, i in enumerate(chunk):
                    span = slice(starts[i] - 1, len(sequences[i]) - 1)
                    scores[i] = TokenScores(loss[row, span], base_loss[row, span], kl[row, span])
    return [score for score in scores if score is not None]


def _scorable(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
    """Positions of the sequences, short ones first; each must have something to score."""
    if any(not 1 <= start < len(sequence) for sequence, start in zip(sequences, starts, strict=True)):
        raise ValueError("every sequence needs at least one scored token after its first")
    return sorted(range(len(sequences)), key=lambda i: len(sequences[i]))


def _groups(
    order: list[int], sequences: Sequence[Sequence[int]], size: int, progress: bool
) -> Iterator[list[list[int]]]:
    """Batches in groups of about ``_GROUP_TOKENS`` tokens, for which an edit is applied once."""
    group: list[list[int]] = []
    tokens = 0
    for chunk in _text_batches(order, sequences, size, progress):
        group.append(chunk)
        tokens += len(chunk) * max(len(sequences[i]) for i in chunk)
        if tokens >= _GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _text_batches(
    order: list[int], sequences: Sequence[Sequence[int]], size: int, progress: bool
) -> Iterator[list[int]]:
    """Batches of at most ``size`` sequences and, padded, ``_BATCH_TOKENS`` tokens, or of one longer sequence."""
    for chunk in _batches(order, size, progress, "texts"):
        part: list[int] = []
        for i in chunk:
            if part and (len(part) + 1) * max(len(sequences[k]) for k in (*part, i)) > _BATCH_TOKENS:
                yield part
                part = []
            part.append(i)
        yield part


def _token_losses(logprobs: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    return np.asarray(-logprobs.gather(2, ids[:, 1:, None]).squeeze(2).cpu().numpy())


def _next_logprobs(loaded: LoadedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1)


@torch.inference_mode()
def generate_greedy(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 40,
    batch_size: int = 16,
    progress: bool = False,
) -> list[list[int]]:
    """Greedy continuations (token ids, without the end token) of tokenized prompts."""
    results: list[list[int]] = []
    for chunk in _batches(list(range(len(prompts))), batch_size, progress, "generate"):
        ids, mask = loaded.pad([list(prompts[i]) for i in chunk], left=True)
        out = loaded.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=loaded.pad_id,
        )
        for row in out[:, ids.shape[1] :].tolist():
            stop = next((k for k, i in enumerate(row) if i in loaded.special_ids), len(row))
            results.append(row[:stop])
    return results


def _batches(order: list[int], size: int, progress: bool, label: str) -> Iterator[list[int]]:
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    return iter(bar(chunks, show=progress, desc=label))
