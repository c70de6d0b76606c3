"""Which features of a layer are active on concept text and not on neutral text; those of autoencoders, for a method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch

from ember.data.types import Concept
from ember.errors import NothingFoundError, require_at_least
from ember.methods.sae import TRAINING, SaeTraining, SparseAutoencoder, load_saes
from ember.models.activations import collect, n_layers
from ember.models.loading import LoadedModel
from ember.models.weights import tensor_hash
from ember.store.files import cached_tensors, digest
from ember.tokens import token_table

Pair = Sequence[torch.Tensor]  # on forget and on retain text


def contrast_texts(concept: Concept) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to forget and what to retain: the concept's fit sentences, and all neutral ones of the fit."""
    return concept.sentences, (*concept.neutral, *concept.further_neutral)


def keyness_bits(loaded: LoadedModel, concept: Concept) -> torch.Tensor:
    """Keyness of every token [vocab]: 0 for all but significant concept-only tokens (``ember.tokens``)."""
    table = token_table(loaded, concept.sentences, concept.neutral, concept.further_neutral)
    key = table[table.key.astype(bool) & (table.role == "concept")]
    bits = torch.zeros(loaded.embedding.shape[0])
    bits[torch.tensor(key.token_id.to_numpy())] = torch.tensor(key.keyness.to_numpy(), dtype=torch.float32)
    return bits


def contrast_table(
    loaded: LoadedModel, states: Pair, ids: Pair, vocabulary_keyness: torch.Tensor, *, top: int = 10
) -> pd.DataFrame:
    """Evidence on every feature from its activations ``states`` on forget [n, K] and retain [m, K] tokens, all ≥ 0.

    ``ids`` are the tokens'. Columns: feature (index k); forget and retain, the mean activation on either text; ratio,
    forget ÷ retain (infinite where no retain token is active); keyness, the activation-weighted mean (bits) over both
    texts as in ``ember.features``; top_tokens, the most activating tokens, each once.
    """
    forget, retain = states
    mass = (forget.sum(0) + retain.sum(0)).clamp_min(torch.finfo(forget.dtype).tiny)
    on_forget, on_retain = (vocabulary_keyness[part].to(forget) @ x for part, x in zip(ids, states, strict=True))
    both, tokens_of = torch.cat([*states]), torch.cat([*ids])
    best = both.topk(min(5 * top, len(both)), dim=0)
    tokens = []
    for k in range(both.shape[1]):
        active = best.indices[:, k][best.values[:, k] > 0]
        words = dict.fromkeys(loaded.tokenizer.decode([i]).strip() for i in tokens_of[active].tolist())
        tokens.append(" ".join(list(words)[:top]))
    columns = {"forget": forget.mean(0), "retain": retain.mean(0), "keyness": (on_forget + on_retain) / mass}
    table = pd.DataFrame({name: column.tolist() for name, column in columns.items()})
    ratio = (columns["forget"].double() / columns["retain"].double()).tolist()
    return table.assign(feature=range(len(table)), ratio=ratio, top_tokens=tokens)


def strongest(table: pd.DataFrame, count: int, *, min_ratio: float) -> pd.DataFrame:
    """The ``count`` features whose mean activation differs most, among those with ratio ≥ ``min_ratio``."""
    fit = table[table.ratio >= min_ratio]
    return fit.assign(gap=fit.forget - fit.retain).nlargest(count, "gap").drop(columns="gap")


def require_some(chosen: Sequence[pd.DataFrame], concept: Concept, what: str) -> pd.DataFrame:
    """All selected features in one table; that there is none is a ``NothingFoundError``."""
    table = pd.concat(chosen, ignore_index=True) if chosen else pd.DataFrame()
    if table.empty:
        raise NothingFoundError(f"no {what} feature is much more active on {concept.name!r} than on neutral text")
    return table


@dataclass(frozen=True)
class SaeConfig:
    """Settings of the methods that select features of sparse autoencoders.

    ``layers`` have an autoencoder each, from the source ``sae`` (``ember.methods.sae``); ``sae_training`` is how those
    trained here are trained. Of each, up to ``features`` features are selected: most active on concept text, with a
    mean activation at least ``min_ratio`` times that on neutral text. ``site`` is the kind of place they sit at.
    """

    site: ClassVar[str]

    layers: tuple[int, ...]
    features: int
    min_ratio: float = 3.0
    sae: str = "trained"
    sae_training: SaeTraining = TRAINING

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.sae_training, dict):
            object.__setattr__(self, "sae_training", SaeTraining(**self.sae_training))
        if not self.layers:
            raise ValueError("layers must name at least one layer")
        require_at_least(self, 1, "features")


def prepare(loaded: LoadedModel, concept: Concept, config: SaeConfig) -> list[SparseAutoencoder]:
    """The method's autoencoders (``load_saes``); a ``ValueError`` if the model lacks one of the layers."""
    depth = n_layers(loaded)
    if not 0 <= min(config.layers) <= max(config.layers) < depth:
        raise ValueError(f"layers must be 0..{depth - 1}, got {config.layers}")
    return load_saes(loaded, concept, config.site, config.layers, config.sae, config.sae_training)


def select_features(
    loaded: LoadedModel, concept: Concept, saes: list[SparseAutoencoder], config: SaeConfig
) -> pd.DataFrame:
    """Features much more active on concept than on neutral text, kept in the user cache for a method's other strengths.

    Columns: layer, feature, forget, retain, keyness, top_tokens (``contrast_table``).
    """
    texts = contrast_texts(concept)

    def compute() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        read, ids = zip(*(collect(loaded, part, sites) for part in texts), strict=True)
        keyness, tables = keyness_bits(loaded, concept), []
        for sae in saes:
            features = [sae.encode(states[sae.site].to(sae.W_enc)).cpu() for states in read]
            table = contrast_table(loaded, features, ids, keyness)
            tables.append(strongest(table, config.features, min_ratio=config.min_ratio).assign(layer=sae.site.layer))
        chosen = require_some(tables, concept, "SAE")
        return {}, {c: chosen[c].tolist() for c in ("layer", "feature", "forget", "retain", "keyness", "top_tokens")}

    sites, encoders = [sae.site for sae in saes], []
    for sae in saes:  # all that its activations depend on
        weights = (sae.W_enc, sae.b_enc, sae.b_dec, sae.threshold)
        encoders.append((sae.k, sae.scale, sae.centred, *(x if x is None else tensor_hash(x) for x in weights)))
    key = digest(loaded.weights_hash, loaded.dtype, texts, sites, encoders, config.features, config.min_ratio)
    return pd.DataFrame(cached_tensors("selection", f"{concept.slug}-{key}", compute)[1])


def on_record(chosen: pd.DataFrame, saes: list[SparseAutoencoder]) -> dict[str, Any]:
    """What an edit's provenance says of the features selected and of their autoencoders' quality."""
    about = [{"site": sae.site.kind, "layer": sae.site.layer, "width": len(sae.b_enc), **sae.quality} for sae in saes]
    return {"selected": chosen.to_dict("records"), "autoencoders": about}
