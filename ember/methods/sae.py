"""Sparse autoencoders: train small ones on our own text, or read released ones through ``sae-lens``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from ember.data.ours import list_concepts, load_concept, load_shared
from ember.data.types import Concept
from ember.errors import EmberError, UnknownNameError, require_at_least
from ember.models.activations import Site, collect, tapped
from ember.models.loading import LoadedModel
from ember.models.scoring import sequence_scores
from ember.store.files import cached_tensors, digest
from ember.store.progress import bar


@dataclass(frozen=True)
class SparseAutoencoder:
    """x ≈ decode(encode(x)) for activations x [n, d] at one site, with m features.

    ``W_enc`` [d, m], ``b_enc`` [m], ``W_dec`` [m, d], ``b_dec`` [d]. Activations are multiplied by ``scale`` first;
    ``centred`` subtracts b_dec before encoding. TopK keeps the ``k`` largest features of a token, JumpReLU those above
    ``threshold`` [m]; with neither it is a ReLU. ``quality`` holds what was measured in training.
    """

    site: Site
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    k: int | None = None
    threshold: torch.Tensor | None = None
    scale: float = 1.0
    centred: bool = True
    quality: Mapping[str, float] = field(default_factory=dict)

    def pre(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations [n, m]."""
        scaled = x * self.scale
        return (scaled - self.b_dec if self.centred else scaled) @ self.W_enc + self.b_enc

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations [n, m], at least 0."""
        pre = self.pre(x)
        if self.k is not None:
            return top_k(pre, self.k)
        active = pre.clamp_min(0)
        return active if self.threshold is None else active * (pre > self.threshold)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Reconstruction [n, d] from feature activations [n, m]."""
        return (features @ self.W_dec + self.b_dec) / self.scale


def top_k(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Each row's ``k`` largest values where positive, zeros elsewhere."""
    best = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.clamp_min(0))


@dataclass(frozen=True)
class SaeTraining:
    """Settings of the small TopK autoencoders (Gao et al. 2024): width m, k, epochs over the tokens, batch, Adam."""

    width: int = 1536
    k: int = 24
    epochs: int = 4
    batch_size: int = 512
    lr: float = 2e-3
    seed: int = 0
    # No texts but the concept's own, for a quick look; the texts themselves are in the cache's key.
    concept_only: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "width", "k", "epochs", "batch_size")
        if self.k > self.width:
            raise ValueError(f"k must be 1..width = {self.width}, got {self.k}")


TRAINING = SaeTraining()
# Released ones: source and kind of site → where sae-lens finds them.
RELEASED = {
    ("gemma-scope", "residual"): ("gemma-scope-2b-pt-res-canonical", "layer_{layer}/width_16k/canonical"),
    ("gemma-scope", "mlp_out"): ("gemma-scope-2b-pt-mlp-canonical", "layer_{layer}/width_16k/canonical"),
    ("llama-scope", "residual"): ("llama_scope_lxr_8x", "l{layer}r_8x"),
    ("llama-scope", "mlp_out"): ("llama_scope_lxm_8x", "l{layer}m_8x"),
}
_PARTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def load_saes(
    loaded: LoadedModel,
    concept: Concept,
    kind: str,
    layers: Sequence[int],
    source: str,
    training: SaeTraining = TRAINING,
) -> list[SparseAutoencoder]:
    """Autoencoders for a kind of site (``residual`` or ``mlp_out``) at some layers.

    ``source="trained"`` trains them on the model as it was loaded and keeps them in the user cache; other sources are
    ``RELEASED``, which take the optional extra ``sae``. An ``UnknownNameError`` names a source or site that does not
    exist; training that would see an edited model, or no ``sae-lens``, is an ``EmberError``.
    """
    sites = [Site(kind, layer) for layer in layers]
    if source != "trained":
        return [_released(site, source, loaded) for site in sites]
    texts = (*concept.sentences, *concept.neutral) if training.concept_only else training_texts(concept)
    states: dict[Site, torch.Tensor] = {}

    def compute(site: Site) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if loaded.weights_hash != loaded.base_hash:
            raise EmberError("autoencoders are trained on the unedited model; load them before applying an edit")
        if not states:  # one pass over the texts for all sites, and only if one of them is not in the cache
            states.update(collect(loaded, texts, sites)[0])
        sae = train_sae(states[site].to(loaded.device), site, training)
        quality = {**sae.quality, **measure(loaded, sae, load_shared().neutral["test"][:20])}
        return {name: getattr(sae, name).cpu() for name in _PARTS}, {"scale": sae.scale, "quality": quality}

    saes = []
    for site in sites:
        key = digest(loaded.base_hash, loaded.dtype, site, texts, training)
        kept, about = cached_tensors("sae", f"{site.kind}-{site.layer}-{key}", partial(compute, site))
        parts: dict[str, Any] = {name: tensor.to(loaded.device) for name, tensor in kept.items()}
        saes.append(SparseAutoencoder(site, **parts, k=training.k, **about))
    return saes


def training_texts(concept: Concept) -> tuple[str, ...]:
    """All fit sentences, neutral train sentences, train instructions with responses; no text of any measurement."""
    shared = load_shared()
    concepts = [load_concept(name) for name in list_concepts()]
    sentences = dict.fromkeys(s for c in (*concepts, concept) for s in c.sentences)
    instructions = [f"{i.instruction}\n{i.response}" for i in shared.instructions if i.split == "train"]
    return (*sentences, *shared.neutral_fit, *shared.neutral["train"], *instructions)


def train_sae(states: torch.Tensor, site: Site, training: SaeTraining) -> SparseAutoencoder:
    """Train a TopK autoencoder on activations [n, d] by squared error; ``quality`` gets the share of dead features.

    The decoder starts as random unit directions and keeps unit rows; the encoder as its transpose, b_dec as the mean.
    """
    n, d = states.shape
    generator = torch.Generator().manual_seed(training.seed)
    scale = float((d / states.square().sum(1).mean()).sqrt())
    X = states * scale
    W_dec = normalize(torch.randn(training.width, d, generator=generator), dim=1).to(X)
    W_enc, b_enc, b_dec = W_dec.T.clone(), torch.zeros(training.width).to(X), X.mean(0)
    parameters = [tensor.requires_grad_(True) for tensor in (W_enc, b_enc, W_dec, b_dec)]
    optimizer = torch.optim.Adam(parameters, lr=training.lr)
    size = min(training.batch_size, n)
    steps = training.epochs * (n // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    used = torch.zeros(training.width, dtype=torch.bool, device=X.device)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(training.epochs)])
    with torch.enable_grad():
        for step in bar(range(steps), desc=f"SAE {site.kind} {site.layer}"):
            x = X[order[step * size : (step + 1) * size].to(X.device)]
            features = top_k((x - b_dec) @ W_enc + b_enc, training.k)
            loss = (features @ W_dec + b_dec - x).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                W_dec.copy_(normalize(W_dec, dim=1))
                if step >= steps - n // size:
                    used |= (features > 0).any(0)
    quality = {"tokens": n, "dead": float((~used).float().mean())}
    W_enc, b_enc, W_dec, b_dec = (parameter.detach() for parameter in parameters)
    return SparseAutoencoder(site, W_enc, b_enc, W_dec, b_dec, k=training.k, scale=scale, quality=quality)


@torch.no_grad()
def measure(loaded: LoadedModel, sae: SparseAutoencoder, texts: Sequence[str]) -> dict[str, float]:
    """Quality on held-out texts, whose first positions keep their activations.

    ``variance_explained``: 1 − squared error over squared deviation from the mean. ``loss_recovered``: the share of the
    loss gap between zeroing the activations and leaving them that their reconstruction recovers.
    """
    x = collect(loaded, texts, [sae.site])[0][sae.site].to(loaded.device)
    error = (sae.decode(sae.encode(x)) - x).square().sum()
    explained = 1 - float(error / (x - x.mean(0)).square().sum())
    sequences = [loaded.encode(text) for text in texts]

    def loss(change: Callable[[torch.Tensor], torch.Tensor]) -> float:
        with tapped(loaded, [sae.site], lambda _, v: torch.cat([v[:, :1], change(v[:, 1:].float()).to(v)], 1)):
            scores = sequence_scores(loaded, sequences, [1] * len(sequences), batch_size=16)
            return float(np.concatenate([score.loss for score in scores]).mean())

    kept, zeroed = loss(lambda v: v), loss(torch.zeros_like)
    rebuilt = loss(lambda v: sae.decode(sae.encode(v)))
    return {"variance_explained": explained, "loss_recovered": (zeroed - rebuilt) / (zeroed - kept)}


def _released(site: Site, source: str, loaded: LoadedModel) -> SparseAutoencoder:
    kinds = [kind for known, kind in RELEASED if known == source]
    if not kinds:
        raise UnknownNameError("SAE source", source, {"trained", *(known for known, _ in RELEASED)})
    if site.kind not in kinds:
        raise UnknownNameError(f"site of {source}", site.kind, kinds)
    try:
        import sae_lens
    except ImportError as error:
        raise EmberError("released autoencoders need the optional extra: pip install -e '.[sae]'") from error
    release, name = RELEASED[source, site.kind]
    sae = sae_lens.SAE.from_pretrained(release, name.format(layer=site.layer), device=str(loaded.device))
    # All of RELEASED are of this kind, and what they divide by is folded into their weights.
    kind, normalization = sae.cfg.architecture(), sae.cfg.normalize_activations
    if kind != "jumprelu":
        raise EmberError(f"a {kind} autoencoder is not supported; known: jumprelu")
    if normalization not in ("none", "expected_average_only_in"):
        raise EmberError(f"an autoencoder that normalizes by {normalization!r} is not supported")
    tensors = {name: getattr(sae, name).detach().float() for name in (*_PARTS, "threshold")}
    return SparseAutoencoder(site, **tensors, centred=bool(sae.cfg.apply_b_dec_to_input))
