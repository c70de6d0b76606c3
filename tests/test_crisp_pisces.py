"""What CRISP and PISCES compute, against hand computations, and what they achieve."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.edits import snapshot
from helpers.tiny import NEUTRAL, SENTENCES, SMALL_SAES, make_concept, noise, states

from ember.methods import crisp, pisces, rmu, selection, training
from ember.methods.crisp import CrispConfig
from ember.methods.pisces import PiscesConfig, turn_against
from ember.methods.rmu import RmuConfig
from ember.methods.sae import SparseAutoencoder
from ember.methods.training import adapted, linear_modules, weights_edit
from ember.models.activations import Site

DOWN = "model.layers.0.mlp.down_proj.weight"

CRISP = CrispConfig(layers=(1,), first_layer=0, features=5, min_ratio=1.5, steps=3, sae_training=SMALL_SAES)


def test_crisp_lowers_the_features_on_concept_text_and_keeps_neutral_text(tiny, cache):
    (sae,), drift, site = selection.prepare(tiny, make_concept(), CRISP), {}, Site("residual", 1)
    for beta in (0.0, 0.99):
        edit = crisp.run(tiny, make_concept(), replace(CRISP, beta=beta, steps=25, lr=4e-3))
        chosen = [row["feature"] for row in edit.provenance.config["selected"]]
        before, after = (sae.encode(states(tiny, SENTENCES, site, e))[:, chosen].mean() for e in (None, edit))
        assert after < 0.7 * before
        drift[beta] = float((states(tiny, NEUTRAL, site, edit) - states(tiny, NEUTRAL, site)).square().mean())
        (about,) = edit.provenance.config["autoencoders"]
        assert about == {"site": "residual", "layer": 1, "width": 64, **sae.quality}
    assert drift[0.99] < 0.3 * drift[0.0]


def merged_edit(tiny, values):
    return weights_edit(tiny, make_concept(), "crisp", CRISP, values, seed=0)


@pytest.mark.parametrize("first_layer", [0, 1])
def test_the_merged_weights_give_the_adapters_logits(tiny, first_layer):
    """TRAPS 5; embeddings, head and norms have no adapter, and an untrained one changes nothing."""
    ids, before = torch.tensor([tiny.encode(SENTENCES[0])]), snapshot(tiny)
    targets = linear_modules(tiny, range(first_layer, 2))
    with adapted(tiny, targets, rank=4, scale=2, seed=0) as (parameters, merged), torch.no_grad():
        plain = tiny.model(ids).logits
        assert all(torch.equal(value, before[name]) for name, value in merged().items())
        for k, parameter in enumerate(parameters.values()):
            parameter.copy_(0.05 * noise(*parameter.shape, seed=k))
        with_adapter, values = tiny.model(ids).logits, merged()
        trainable = {name for name, p in tiny.model.named_parameters() if p.requires_grad}
        assert len(trainable) == len(parameters) == 2 * len(values)
    linear = {n for n, m in tiny.model.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)}
    assert set(values) == {f"{n}.weight" for n in linear if int(n.split(".")[2]) >= first_layer}
    with merged_edit(tiny, values).applied(tiny), torch.no_grad():
        torch.testing.assert_close(tiny.model(ids).logits, with_adapter, atol=1e-5, rtol=1e-5)
    assert (with_adapter - plain).abs().max() > 0.1


def hand_made(**kind) -> SparseAutoencoder:
    """Reads one coordinate a feature; feature 0 is written along (1, 1), feature 1 along (0, 1)."""
    W_dec = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    return SparseAutoencoder(Site("mlp_out", 0), torch.eye(2), torch.zeros(2), W_dec, torch.zeros(2), **kind)


# Kinds for which feature 0 is active at (2, ·) and not at (1, 2).
STRICT = {"topk": {"k": 1}, "jumprelu": {"threshold": torch.tensor([1.5, 0.0])}}


@pytest.mark.parametrize("kind", STRICT)
def test_the_activity_counts_where_the_feature_was_active(kind):
    """Feature 0 on three tokens: active on the first only, as the autoencoder's kind has it; margin 2 · |mean pre|."""
    before = torch.tensor([[2.0, 0.0], [1.0, 2.0], [-1.5, 0.0]])
    now = torch.tensor([[0.5, 0.0], [9.0, 0.0], [9.0, 0.0]])
    value = crisp._activity(hand_made(**STRICT[kind]), [0], now, before, margin=2.0)
    assert float(value) == pytest.approx(0.5 + 2 * abs(2.0 + 1.0 - 1.5) / 3)
    assert float(crisp._activity(hand_made(k=1), [], now, before, margin=2.0)) == 0


@pytest.mark.parametrize("method", [rmu, crisp])
def test_the_first_position_alone_has_no_influence_on_training(tiny, cache, monkeypatch, method):
    config = {rmu: RmuConfig(layer=1, n_trained=2, steps=3), crisp: CRISP}[method]
    edits, original = [method.run(tiny, make_concept(), config)], training.activations
    for position in (0, 1):

        def disturbed(*arguments, position=position):
            factors = torch.ones(1, 99, 1).index_fill(1, torch.tensor(position), 10)
            return {site: value * factors[:, : value.shape[1]] for site, value in original(*arguments).items()}

        monkeypatch.setattr(training, "activations", disturbed)
        edits.append(method.run(tiny, make_concept(), config))
    assert edits[0].identity == edits[1].identity != edits[2].identity


W_OUT = torch.tensor([[2.0, 0.5], [1.0, 2.0], [-1.5, 0.0], [0.9, -1.0]])


@pytest.mark.parametrize(("kind", "second"), [("topk", -5.0), ("jumprelu", -5.0), ("relu", -6.0)])
def test_turning_against_a_feature_by_hand(kind, second):
    """τ = 0.5 of the largest projection 2 takes the first three neurons; μ = 3 sets their coefficients to ∓6.

    They were (2, 0, 0), or (2, 1, 0) for a ReLU, and what is added is the difference times (1, 1).
    """
    sae = hand_made(**STRICT.get(kind, {}))
    new = turn_against(W_OUT, sae, [0], 0.5, 3.0)
    expected = torch.tensor([[-6.0, -7.5], [second, second + 1], [4.5, 6.0], [0.9, -1.0]])
    torch.testing.assert_close(new, expected)


def test_neurons_are_turned_for_their_own_features_from_the_threshold_on_in_the_input_scale():
    W_enc, W_dec, W_out = noise(32, 40, seed=1), noise(40, 32, seed=2), noise(64, 32)
    sae = SparseAutoencoder(Site("mlp_out", 0), W_enc, noise(40), W_dec, noise(32, seed=3), k=4, scale=4.0)
    for tau in (0.1, 0.5, 1.0):
        projections = (W_out @ W_enc[:, [3, 7]]).abs()
        touched = (projections >= tau * projections.max(0).values).any(1)
        assert torch.equal((turn_against(W_out, sae, [3, 7], tau, 5.0) != W_out).any(1), touched)
        assert tau < 1 or int(touched.sum()) == 2
    both, *alone = (turn_against(W_out, sae, features, 0.3, 5.0) - W_out for features in ([3, 7], [3], [7]))
    torch.testing.assert_close(both, sum(alone), atol=1e-3, rtol=1e-3)  # because a decoder is linear
    folded = replace(sae, scale=1.0, W_enc=4 * W_enc, W_dec=W_dec / 4, b_dec=sae.b_dec / 4)  # the same autoencoder
    torch.testing.assert_close(folded.decode(folded.encode(W_out)), sae.decode(sae.encode(W_out)))
    torch.testing.assert_close(turn_against(W_out, folded, [3, 7], 0.3, 5.0) - W_out, both, atol=1e-3, rtol=1e-4)


def test_a_selection_in_the_cache_is_that_of_its_autoencoder_and_of_its_weights(tiny, cache):
    select = partial(selection.select_features, tiny, make_concept(), config=replace(CRISP, features=9, min_ratio=0.0))
    (sae,) = selection.prepare(tiny, make_concept(), replace(CRISP, layers=(0,)))
    relu = replace(sae, k=None)
    for one, change in (
        (sae, {"k": 1}), (sae, {"k": None}), (relu, {"threshold": torch.ones(64)}), (sae, {"scale": 9.0}),
    ):  # fmt: skip
        base = select([one])
        assert not select([replace(one, **change)]).equals(base), change
        assert select([one]).equals(base)
    weight, base = tiny.model.get_parameter(DOWN).detach(), select([sae])
    with merged_edit(tiny, {DOWN: weight + noise(*weight.shape)}).applied(tiny):
        assert not select([sae]).equals(base)
    assert select([sae]).equals(base)


def test_mu_grows_over_the_first_layers(tiny, cache, monkeypatch):
    used = []
    monkeypatch.setattr(pisces, "turn_against", lambda W, sae, features, tau, mu: used.append(mu) or W)
    for ramp, expected in {0: [10, 10], 1: [1, 10], 2: [1, 10], 10: [1, 2]}.items():
        config = PiscesConfig(layers=(0, 1), min_ratio=0, mu=10.0, ramp=ramp, sae_training=SMALL_SAES)
        assert pisces.run(tiny, make_concept(), config).changed().empty
        assert used[-2:] == pytest.approx(expected)
