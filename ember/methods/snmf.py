"""SNMF: factorize a layer's MLP neurons into features and project the concept's out of the neurons that carry them."""

from dataclasses import dataclass

import pandas as pd
import torch

from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import require_at_least
from ember.factorization import semi_nmf
from ember.methods.selection import contrast_table, contrast_texts, keyness_bits, require_some
from ember.methods.training import as_many_tokens, weights_edit
from ember.models.activations import Site, collect, layer_name, n_layers
from ember.models.loading import LoadedModel
from ember.store.files import cached_tensors, digest
from ember.store.progress import bar

BANDS = ("early", "middle", "late")


@dataclass(frozen=True)
class SnmfConfig:
    """Settings of SNMF (paper, appendix; semi-NMF of MLP activations).

    ``band`` names a third of the depth. In each of its layers, semi-NMF of rank ``rank`` with ``sparsity`` of the
    neurons a feature is fitted on ``tokens`` tokens of either text; up to ``features`` features with a keyness of
    ``min_keyness`` bits are selected. A projection of strength δ scales the component along a feature by |1 − δ|:
    ``delta_out`` or ``delta_in`` = 1 removes it, 0 leaves it, and 4 triples it with the sign flipped. ``mass`` is the
    share of a feature's weight that the neurons kept must cover.
    """

    delta_out: float = 2.0
    delta_in: float = 0.0
    band: str = "early"
    features: int = 4
    min_keyness: float = 0.5
    rank: int = 100
    sparsity: float = 0.01
    mass: float = 0.95
    tokens: int = 2500
    max_iter: int = 100
    patience: int = 10
    tol: float = 1e-3

    def __post_init__(self) -> None:
        if self.band not in BANDS:
            raise ValueError(f"band must be one of {', '.join(BANDS)}, got {self.band!r}")
        require_at_least(self, 1, "features", "rank", "tokens", "max_iter", "patience")
        for name in ("sparsity", "mass"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")


def run(loaded: LoadedModel, concept: Concept, config: SnmfConfig, *, seed: int = 42) -> Edit:
    """Project the selected features out of the MLP matrices of a band of layers.

    Output side: what a feature F[:, k] over neurons writes is f = W_out F[:, k], normalized; the columns of the neurons
    that carry it lose their component along f. Input side: the same on the rows of W_up with f = W_upᵀ F[:, k]. The
    span of all features that a neuron carries is projected out at once, so that δ = 1 leaves nothing of any of them.
    """
    fits, table = factorize(loaded, concept, config, seed=seed)
    carrying = table[table.keyness >= config.min_keyness].groupby("layer")
    chosen = require_some([rows.nlargest(config.features, "keyness") for _, rows in carrying], concept, "SNMF")
    known, values = loaded.architecture, {}
    for layer, rows in chosen.groupby("layer"):
        F = fits[int(layer)][:, rows.feature.tolist()]
        masks = torch.stack([carriers(column, config.mass) for column in F.T])
        for path, delta in ((known.mlp_down, config.delta_out), (known.mlp_up, config.delta_in)):
            if delta:
                name = f"{layer_name(loaded, int(layer), path)}.weight"
                weight = loaded.model.get_parameter(name).detach().float()
                matrix = weight.T if path == known.mlp_down else weight  # a neuron's output or input vector a row
                new = project_out(matrix, F.to(matrix), masks, delta)
                values[name] = new.T if path == known.mlp_down else new
    about = chosen[["layer", "feature", "keyness", "top_tokens"]].to_dict("records")
    return weights_edit(loaded, concept, "snmf", config, values, seed=seed, selected=about)


def factorize(
    loaded: LoadedModel, concept: Concept, config: SnmfConfig, *, seed: int
) -> tuple[dict[int, torch.Tensor], pd.DataFrame]:
    """Semi-NMF of the layers of the band, kept in the user cache: F [d_mlp, K] by layer, and a ``contrast_table``."""
    depth, third = n_layers(loaded), BANDS.index(config.band)
    first = third * depth // 3
    layers = range(first, max(first + 1, (third + 1) * depth // 3))  # at least one, however shallow the model
    settings = (config.rank, config.sparsity, config.tokens, config.max_iter, config.patience, config.tol, seed)
    texts = contrast_texts(concept)
    key = digest(loaded.weights_hash, loaded.dtype, *texts, config.band, settings)

    def compute():  # type: ignore[no-untyped-def]
        sites = [Site("neurons", layer) for layer in layers]
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for part in texts:
            order = [part[k] for k in torch.randperm(len(part), generator=generator).tolist()]
            samples.append(as_many_tokens(loaded, order, config.tokens, skip=1))
        read = [collect(loaded, sample, sites) for sample in samples]
        picks = [torch.randperm(len(ids), generator=generator)[: config.tokens] for _, ids in read]
        ids = [ids[pick] for (_, ids), pick in zip(read, picks, strict=True)]
        keyness, tensors, tables = keyness_bits(loaded, concept), {}, {}
        for site in bar(sites, desc="SNMF"):
            X = torch.cat([states[site][pick] for (states, _), pick in zip(read, picks, strict=True)])
            fit = semi_nmf(
                X, min(config.rank, *X.shape), sparsity=config.sparsity, max_iter=config.max_iter,
                patience=config.patience, tol=config.tol * float(X.square().sum()), seed=seed,
            )  # fmt: skip
            table = contrast_table(loaded, fit.G.split([len(part) for part in ids]), ids, keyness)
            tensors[str(site.layer)] = fit.F
            tables[str(site.layer)] = table.drop(columns="ratio").assign(layer=site.layer).to_dict("list")
        return tensors, tables

    tensors, tables = cached_tensors("snmf", f"{concept.slug}-{key}", compute)
    table = pd.concat([pd.DataFrame(tables[str(layer)]) for layer in layers], ignore_index=True)
    return {layer: tensors[str(layer)] for layer in layers}, table


def carriers(column: torch.Tensor, mass: float) -> torch.Tensor:
    """Mask [d_mlp] of the smallest set of neurons that covers ``mass`` of a feature's summed magnitude."""
    order = column.abs().argsort(descending=True)
    share = column.abs()[order].cumsum(0) / column.abs().sum()
    count = int((share < mass - 1e-6).sum()) + 1
    mask = torch.zeros(len(column), dtype=torch.bool)
    mask[order[:count]] = True
    return mask & (column != 0)


def project_out(matrix: torch.Tensor, F: torch.Tensor, masks: torch.Tensor, delta: float) -> torch.Tensor:
    """w ← w − δ Q Qᵀ w for each neuron's vector w (a row of ``matrix`` [d_mlp, d]).

    Q spans the directions matrixᵀ F[:, k], before any change, of the features k whose mask [K, d_mlp] has the neuron.
    """
    directions = torch.nn.functional.normalize((matrix.T @ F).T.double(), dim=1)
    new = matrix.double().clone()
    for pattern in masks[:, masks.any(0)].T.unique(dim=0):
        neurons = (pattern == masks.T).all(1)
        # Features may write along the same direction, for which a QR would make up a second one.
        basis, sizes, _ = torch.linalg.svd(directions[pattern].T, full_matrices=False)
        Q = basis[:, sizes > 1e-5 * sizes[0]]
        new[neurons] -= delta * (new[neurons] @ Q) @ Q.T
    return new.to(matrix)
