"""Sparse autoencoders: their arithmetic against a slow loop, training, quality, cache, and released ones."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import NEUTRAL, SENTENCES, make_concept, make_loaded, noise

import ember.methods.sae
from ember.data.ours import list_concepts, load_concept, load_shared
from ember.errors import EmberError, UnknownNameError
from ember.methods.sae import (
    RELEASED,
    SaeTraining,
    SparseAutoencoder,
    from_sae_lens,
    load_saes,
    measure,
    quality_table,
    train_sae,
    training_texts,
)
from ember.models.activations import Site, collect

SITE = Site("residual", 0)
KINDS = {"topk": {"k": 3}, "jumprelu": {"threshold": torch.linspace(0, 2, 12)}, "relu": {}}
kinds = pytest.mark.parametrize("kind", KINDS)


def random_sae(**options) -> SparseAutoencoder:
    """Twelve features in five dimensions."""
    return SparseAutoencoder(SITE, noise(5, 12, seed=1), noise(12, seed=2), noise(12, 5, seed=3), noise(5), **options)


# Encoding and decoding


def slow_encode(sae: SparseAutoencoder, token: list[float]) -> list[float]:
    m = len(sae.b_enc)
    x = [sae.scale * value - (float(b) if sae.centred else 0.0) for value, b in zip(token, sae.b_dec, strict=True)]
    pre = [float(sae.b_enc[f]) + sum(x[i] * float(sae.W_enc[i, f]) for i in range(len(x))) for f in range(m)]
    kept = range(m)
    if sae.k is not None:
        kept = sorted(range(m), key=lambda f: -pre[f])[: sae.k]
    if sae.threshold is not None:
        kept = [f for f in range(m) if pre[f] > float(sae.threshold[f])]
    return [max(pre[f], 0.0) if f in kept else 0.0 for f in range(m)]


def slow_decode(sae: SparseAutoencoder, features: list[float]) -> list[float]:
    written = [sum(a * float(row[i]) for a, row in zip(features, sae.W_dec, strict=True)) for i in range(5)]
    return [(value + float(b)) / sae.scale for value, b in zip(written, sae.b_dec, strict=True)]


@kinds
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_encoding_and_decoding_equal_a_slow_loop(kind, centred, scale):
    sae, x = random_sae(**KINDS[kind], centred=centred, scale=scale), 2 * noise(40, 5, seed=9)
    features = sae.encode(x)
    expected = torch.tensor([slow_encode(sae, token) for token in x.tolist()])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    rebuilt = torch.tensor([slow_decode(sae, row) for row in expected.tolist()])
    torch.testing.assert_close(sae.decode(features), rebuilt, atol=1e-4, rtol=1e-4)
    assert 0 < (features > 0).float().mean() < 0.9


@kinds
def test_batch_and_time_are_kept(kind):
    sae, x = random_sae(**KINDS[kind]), noise(3, 4, 5)
    assert torch.equal(sae.encode(x).reshape(12, 12), sae.encode(x.reshape(12, 5)))


def test_top_k_keeps_no_negative_feature():
    sae = random_sae(k=12)
    x = noise(40, 5, seed=9)
    assert torch.equal(sae.encode(x), sae.pre(x).clamp_min(0))
    assert ((random_sae(k=3).encode(x) > 0).sum(1) <= 3).all()


# Training

TRAINING = SaeTraining(width=32, k=3, epochs=60, batch_size=128, lr=1e-2)


def planted(n: int = 2000, d: int = 24, m: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [n, d], off centre; the unit directions [m, d] in them and how active these are [n, m]."""
    directions = torch.nn.functional.normalize(noise(m, d, seed=4), dim=1)
    generator = torch.Generator().manual_seed(5)
    active = (torch.rand(n, m, generator=generator) < 0.1) * (1 + torch.rand(n, m, generator=generator))
    return 3 * active @ directions + 0.5 + 0.01 * noise(n, d, seed=6), directions, active


def explained(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    return 1 - float((sae.decode(sae.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum())


def test_training_beats_the_mean_and_finds_planted_directions():
    x, directions, active = planted()
    sae = train_sae(x, SITE, TRAINING)
    cosines, features = (directions @ sae.W_dec.T).max(1)
    assert explained(sae, x) > 0.95
    assert cosines.min() > 0.95
    found = sae.encode(x)[:, features]
    together = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(found.T, active.T, strict=True)]
    assert min(together) > 0.95
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    untrained = train_sae(x, SITE, replace(TRAINING, epochs=1, lr=1e-9))
    assert explained(untrained, x) < 0.5
    assert (directions @ untrained.W_dec.T).max(1).values.max() < 0.7


def test_training_follows_the_scale_of_its_input():
    x, *_ = planted(400)
    training = replace(TRAINING, epochs=3)
    one, other = (train_sae(x * factor, SITE, training) for factor in (1.0, 4.0))
    assert other.scale == pytest.approx(one.scale / 4)
    torch.testing.assert_close(other.W_dec, one.W_dec, atol=1e-4, rtol=1e-4)
    assert float((x * one.scale).square().sum(1).mean()) == pytest.approx(24, rel=1e-5)


def test_training_depends_on_its_seed_and_on_nothing_else():
    x, *_ = planted(400)
    training = replace(TRAINING, epochs=2)
    one = train_sae(x, SITE, training)
    torch.manual_seed(123)
    with torch.no_grad():
        again = train_sae(x.clone(), SITE, training)
    other = train_sae(x, SITE, replace(training, seed=1))
    for part in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(one, part), getattr(again, part))
        assert not torch.equal(getattr(one, part), getattr(other, part))
        assert not getattr(one, part).requires_grad


def test_dead_features_are_counted():
    x, *_ = planted()
    sae = train_sae(x, SITE, TRAINING)
    dead = ~(sae.encode(x) > 0).any(0)
    assert sae.quality["tokens"] == 2000
    assert sae.quality["dead"] == pytest.approx(float(dead.float().mean()), abs=2 / 32)
    assert 0.2 < sae.quality["dead"] < 0.8


def test_fewer_tokens_than_a_batch_are_seen_in_every_epoch():
    x, *_ = planted(50)
    few, all_at_once = (train_sae(x, SITE, replace(TRAINING, batch_size=size)) for size in (512, 50))
    assert torch.equal(few.W_dec, all_at_once.W_dec)
    assert few.quality["dead"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("width", "k", "epochs", "batch_size")),
        ({"width": 8, "k": 9}, r"k must be 1\.\.width = 8, got 9"),
    ],
)
def test_training_settings_check_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        SaeTraining(**changes)


# Quality


def identity_sae(d: int, site: Site) -> SparseAutoencoder:
    """A ReLU pair for each dimension: x = relu(x) − relu(−x)."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    return SparseAutoencoder(site, both.T, torch.zeros(2 * d), both, torch.zeros(d))


@pytest.mark.parametrize("site", [SITE, Site("mlp_out", 1)], ids=str)
def test_a_perfect_autoencoder_loses_nothing_and_a_silent_one_everything(tiny, site):
    perfect = identity_sae(32, site)
    assert measure(tiny, perfect, NEUTRAL) == {"variance_explained": 1.0, "loss_recovered": 1.0}
    silent = replace(perfect, W_dec=torch.zeros(64, 32))
    states = collect(tiny, NEUTRAL, [site])[0][site]
    found = measure(tiny, silent, NEUTRAL)
    assert found["loss_recovered"] == 0
    expected = 1 - states.square().sum() / (states - states.mean(0)).square().sum()
    assert found["variance_explained"] == pytest.approx(float(expected), rel=1e-4)
    constant = replace(silent, b_dec=states.mean(0), centred=False)
    assert measure(tiny, constant, NEUTRAL)["variance_explained"] == pytest.approx(0, abs=1e-5)


def test_measuring_leaves_the_model_and_takes_the_first_texts(tiny):
    sae = replace(identity_sae(32, SITE), W_dec=0.9 * identity_sae(32, SITE).W_dec)
    before = measure(tiny, sae, NEUTRAL[:2])
    assert measure(tiny, sae, NEUTRAL, limit=2) == before != measure(tiny, sae, NEUTRAL)
    assert sum(len(module._forward_hooks) for module in tiny.model.modules()) == 0
    assert before["variance_explained"] < 1


def test_the_first_position_keeps_its_activations_while_measuring(tiny, monkeypatch):
    seen = []

    def watched(loaded, sites, replace):
        seen.append(lambda value: replace(sites[0], value))
        return tapped(loaded, sites, replace)

    tapped = ember.methods.sae.tapped
    monkeypatch.setattr(ember.methods.sae, "tapped", watched)
    measure(tiny, replace(identity_sae(32, SITE), W_dec=torch.zeros(64, 32)), NEUTRAL[:1])
    x = noise(2, 5, 32)
    for change, rest in zip(seen, (x[:, 1:], 0 * x[:, 1:], 0 * x[:, 1:]), strict=True):
        assert torch.equal(change(x)[:, :1], x[:, :1])
        assert torch.equal(change(x)[:, 1:], rest)


# Trained ones and their cache


@pytest.fixture
def trainings(small_saes, monkeypatch) -> list[Site]:
    """The sites of all autoencoders that are really trained."""
    made, train = [], ember.methods.sae.train_sae
    monkeypatch.setattr(
        ember.methods.sae, "train_sae", lambda x, site, *a, **k: made.append(site) or train(x, site, *a, **k)
    )
    return made


def test_trained_autoencoders_are_kept(tiny, trainings):
    first = load_saes(tiny, make_concept(), "residual", [1, 0])
    again = load_saes(tiny, make_concept(), "residual", [0, 1])
    assert [sae.site for sae in first] == trainings == [Site("residual", 1), Site("residual", 0)]
    for one, other in zip(first, again[::-1], strict=True):
        assert torch.equal(one.W_enc, other.W_enc) and torch.equal(one.b_dec, other.b_dec)
        assert (one.k, one.scale, one.quality) == (other.k, other.scale, other.quality)
        assert set(one.quality) == {"tokens", "dead", "variance_explained", "loss_recovered"}
    assert [row["layer"] for row in quality_table(first)] == [1, 0]


def test_every_setting_has_an_entry_of_its_own(tiny, trainings):
    concept, training = make_concept(), SaeTraining(width=16, k=2, epochs=1, batch_size=32)
    for changes in ({}, {"k": 3}, {"width": 17}, {"seed": 1}, {"lr": 1e-3}, {"epochs": 2}, {"batch_size": 33}):
        load_saes(tiny, concept, "residual", [0], training=replace(training, **changes))
    load_saes(tiny, concept, "mlp_out", [0], training=training)
    load_saes(tiny, replace(concept, sentences=SENTENCES[:2]), "residual", [0], training=training)
    load_saes(make_loaded("llama", seed=5), concept, "residual", [0], training=training)
    assert len(trainings) == 10


def test_they_are_trained_on_all_tokens_but_the_first_ones(tiny, small_saes, monkeypatch):
    seen = []

    def watched(states, site, training, **_):
        seen.append(states)
        return replace(identity_sae(32, site), k=4)

    monkeypatch.setattr(ember.methods.sae, "train_sae", watched)
    load_saes(tiny, make_concept(), "mlp_out", [1])
    site = Site("mlp_out", 1)
    assert torch.equal(seen[0], collect(tiny, (*SENTENCES, *NEUTRAL), [site])[0][site])


def test_training_texts_hold_nothing_that_is_measured_or_relearned():
    concepts, shared = [load_concept(name) for name in list_concepts()], load_shared()
    assert len(concepts) >= 3
    texts = training_texts(concepts[0])
    whole = "\n".join(texts)
    for concept in concepts:
        assert set(concept.sentences) <= set(texts)
        for part in (concept.paragraphs, concept.other_sense, [q.question for q in concept.questions]):
            assert part and not any(text in whole for text in part)
    assert not any(text in whole for text in shared.neutral["test"])
    assert not any(question.question in whole for question in shared.questions)
    by_split = {split: [i for i in shared.instructions if i.split == split] for split in ("train", "test")}
    assert not any(i.instruction in whole or i.response in whole for i in by_split["test"])
    assert all(f"{i.instruction}\n{i.response}" in texts for i in by_split["train"])
    assert set(shared.neutral["train"]) <= set(texts)
    own = replace(make_concept(), sentences=("A sentence of my own.",))
    assert set(training_texts(own)) == {*texts, "A sentence of my own."}


# Released ones


def stand_in(kind: str, *, scaling: str = "none", apply_b_dec: bool = True, **parts) -> SimpleNamespace:
    """What ``sae_lens.SAE`` shows of an autoencoder like ``random_sae``, in half precision."""
    ours = random_sae()
    tensors = {name: torch.nn.Parameter(getattr(ours, name).half()) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    cfg = SimpleNamespace(
        architecture=lambda: kind, normalize_activations=scaling, apply_b_dec_to_input=apply_b_dec, k=3
    )
    return SimpleNamespace(cfg=cfg, **tensors | parts)


RELEASED_KINDS = {"standard": {}, "topk": {"k": 3}, "jumprelu": {"threshold": torch.linspace(0, 2, 12)}}


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("kind", RELEASED_KINDS)
def test_released_autoencoders_take_our_form(kind, apply_b_dec):
    options = RELEASED_KINDS[kind]
    parts = {"threshold": options["threshold"].half()} if kind == "jumprelu" else {}
    found = from_sae_lens(stand_in(kind, apply_b_dec=apply_b_dec, **parts), SITE)
    x = noise(40, 5, seed=9)
    expected = random_sae(**options, centred=apply_b_dec)
    torch.testing.assert_close(found.decode(found.encode(x)), expected.decode(expected.encode(x)), atol=0.05, rtol=0.01)
    assert (found.site, found.k, found.centred, found.scale) == (SITE, expected.k, apply_b_dec, 1.0)
    assert (found.threshold is None) == (kind != "jumprelu")
    for part in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert getattr(found, part).dtype == torch.float32
        assert not getattr(found, part).requires_grad


def test_features_rescaled_by_the_decoder_are_compared_as_sae_lens_compares_them():
    """It picks the k largest of pre-activation times the norm of the feature's decoder row."""
    ours, x = random_sae(k=3), noise(40, 5, seed=9)
    lens = stand_in("topk")
    lens.cfg.rescale_acts_by_decoder_norm = True
    found = from_sae_lens(lens, SITE)
    norms = ours.W_dec.norm(dim=1)
    picked = (ours.pre(x) * norms).topk(3, dim=1).indices
    active = torch.zeros(40, 12).scatter(1, picked, ours.pre(x).clamp_min(0).gather(1, picked))
    torch.testing.assert_close(found.encode(x), active * norms, atol=0.05, rtol=0.01)
    torch.testing.assert_close(found.decode(found.encode(x)), active @ ours.W_dec + ours.b_dec, atol=0.05, rtol=0.01)
    assert not torch.equal(active > 0, ours.encode(x) > 0)


def test_an_autoencoder_without_encoder_bias_has_zeros():
    lens = stand_in("topk")
    del lens.b_enc
    assert torch.equal(from_sae_lens(lens, SITE).b_enc, torch.zeros(12))


@pytest.mark.parametrize("kind", ["gated", "transcoder", "matryoshka_batchtopk"])
def test_other_kinds_are_refused(kind):
    with pytest.raises(EmberError, match=f"a {kind} autoencoder is not supported; known: standard, topk, jumprelu"):
        from_sae_lens(stand_in(kind), SITE)


@pytest.mark.parametrize("scaling", ["layer_norm", "constant_norm_rescale"])
def test_other_normalizations_are_refused(scaling):
    with pytest.raises(EmberError, match=f"normalizes by '{scaling}'"):
        from_sae_lens(stand_in("standard", scaling=scaling), SITE)


@pytest.mark.parametrize("source", RELEASED)
@pytest.mark.parametrize("kind", ["residual", "mlp_out"])
@pytest.mark.parametrize("with_more", [True, False])
def test_released_autoencoders_come_from_sae_lens(tiny, monkeypatch, source, kind, with_more):
    asked = []

    def from_pretrained(release, name, *, device):
        asked.append((release, name, device))
        return (stand_in("standard"), {}, None) if with_more else stand_in("standard")

    monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(SAE=SimpleNamespace(from_pretrained=from_pretrained)))
    found = load_saes(tiny, make_concept(), kind, [4, 17], source=source)
    assert [sae.site for sae in found] == [Site(kind, 4), Site(kind, 17)]
    release, name = RELEASED[source][kind]
    assert asked == [(release, name.format(layer=layer), "cpu") for layer in (4, 17)]
    assert "4" in asked[0][1] and "17" in asked[1][1]


def test_a_missing_sae_lens_is_one_line(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(EmberError, match=r"pip install -e '\.\[sae\]'") as caught:
        load_saes(tiny, make_concept(), "residual", [0], source="gemma-scope")
    assert "\n" not in str(caught.value)


def test_unknown_sources_and_sites_are_named(tiny):
    with pytest.raises(UnknownNameError, match="unknown SAE source 'gemma'; known: gemma-scope, llama-scope, trained"):
        load_saes(tiny, make_concept(), "residual", [0], source="gemma")
    with pytest.raises(UnknownNameError, match="site of gemma-scope 'neurons'; known: mlp_out, residual"):
        load_saes(tiny, make_concept(), "neurons", [0], source="gemma-scope")
