"""Sparse autoencoders: their arithmetic against a slow loop, training, quality, cache, and released ones."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import NEUTRAL, SENTENCES, SMALL_SAES, make_concept, make_loaded, noise

from ember.data.ours import list_concepts, load_concept, load_shared
from ember.errors import EmberError, UnknownNameError
from ember.methods import sae as module
from ember.methods.sae import RELEASED, SaeTraining, SparseAutoencoder, measure, train_sae, training_texts
from ember.models.activations import Site, collect

SITE = Site("residual", 0)
PARTS = ("W_enc", "b_enc", "W_dec", "b_dec")
KINDS = {"topk": {"k": 3}, "every": {"k": 12}, "jumprelu": {"threshold": torch.linspace(0, 2, 12)}, "relu": {}}
load_saes = partial(module.load_saes, source="trained", training=SMALL_SAES)


def random_sae(**options) -> SparseAutoencoder:
    """Twelve features in five dimensions."""
    return SparseAutoencoder(SITE, noise(5, 12, seed=1), noise(12, seed=2), noise(12, 5, seed=3), noise(5), **options)


def slow(sae: SparseAutoencoder, token: list[float]) -> tuple[list[float], list[float]]:
    """Features and reconstruction of one token."""
    x = [sae.scale * value - (float(b) if sae.centred else 0.0) for value, b in zip(token, sae.b_dec, strict=True)]
    pre = [float(sae.b_enc[f]) + sum(x[i] * float(sae.W_enc[i, f]) for i in range(5)) for f in range(12)]
    kept = sorted(range(12), key=lambda f: -pre[f])[: sae.k or 12]
    if sae.threshold is not None:
        kept = [f for f in range(12) if pre[f] > float(sae.threshold[f])]
    features = [max(pre[f], 0.0) if f in kept else 0.0 for f in range(12)]
    written = [sum(a * float(row[i]) for a, row in zip(features, sae.W_dec, strict=True)) for i in range(5)]
    return features, [(value + float(b)) / sae.scale for value, b in zip(written, sae.b_dec, strict=True)]


@pytest.mark.parametrize("kind", KINDS)  # with k = 12 too no negative feature is kept
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_encoding_and_decoding_equal_a_slow_loop(kind, centred, scale):
    sae, x = random_sae(**KINDS[kind], centred=centred, scale=scale), 2 * noise(40, 5, seed=9)
    features = sae.encode(x)
    expected, rebuilt = (torch.tensor(part) for part in zip(*(slow(sae, token) for token in x.tolist()), strict=True))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(features), rebuilt, atol=1e-4, rtol=1e-4)
    assert 0 < (features > 0).float().mean() < 0.9
    assert torch.equal(sae.encode(x.reshape(8, 5, 5)).reshape(40, 12), features)


TRAINING = SaeTraining(width=32, k=3, epochs=60, batch_size=128, lr=1e-2)


def planted(n: int = 2000, d: int = 24, m: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [n, d], off centre; the unit directions [m, d] in them and how active these are [n, m]."""
    directions = torch.nn.functional.normalize(noise(m, d, seed=4), dim=1)
    generator = torch.Generator().manual_seed(5)
    active = (torch.rand(n, m, generator=generator) < 0.1) * (1 + torch.rand(n, m, generator=generator))
    return 3 * active @ directions + 0.5 + 0.01 * noise(n, d, seed=6), directions, active


def explained(x: torch.Tensor, rebuilt: torch.Tensor | float) -> float:
    return 1 - float((rebuilt - x).square().sum() / (x - x.mean(0)).square().sum())


def test_training_beats_the_mean_finds_planted_directions_and_counts_dead_features():
    x, directions, active = planted()
    sae = train_sae(x, SITE, TRAINING)
    cosines, features = (directions @ sae.W_dec.T).max(1)
    codes = sae.encode(x)
    assert explained(x, sae.decode(codes)) > 0.95 and cosines.min() > 0.95
    together = [float(torch.corrcoef(torch.stack(p))[0, 1]) for p in zip(codes[:, features].T, active.T, strict=True)]
    assert min(together) > 0.95
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    dead = pytest.approx(float((~(codes > 0).any(0)).float().mean()), abs=2 / 32)
    assert sae.quality == {"tokens": 2000, "dead": dead}
    assert 0.2 < sae.quality["dead"] < 0.8
    untrained = train_sae(x, SITE, replace(TRAINING, epochs=1, lr=1e-9))
    assert explained(x, untrained.decode(untrained.encode(x))) < 0.5
    assert (directions @ untrained.W_dec.T).max(1).values.max() < 0.7


def test_training_depends_on_its_seed_and_up_to_scale_on_nothing_else():
    x, *_ = planted(400)
    training = replace(TRAINING, epochs=2)
    one = train_sae(x, SITE, training)
    torch.manual_seed(123)
    with torch.no_grad():
        again = train_sae(x.clone(), SITE, training)
    other, scaled = train_sae(x, SITE, replace(training, seed=1)), train_sae(4 * x, SITE, training)
    for part in PARTS:
        assert torch.equal(getattr(one, part), getattr(again, part))
        assert not torch.equal(getattr(one, part), getattr(other, part))
        assert not getattr(one, part).requires_grad
    assert scaled.scale == pytest.approx(one.scale / 4)
    torch.testing.assert_close(scaled.W_dec, one.W_dec, atol=1e-4, rtol=1e-4)
    assert float((x * one.scale).square().sum(1).mean()) == pytest.approx(24, rel=1e-5)
    # Fewer tokens than a batch are seen in every epoch.
    few, all_at_once = (train_sae(x[:50], SITE, replace(TRAINING, batch_size=size)) for size in (512, 50))
    assert torch.equal(few.W_dec, all_at_once.W_dec)
    assert few.quality["dead"] < 1


def identity_sae(d: int, site: Site) -> SparseAutoencoder:
    """A ReLU pair for each dimension: x = relu(x) − relu(−x)."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    return SparseAutoencoder(site, both.T, torch.zeros(2 * d), both, torch.zeros(d))


@pytest.mark.parametrize("site", [SITE, Site("mlp_out", 1)], ids=str)
def test_a_perfect_autoencoder_loses_nothing_and_a_silent_one_everything(tiny, site):
    perfect = identity_sae(32, site)
    assert measure(tiny, perfect, NEUTRAL) == {"variance_explained": 1.0, "loss_recovered": 1.0}
    silent, states = replace(perfect, W_dec=torch.zeros(64, 32)), collect(tiny, NEUTRAL, [site])[0][site]
    quality = measure(tiny, silent, NEUTRAL)
    assert quality == {"loss_recovered": 0, "variance_explained": pytest.approx(explained(states, 0.0), rel=1e-4)}
    constant = replace(silent, b_dec=states.mean(0), centred=False)
    assert measure(tiny, constant, NEUTRAL)["variance_explained"] == pytest.approx(0, abs=1e-5)
    assert sum(len(module._forward_hooks) for module in tiny.model.modules()) == 0


def test_the_first_position_keeps_its_activations_while_measuring(tiny, monkeypatch):
    seen, tapped = [], module.tapped
    monkeypatch.setattr(module, "tapped", lambda *a: seen.append(partial(a[2], a[1][0])) or tapped(*a))
    measure(tiny, replace(identity_sae(32, SITE), W_dec=torch.zeros(64, 32)), NEUTRAL[:1])
    x = noise(2, 5, 32)
    for change, kept in zip(seen, (1, 0, 0), strict=True):
        assert torch.equal(change(x), torch.cat([x[:, :1], kept * x[:, 1:]], 1))


@pytest.fixture
def trainings(cache, monkeypatch) -> list[tuple[Site, torch.Tensor]]:
    """The sites of all autoencoders that are really trained, and their activations."""
    made, train = [], module.train_sae
    monkeypatch.setattr(module, "train_sae", lambda x, site, *a, **k: made.append((site, x)) or train(x, site, *a, **k))
    return made


def test_trained_autoencoders_are_kept(tiny, trainings):
    sites = [Site("residual", 1), Site("residual", 0)]
    first = load_saes(tiny, make_concept(), "residual", [1, 0])
    again = load_saes(tiny, make_concept(), "residual", [0, 1])
    assert [sae.site for sae in first] == [site for site, _ in trainings] == sites
    states, _ = collect(tiny, (*SENTENCES, *NEUTRAL), sites)  # all tokens but the first ones
    assert all(torch.equal(x, states[site]) for site, x in trainings)
    for one, other in zip(first, again[::-1], strict=True):
        assert torch.equal(one.W_enc, other.W_enc) and torch.equal(one.b_dec, other.b_dec)
        assert (one.k, one.scale, one.quality) == (other.k, other.scale, other.quality)
        assert one.quality.keys() == {"tokens", "dead", "variance_explained", "loss_recovered"}


def test_every_setting_has_an_entry_of_its_own(tiny, trainings, monkeypatch):
    concept = make_concept()
    monkeypatch.setattr(module, "training_texts", lambda concept: NEUTRAL)  # of all other texts there are too many
    changes = ({}, {"k": 3}, {"width": 17}, {"seed": 1}, {"lr": 1e-3}, {"epochs": 1}, {"batch_size": 33})
    for change in (*changes, {"concept_only": False}):
        load_saes(tiny, concept, "residual", [0], training=replace(SMALL_SAES, **change))
    load_saes(tiny, concept, "mlp_out", [0])
    load_saes(tiny, replace(concept, sentences=SENTENCES[:2]), "residual", [0])
    load_saes(make_loaded("llama", seed=5), concept, "residual", [0])
    assert len(trainings) == 11


def test_training_texts_hold_nothing_that_is_measured_or_relearned():
    concepts, shared = [load_concept(name) for name in list_concepts()], load_shared()
    assert len(concepts) >= 3
    texts = training_texts(concepts[0])
    by_split = {split: [i for i in shared.instructions if i.split == split] for split in ("train", "test")}
    hidden = [shared.neutral["test"], [q.question for q in shared.questions]]
    hidden += [[getattr(i, part) for i in by_split["test"]] for part in ("instruction", "response")]
    hidden += [part for c in concepts for part in (c.paragraphs, c.other_sense, [q.question for q in c.questions])]
    whole = "\n".join(texts)
    assert all(part and not any(text in whole for text in part) for part in hidden)
    assert {s for c in concepts for s in c.sentences} | set(shared.neutral["train"]) <= set(texts)
    assert {f"{i.instruction}\n{i.response}" for i in by_split["train"]} <= set(texts)
    own = replace(make_concept(), sentences=("A sentence of my own.",))
    assert set(training_texts(own)) == {*texts, "A sentence of my own."}


@pytest.fixture
def sae_lens(monkeypatch):
    """A stand-in that gives, in half precision, an autoencoder like ``random_sae``, and notes what it is asked for."""
    threshold, asked = KINDS["jumprelu"]["threshold"], []
    parts = {name: torch.nn.Parameter(getattr(random_sae(threshold=threshold), name).half()) for name in PARTS}
    cfg = SimpleNamespace(architecture=lambda: "jumprelu", normalize_activations="none", apply_b_dec_to_input=True)
    given = SimpleNamespace(cfg=cfg, asked=asked, threshold=threshold.half(), **parts)
    sae = SimpleNamespace(from_pretrained=lambda *names, device: asked.append((*names, device)) or given)
    monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(SAE=sae))
    return given


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("source", "kind"), RELEASED)
def test_released_autoencoders_come_from_sae_lens_and_take_our_form(tiny, sae_lens, source, kind, centred):
    sae_lens.cfg.apply_b_dec_to_input = centred
    saes = load_saes(tiny, make_concept(), kind, [4, 17], source=source)
    release, name = RELEASED[source, kind]
    assert sae_lens.asked == [(release, name.format(layer=layer), "cpu") for layer in (4, 17)]
    assert "4" in sae_lens.asked[0][1] and "17" in sae_lens.asked[1][1]
    assert [(s.site, s.k, s.centred, s.scale) for s in saes] == [(Site(kind, n), None, centred, 1) for n in (4, 17)]
    x, expected = noise(40, 5, seed=9), random_sae(**KINDS["jumprelu"], centred=centred)
    rebuilt = saes[0].decode(saes[0].encode(x))
    torch.testing.assert_close(rebuilt, expected.decode(expected.encode(x)), atol=0.05, rtol=0.01)
    weights = [getattr(saes[0], part) for part in (*PARTS, "threshold")]
    assert all(w.dtype == torch.float32 and not w.requires_grad for w in weights)


def test_other_kinds_and_normalizations_a_missing_library_and_unknown_names_are_refused(tiny, sae_lens, monkeypatch):
    load = partial(load_saes, tiny, make_concept(), "residual", [0], source="gemma-scope")
    for scaling in ("layer_norm", "constant_norm_rescale"):
        sae_lens.cfg.normalize_activations = scaling
        with pytest.raises(EmberError, match=f"normalizes by '{scaling}'"):
            load()
    for kind in ("gated", "topk", "standard"):
        sae_lens.cfg.architecture = lambda kind=kind: kind
        with pytest.raises(EmberError, match=f"^a {kind} autoencoder is not supported; known: jumprelu$"):
            load()
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(EmberError, match=r"^.*pip install -e '\.\[sae\]'$"):
        load()
    with pytest.raises(UnknownNameError, match="unknown SAE source 'gemma'; known: gemma-scope, llama-scope, trained"):
        load(source="gemma")
    with pytest.raises(UnknownNameError, match="site of gemma-scope 'neurons'; known: mlp_out, residual"):
        load_saes(tiny, make_concept(), "neurons", [0], source="gemma-scope")
