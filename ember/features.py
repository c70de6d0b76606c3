"""Scoring a factorization's features, selecting the concept's, and keeping both in portable files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from ember.data.types import Concept
from ember.errors import DamagedFileError, EmberError, NothingFoundError, UnknownNameError
from ember.factorization import Factorization, sparse_mf
from ember.models.loading import LoadedModel
from ember.store.files import digest, read_sealed, sealed_dir
from ember.store.paths import cache_dir
from ember.tokens import token_table

MANIFEST = "features.json"
RULES = ("keyness", "paper")
PRECISIONS = ("float64", "float32")
KEYNESS_THRESHOLD = 0.6  # bits; concept features stand well above it and all others below, over many seeds
PAPER_RATIO = 2.0
_FIT_DEFAULTS = {
    name: signature(sparse_mf).parameters[name].default for name in ("sparsity", "ridge", "max_iter", "patience", "tol")
}


@dataclass(frozen=True)
class ConceptFeatures:
    """A factorization of V' with the evidence on each of its features.

    ``table`` is the token table (n rows, in the order of G's), ``factorization`` holds F [d_model, K] and G [n, K]
    in the units of the scaled embeddings, ``scores`` one row a feature (see ``score_features``).
    """

    concept: str
    model: str
    weights_hash: str
    table: pd.DataFrame
    factorization: Factorization
    scores: pd.DataFrame
    settings: dict[str, Any]

    def select(
        self, *, rule: str = "keyness", threshold: float | None = None, features: Sequence[int] | None = None
    ) -> list[int]:
        """Features that carry the concept, best first.

        ``rule="keyness"`` takes those whose score is at least ``threshold`` (default 0.6 bits); ``rule="paper"`` those
        with ratio_abs ≥ 2, the candidates of the paper, which an LLM judge then thins out. A list of ``features``
        overrides both. If nothing is selected, a ``NothingFoundError`` names the best features.
        """
        if features is not None:
            if not features or len(set(features)) < len(features) or set(features) - set(self.scores.feature):
                last = len(self.scores) - 1
                raise EmberError(f"features must be different numbers in 0..{last}, got {list(features)}")
            return list(features)
        if rule not in RULES:
            raise EmberError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
        column, default = {"keyness": ("score", KEYNESS_THRESHOLD), "paper": ("ratio_abs", PAPER_RATIO)}[rule]
        bound = default if threshold is None else threshold
        ranked = self.scores.sort_values(column, ascending=False)
        chosen = ranked[ranked[column] >= bound].feature.tolist()
        if not chosen:
            best = "; ".join(f"{r.feature} ({getattr(r, column):.2f}: {r.top_tokens})" for r in ranked[:3].itertuples())
            raise NothingFoundError(
                f"no feature of {self.concept!r} reaches {column} ≥ {bound}. The best are {best}. "
                "Lower the threshold, raise the rank, or name features yourself."
            )
        return chosen

    def contributions(self, selected: Sequence[int], *, max_zipf: float | None = None) -> dict[int, torch.Tensor]:
        """c_i = F[:, S] G[i, S]ᵀ for each ``concept`` token i with a non-zero activation (paper, section 3).

        Maps token ids to vectors [d_model], in the units of the scaled embeddings. With ``max_zipf`` (log10 of the
        occurrences per billion words of general English) more frequent tokens are left out, whichever role a few
        sentences gave them. Tokens that are no words have no frequency, and stay.
        """
        G = self.factorization.G[:, list(selected)]
        active = (G != 0).any(dim=1).cpu().numpy() & (self.table.role == "concept").to_numpy()
        if max_zipf is not None:
            active &= ~(self.table.zipf > max_zipf).to_numpy()
        vectors = G @ self.factorization.F[:, list(selected)].T
        return {int(self.table.token_id.iloc[i]): vectors[i] for i in np.flatnonzero(active)}

    def save(self, folder: str | Path) -> Path:
        """Write ``features.safetensors`` and ``features.json``; whole or not at all."""
        tensors = {"F": self.factorization.F.contiguous(), "G": self.factorization.G.contiguous()}
        tensors["loss_curve"] = torch.tensor(self.factorization.loss_curve, dtype=torch.float64)
        about = {
            "concept": self.concept, "model": self.model, "weights_hash": self.weights_hash,
            "converged": self.factorization.converged, "settings": self.settings,
            "table": self.table.to_dict("list"), "scores": self.scores.to_dict("list"),
        }  # fmt: skip
        with sealed_dir(Path(folder), about, manifest=MANIFEST) as target:
            save_file(tensors, target / "features.safetensors")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "ConceptFeatures":
        """Read what ``save`` wrote; a missing or damaged file is an error that names it."""
        about = read_sealed(Path(folder), manifest=MANIFEST)
        try:
            arrays = load_file(Path(folder) / "features.safetensors")
            curve = tuple(arrays["loss_curve"].tolist())
            fit = Factorization(arrays["F"], arrays["G"], curve, about["converged"])
            table, scores = pd.DataFrame(about["table"]), pd.DataFrame(about["scores"])
            return cls(about["concept"], about["model"], about["weights_hash"], table, fit, scores, about["settings"])
        except (OSError, KeyError) as error:
            raise DamagedFileError(f"{folder} does not hold a whole factorization: {error!r}") from error


def concept_features(
    loaded: LoadedModel,
    concept: Concept,
    *,
    rank: int = 300,
    seed: int = 42,
    precision: str = "float64",
    cache: bool = True,
    **fit: Any,
) -> ConceptFeatures:
    """Factorize the embeddings of the concept's V' and score the features.

    The fit runs on the CPU in ``precision``. In float32 rounding alone, such as another order of summation, decides
    which features come out; in float64 they come back (``ember.evaluation.stability``). F and G are kept in float32.
    ``fit`` holds other settings of ``sparse_mf``, whose defaults and errors apply. The result is kept in the user cache
    under a key of the weights, the texts and every setting, so that notebooks and methods share one fit;
    ``cache=False`` neither reads nor writes it.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    settings = _FIT_DEFAULTS | fit | {"rank": rank, "seed": seed}
    chosen = settings | {"precision": precision}
    texts = (concept.sentences, concept.neutral, concept.further_neutral)
    key = digest(loaded.weights_hash, *texts, sorted(chosen.items()))
    folder = cache_dir() / "features" / f"{concept.slug}-{key}"
    if cache and folder.exists():
        kept = ConceptFeatures.load(folder)
        # The fit is what takes time; how features are scored may have changed since.
        return replace(kept, scores=score_features(kept.table, kept.factorization.G))
    table = token_table(loaded, *texts)
    X = scaled_rows(loaded, table, precision)
    exact = sparse_mf(X, **settings)
    factorization = replace(exact, F=exact.F.float(), G=exact.G.float())
    scores = score_features(table, factorization.G)
    features = ConceptFeatures(
        concept.name, loaded.name, loaded.weights_hash, table, factorization, scores, chosen | about_model(loaded)
    )
    if cache:
        features.save(folder)
    return features


def scaled_rows(loaded: LoadedModel, table: pd.DataFrame, precision: str = "float64") -> torch.Tensor:
    """X [n, d_model] on the CPU: the token table's embeddings times the model's scale (SPEC: E restricted to V')."""
    rows = loaded.embedding.detach()[table.token_id.tolist()].cpu()
    return rows.to(getattr(torch, precision)) * loaded.embedding_scale


def about_model(loaded: LoadedModel) -> dict[str, Any]:
    """What a factorization's record needs to know of the model."""
    return {"spec": asdict(loaded.spec), "dtype": loaded.dtype, "embedding_scale": loaded.embedding_scale}


def score_features(table: pd.DataFrame, G: torch.Tensor, *, top: int = 10) -> pd.DataFrame:
    """Evidence on every feature, from its activations G [n, K] and the token table (n rows).

    Columns
    -------
    feature
        Index k.
    score
        Keyness in bits: the activation-weighted mean, over the feature's whole mass |G|, of the keyness of tokens
        that occur only in concept sentences and significantly more often there than in general English; all other
        mass counts 0. A feature at 1 has half its mass on tokens four times as frequent as expected, say.
    key_share, concept_share, ordinary_share
        Share of |G| on key concept tokens, on all concept tokens, and on ordinary words among the latter.
    ratio_abs
        The paper's: mean |G| over ``concept`` tokens ÷ mean over ``neutral`` tokens; NaN where no neutral token is
        active.
    rows
        How many ``concept`` tokens are active: the rows an edit by this feature touches.
    top_tokens
        The ``top`` most activating tokens, each form once, with * on shared and - on neutral ones.
    """
    A = G.abs().double().cpu().numpy()
    mass = np.maximum(A.sum(0), np.finfo(float).tiny)
    concept, neutral = (table.role == "concept").to_numpy(), (table.role == "neutral").to_numpy()
    key = concept & table.key.to_numpy(dtype=bool)
    ordinary = concept & table.ordinary.to_numpy(dtype=bool)
    bits = np.where(key, table.keyness.to_numpy(dtype=float), 0.0)
    neutral_mean = A[neutral].mean(0) if neutral.any() else np.zeros(A.shape[1])
    ratio = np.divide(A[concept].mean(0), neutral_mean, out=np.full(A.shape[1], np.nan), where=neutral_mean > 0)
    marks = {"concept": "", "shared": "*", "neutral": "-"}
    labels = [f"{token.strip()}{marks[role]}" for token, role in zip(table.token, table.role, strict=True)]
    order = np.argsort(-A, axis=0, kind="stable")[:top]
    scores = pd.DataFrame(
        {
            "feature": range(A.shape[1]),
            "score": bits @ A / mass,
            "key_share": A[key].sum(0) / mass,
            "concept_share": A[concept].sum(0) / mass,
            "ordinary_share": A[ordinary].sum(0) / np.maximum(A[concept].sum(0), np.finfo(float).tiny),
            "ratio_abs": ratio,
            "rows": (A[concept] > 0).sum(0),
            "top_tokens": [
                " ".join(dict.fromkeys(labels[i] for i in order[:, k] if A[i, k] > 0)) for k in range(A.shape[1])
            ],
        }
    )
    return scores.sort_values("score", ascending=False, ignore_index=True)
