"""What the fast paths are measured against: the same work written plainly, as a first version would be.

Nothing here is used outside the benchmarks and their test.
"""

import math
from collections.abc import Callable, Sequence

import torch

from ember.data.types import Question
from ember.evaluation.letters import NEW_TOKENS, letter_prompt
from ember.models.loading import LoadedModel


def sparse_mf(X: torch.Tensor, rank: int, **settings: float) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """F, G and the loss curve of the iteration of the paper's section 3, with its stopping rule."""
    kept = math.ceil(settings.get("sparsity", 0.01) * len(X))

    def step(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        F = _regress(X.T, G)
        norms = G.norm(dim=0)
        F, G = F * norms, G / norms
        return F, _largest(_regress(X, F), kept)

    return _iterate(X, step, _noise(X, rank), settings)


def semi_nmf(X: torch.Tensor, rank: int, **settings: float) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """F, G and the loss curve of SNMF's multiplicative update (SPEC section 7), with the same stopping rule."""
    kept = math.ceil(settings.get("sparsity", 0.01) * X.shape[1])

    def step(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        F = _largest(_regress(X.T, G), kept)
        norms = G.norm(dim=0)
        F, G = F * norms, G / norms
        P, Q = X @ F, F.T @ F
        up = P.clamp(min=0) + G @ (-Q).clamp(min=0)
        down = (-P).clamp(min=0) + G @ Q.clamp(min=0)
        return F, G * torch.sqrt(up / down.clamp(min=1e-12))

    return _iterate(X, step, _noise(X, rank).abs(), settings)


def _regress(target: torch.Tensor, regressors: torch.Tensor, ridge: float = 1e-4) -> torch.Tensor:
    gram = regressors.T @ regressors + ridge * torch.eye(regressors.shape[1], dtype=regressors.dtype)
    return target @ regressors @ torch.linalg.inv(gram)


def _largest(M: torch.Tensor, kept: int) -> torch.Tensor:
    top = M.abs().topk(kept, dim=0).indices
    return torch.zeros_like(M).scatter(0, top, M.gather(0, top))


def _noise(X: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.randn(len(X), rank, generator=torch.Generator().manual_seed(42)).to(X)


def _iterate(
    X: torch.Tensor,
    step: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    G: torch.Tensor,
    settings: dict[str, float],
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    best, curve, since = (G, G), [math.inf], 0
    while len(curve) <= settings.get("max_iter", 20_000) and since < settings.get("patience", 500):
        F, G = step(G)
        loss = float(((X - G @ F.T) ** 2).sum())
        since = 0 if loss < min(curve) - settings.get("tol", 1e-4) else since + 1
        if loss < min(curve):
            best = (F, G)
        curve.append(loss)
    return *best, curve[1:]


@torch.inference_mode()
def generated_letters(loaded: LoadedModel, questions: Sequence[Question]) -> list[str]:
    """One ``generate`` call a question for up to four new tokens after the chat template, as released."""
    answers = []
    for question in questions:
        ids = torch.tensor([loaded.encode_chat(letter_prompt(question))])
        out = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=loaded.pad_id,
        )  # fmt: skip
        answers.append(loaded.decode(out[0, ids.shape[1] :].tolist()))
    return answers


@torch.inference_mode()
def separate_sequences(loaded: LoadedModel, prompt: str, questions: Sequence[Question]) -> list[list[float]]:
    """Log-likelihood of each option [questions][4], each from a full pass of its own over prompt and option."""
    scores = []
    for question in questions:
        asked = prompt.format(question=question.question)
        start, row = len(loaded.encode(asked)), []
        for option in question.options:
            ids = loaded.encode(f"{asked} {option}")
            logprobs = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            row.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))))
        scores.append(row)
    return scores


def train_padded(
    model: torch.nn.Module, sequences: Sequence[Sequence[int]], pad_id: int, *, lr: float, width: int = 256
) -> list[float]:
    """One text a step, padded to ``width``, AdamW on all parameters; the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, foreach=False)
    losses = []
    for ids in sequences:
        padded = torch.full((1, width), pad_id)
        padded[0, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(width) < len(ids)).long()[None]
        labels = padded.masked_fill(mask == 0, -100)
        loss = model(input_ids=padded, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
