"""Which features of a layer are active on concept text and not on neutral text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from ember.data.types import Concept
from ember.errors import NothingFoundError
from ember.methods.sae import SparseAutoencoder
from ember.models.activations import collect
from ember.models.loading import LoadedModel, tensor_hash
from ember.store.files import cached_tensors, digest
from ember.tokens import token_table


def forget_texts(concept: Concept) -> tuple[str, ...]:
    """The concept's fit sentences. Paragraphs are for relearning, and questions for the evaluation: neither is here."""
    return concept.sentences


def retain_texts(concept: Concept) -> tuple[str, ...]:
    """All neutral sentences of the fit."""
    return (*concept.neutral, *concept.further_neutral)


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
        raise NothingFoundError(f"no {what} feature is much more active on {concept.name!r} than on neutral text")
    return table


def select_features(
    loaded: LoadedModel,
    concept: Concept,
    saes: Sequence[SparseAutoencoder],
    count: int,
    min_ratio: float,
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """Features much more active on concept than on neutral text: layer, feature, forget, retain, top_tokens.

    Kept in the user cache, because every strength of a method shares it.
    """
    texts = (forget_texts(concept), retain_texts(concept))

    def compute() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        sites = [sae.site for sae in saes]
        found = [collect(loaded, part, sites, progress=progress) for part in texts]
        text = ContrastText(found[0][1], found[1][1], keyness_bits(loaded, concept))
        tables = []
        for sae in saes:
            forget, retain = (sae.encode(states[sae.site].to(sae.W_enc)).cpu() for states, _ in found)
            table = contrast_table(loaded, forget, retain, text)
            tables.append(strongest(table, count, min_ratio=min_ratio).assign(layer=sae.site.layer))
        chosen = require_some(tables, concept, "SAE")
        return {}, {c: chosen[c].tolist() for c in ("layer", "feature", "forget", "retain", "keyness", "top_tokens")}

    parts = [
        (sae.k, sae.scale, sae.centred, *(None if t is None else tensor_hash(t) for t in tensors))
        for sae in saes
        for tensors in [(sae.W_enc, sae.b_enc, sae.b_dec, sae.threshold)]
    ]
    key = digest(loaded.weights_hash, loaded.dtype, texts, [sae.site for sae in saes], parts, count, min_ratio)
    return pd.DataFrame(cached_tensors("selection", f"{concept.slug}-{key}", compute)[1])
