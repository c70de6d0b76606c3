"""Which features of a layer are active on concept text and not on neutral text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ember.data import Concept
from ember.errors import EmberError
from ember.models import LoadedModel
from ember.tokens import token_table


@dataclass(frozen=True)
class ContrastText:
    """Token ids of the forget and retain activations, and the keyness (bits) of each token of the vocabulary."""

    forget: torch.Tensor
    retain: torch.Tensor
    keyness: torch.Tensor


def keyness_bits(loaded: LoadedModel, concept: Concept) -> torch.Tensor:
    """Keyness of every token [vocab]: 0 for all but significant concept-only tokens (``ember.tokens``)."""
    table = token_table(loaded, concept.sentences, concept.neutral, concept.further_neutral)
    key = table[table.key.astype(bool) & (table.role == "concept")]
    bits = torch.zeros(loaded.embedding.shape[0])
    bits[torch.tensor(key.token_id.to_numpy())] = torch.tensor(key.keyness.to_numpy(), dtype=torch.float32)
    return bits


def contrast_table(
    loaded: LoadedModel, forget: torch.Tensor, retain: torch.Tensor, text: ContrastText, *, top: int = 10
) -> pd.DataFrame:
    """Evidence on every feature from its activations on forget [n, K] and retain [m, K] tokens, all ≥ 0.

    Columns
    -------
    feature
        Index k.
    forget, retain
        Mean activation on either text.
    ratio
        forget ÷ retain; infinite where no retain token is active.
    keyness
        Activation-weighted mean keyness (bits) over both texts, as in ``ember.features``.
    top_tokens
        The most activating tokens, each once.
    """
    means = forget.mean(0), retain.mean(0)
    mass = (forget.sum(0) + retain.sum(0)).clamp_min(torch.finfo(forget.dtype).tiny)
    bits = text.keyness[text.forget].to(forget) @ forget + text.keyness[text.retain].to(retain) @ retain
    both, ids = torch.cat([forget, retain]), torch.cat([text.forget, text.retain])
    best = both.topk(min(5 * top, len(both)), dim=0)
    tokens = []
    for k in range(both.shape[1]):
        active = best.indices[:, k][best.values[:, k] > 0]
        words = dict.fromkeys(loaded.tokenizer.decode([i]).strip() for i in ids[active].tolist())
        tokens.append(" ".join(list(words)[:top]))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = means[0].double().cpu().numpy() / means[1].double().cpu().numpy()
    return pd.DataFrame(
        {
            "feature": range(both.shape[1]),
            "forget": means[0].tolist(),
            "retain": means[1].tolist(),
            "ratio": ratio,
            "keyness": (bits / mass).tolist(),
            "top_tokens": tokens,
        }
    )


def strongest(table: pd.DataFrame, count: int, *, min_ratio: float) -> pd.DataFrame:
    """The ``count`` features whose mean activation differs most, among those with ratio ≥ ``min_ratio``."""
    fit = table[table.ratio >= min_ratio]
    return fit.assign(gap=fit.forget - fit.retain).nlargest(count, "gap").drop(columns="gap")


def require_some(chosen: Sequence[pd.DataFrame], concept: Concept, what: str) -> pd.DataFrame:
    """All selected features in one table; none at all is an error."""
    table = pd.concat(chosen, ignore_index=True) if chosen else pd.DataFrame()
    if table.empty:
        raise EmberError(f"no {what} feature is much more active on {concept.name!r} than on neutral text")
    return table
