"""What SNMF, RMU, CRISP and PISCES compute: against hand computations and slow references, and what they achieve."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import NEUTRAL, SENTENCES, make_concept, make_loaded
from test_editing import snapshot, state_with

from ember.activations import Site, collect
from ember.contrast import keyness_bits
from ember.editing import Edit
from ember.methods import crisp, pisces, rmu, snmf
from ember.methods.common import batches, weights_edit
from ember.methods.crisp import CrispConfig
from ember.methods.pisces import PiscesConfig, turn_against
from ember.methods.rmu import RmuConfig
from ember.methods.snmf import SnmfConfig, carriers, project_out
from ember.models import LoadedModel, weights_hash
from ember.sae import SparseAutoencoder, load_saes

DOWN = "model.layers.{}.mlp.down_proj.weight"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(loaded: LoadedModel, texts, site: Site, edit: Edit | None = None) -> torch.Tensor:
    if edit is None:
        return collect(loaded, texts, [site])[0][site]
    with edit.applied(loaded):
        return collect(loaded, texts, [site])[0][site]


def plain_stream(loaded: LoadedModel, texts, layer: int) -> torch.Tensor:
    """The stream after a layer at all positions but the first, one text at a time, through a plain hook."""
    kept = []
    handle = loaded.model.model.layers[layer].register_forward_hook(
        lambda _, __, out: kept.append((out[0] if isinstance(out, tuple) else out)[0, 1:])
    )
    for text in texts:
        loaded.model(torch.tensor([loaded.encode(text)]))
    handle.remove()
    return torch.cat(kept)


# SNMF

# Twelve neurons in eight dimensions; the third neuron carries no feature, the last one both.
MATRIX, FEATURES = noise(12, 8), noise(12, 2, seed=1)
MASKS = torch.zeros(2, 12, dtype=torch.bool)
MASKS[0, [0, 1, 4, 11]] = True
MASKS[1, [3, 5, 11]] = True


def written(k: int) -> torch.Tensor:
    """The unit direction that feature k writes."""
    direction = sum(FEATURES[j, k] * MATRIX[j] for j in range(12))
    return direction / direction.norm()


def test_a_full_projection_leaves_nothing_of_any_feature_a_neuron_carries():
    new = project_out(MATRIX, FEATURES, MASKS, 1.0)
    for k in range(2):
        assert (MATRIX[MASKS[k]] @ written(k)).abs().min() > 1e-2
        assert (new[MASKS[k]] @ written(k)).abs().max() < 1e-5
    free = ~MASKS.any(0)
    assert torch.equal(new[free], MATRIX[free])
    only_first = MASKS[0] & ~MASKS[1]
    assert ((new - MATRIX)[only_first] @ written(1)).abs().max() > 1e-2  # not orthogonalized away


def test_a_projection_of_strength_zero_changes_no_bit():
    assert torch.equal(project_out(MATRIX, FEATURES, MASKS, 0.0), MATRIX)


@pytest.mark.parametrize("delta", [0.5, 1.0, 2.0, 4.0, 7.0])
def test_a_projection_scales_the_component_and_keeps_the_rest(delta):
    """By 1 − δ, so that 4 triples it with the sign flipped; against a loop over neurons."""
    f = written(0)
    new = project_out(MATRIX, FEATURES[:, :1], MASKS[:1], delta)
    expected = MATRIX.clone()
    for j in MASKS[0].nonzero().flatten():
        expected[j] = MATRIX[j] - delta * f * sum(f[i] * MATRIX[j, i] for i in range(8))
    torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)
    old = MATRIX[MASKS[0]]
    torch.testing.assert_close(new[MASKS[0]] @ f, (1 - delta) * (old @ f), atol=1e-5, rtol=1e-5)
    across = torch.eye(8) - torch.outer(f, f)
    torch.testing.assert_close(new[MASKS[0]] @ across, old @ across, atol=1e-5, rtol=0)


def test_a_feature_found_twice_is_projected_out_once():
    twice = torch.cat([FEATURES[:, :1], 3 * FEATURES[:, :1]], 1)
    masks = MASKS[:1].expand(2, -1)
    for delta in (1.0, 4.0):
        once = project_out(MATRIX, FEATURES[:, :1], MASKS[:1], delta)
        torch.testing.assert_close(project_out(MATRIX, twice, masks, delta), once, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mass", [0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_carriers_are_the_smallest_set_that_covers_the_mass(mass, seed):
    column = noise(8, seed=seed)
    column[[2, 5]] = 0
    share = column.abs() / column.abs().sum()
    subsets = (s for size in range(9) for s in itertools.combinations(range(8), size))
    smallest = next(len(s) for s in subsets if share[list(s)].sum() >= mass - 1e-6)
    found = carriers(column, mass)
    assert int(found.sum()) == smallest
    assert share[found].sum() >= mass - 1e-6
    assert not found[[2, 5]].any()


CARRIERS = {3: 3.0, 17: 2.5, 40: 2.0}


@pytest.fixture
def planted(cache, monkeypatch) -> list:
    """Neurons in which one feature fires on the concept's key tokens, and two on tokens of both texts."""
    calls = []

    def planted_collect(loaded, texts, sites, **_):
        _, ids = collect(loaded, texts, sites)
        calls.append(texts)
        X = 0.01 * noise(len(ids), 64, seed=9)
        for k in (50, 53):
            X[:, k : k + 3] += (noise(len(ids), 1, seed=k + len(calls)) - 1).clamp_min(0)
        for neuron, weight in CARRIERS.items():
            X[:, neuron] += weight * (keyness_bits(loaded, make_concept())[ids] > 0)
        return dict.fromkeys(sites, X), ids

    monkeypatch.setattr(snmf, "collect", planted_collect)
    return calls


PLANTED = {"band": "late", "rank": 3, "sparsity": 3 / 64, "features": 1, "min_keyness": 1.0}


@pytest.mark.parametrize("side", ["out", "in"])
def test_a_planted_feature_is_found_and_projected_out(tiny, planted, side):
    deltas = {f"delta_{name}": float(name == side) for name in ("out", "in")}
    edit = snmf.run(tiny, make_concept(), SnmfConfig(**PLANTED, **deltas))
    (about,) = edit.provenance.config["selected"]
    assert set(about["top_tokens"].split()[:3]) == {"Rome", "Roman", "Romans"}
    assert planted == [SENTENCES, NEUTRAL]
    name = DOWN.format(1) if side == "out" else "model.layers.1.mlp.up_proj.weight"
    assert set(edit.tensors) == {name}
    old, new = snapshot(tiny)[name], state_with(edit, tiny)[name]
    old, new = (old.T, new.T) if side == "out" else (old, new)  # one row a neuron
    changed = (old != new).any(1).nonzero().flatten().tolist()
    assert changed == list(CARRIERS)
    F = snmf.factorize(tiny, make_concept(), SnmfConfig(**PLANTED), seed=42)[1].F[:, about["feature"]]
    direction = torch.nn.functional.normalize(old.T @ F, dim=0)
    assert (old[changed] @ direction).abs().min() > 1e-2
    assert (new[changed] @ direction).abs().max() < 1e-5


def test_no_strength_means_no_change(tiny, planted, tmp_path):
    edit = snmf.run(tiny, make_concept(), SnmfConfig(**PLANTED, delta_out=0.0))
    assert edit.changed().empty
    with Edit.load(edit.save(tmp_path / "edit")).applied(tiny):
        assert weights_hash(tiny.model) == tiny.weights_hash


# RMU


def rmu_target(config: RmuConfig, seed: int = 42) -> torch.Tensor:
    direction = noise(32, seed=seed)
    return config.steering * direction / direction.norm()


@pytest.mark.parametrize("n_trained", [1, 2])
def test_rmu_equals_a_slow_loop(tiny, n_trained):
    """With batches of all texts, so that their order does not matter."""
    config = RmuConfig(layer=1, n_trained=n_trained, steering=20.0, retain_weight=3.0, lr=1e-3, steps=4)
    edit = rmu.run(tiny, make_concept(), config)
    names = [DOWN.format(layer) for layer in range(2 - n_trained, 2)]
    trained = [tiny.model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(trained, lr=config.lr)
    kept = plain_stream(tiny, NEUTRAL, 1).detach()
    for _ in range(config.steps):
        forget = (plain_stream(tiny, SENTENCES, 1) - rmu_target(config)).square().mean()
        retain = (plain_stream(tiny, NEUTRAL, 1) - kept).square().mean()
        optimizer.zero_grad()
        (forget + config.retain_weight * retain).backward()
        optimizer.step()
    assert set(edit.tensors) == set(names)
    for name, parameter in zip(names, trained, strict=True):
        torch.testing.assert_close(edit.tensors[name].values, parameter.detach(), atol=2e-5, rtol=0)


def test_rmu_moves_concept_text_to_the_target_and_keeps_neutral_text(tiny):
    site, common = Site("residual", 1), {"layer": 1, "n_trained": 2, "steering": 30.0, "lr": 5e-3, "steps": 40}
    moved, drift = {}, {}
    for weight in (0.0, 10.0):
        config = RmuConfig(**common, retain_weight=weight)
        edit = rmu.run(tiny, make_concept(), config)
        gaps = [(states(tiny, SENTENCES, site, e) - rmu_target(config)).norm(dim=1).mean() for e in (None, edit)]
        moved[weight] = float(gaps[1] / gaps[0])
        drift[weight] = float((states(tiny, NEUTRAL, site, edit) - states(tiny, NEUTRAL, site)).norm(dim=1).mean())
    assert moved[0.0] < 0.8 and moved[10.0] < 0.95
    assert drift[10.0] < 0.5 * drift[0.0]


@pytest.mark.parametrize(("position", "same"), [(0, True), (1, False)])
@pytest.mark.parametrize("method", ["rmu", "crisp"])
def test_the_first_position_has_no_influence_on_training(tiny, small_saes, monkeypatch, method, position, same):
    module, config = {
        "rmu": (rmu, RmuConfig(layer=1, n_trained=2, steps=3)),
        "crisp": (crisp, CRISP),
    }[method]
    plain = module.run(tiny, make_concept(), config)
    original = module.activations

    def disturbed(*arguments):
        found = original(*arguments)
        for value in found.values():
            value[:, position] *= 10
        return found

    monkeypatch.setattr(module, "activations", disturbed)
    assert (module.run(tiny, make_concept(), config).identity == plain.identity) == same


def test_batches_take_every_text_before_any_again():
    loaded, texts = make_loaded(), (*SENTENCES, *NEUTRAL)
    source = batches(loaded, texts, 3, torch.Generator().manual_seed(0))
    seen = [loaded.decode(row[row != loaded.pad_id].tolist()) for _ in range(16) for row in next(source).ids]
    rounds = [seen[k : k + 8] for k in range(0, 48, 8)]
    assert all(set(r) == set(texts) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


# CRISP

CRISP = CrispConfig(layers=(1,), first_layer=0, features=5, min_ratio=1.5, steps=3)


def selected_activity(loaded: LoadedModel, edit: Edit, texts, *, edited: bool) -> float:
    """Mean activation, over the texts, of the features that the edit was to lower."""
    (sae,) = load_saes(loaded, make_concept(), "residual", [1])
    features = [row["feature"] for row in edit.provenance.config["selected"]]
    return float(sae.encode(states(loaded, texts, sae.site, edit if edited else None))[:, features].mean())


def test_crisp_lowers_the_features_on_concept_text_and_keeps_neutral_text(tiny, small_saes):
    drift, site = {}, Site("residual", 1)
    for beta in (0.0, 0.99):
        edit = crisp.run(tiny, make_concept(), replace(CRISP, beta=beta, steps=40, lr=3e-3))
        before, after = (selected_activity(tiny, edit, SENTENCES, edited=e) for e in (False, True))
        assert after < 0.7 * before
        drift[beta] = float((states(tiny, NEUTRAL, site, edit) - states(tiny, NEUTRAL, site)).square().mean())
    assert drift[0.99] < 0.3 * drift[0.0]


def test_an_untrained_adapter_changes_nothing(tiny):
    before = snapshot(tiny)
    with crisp.adapted(tiny, CRISP, 0) as (parameters, merged):
        values = merged()
        assert parameters and all(p.requires_grad for p in parameters)
    assert all(torch.equal(value, before[name]) for name, value in values.items())
    assert weights_edit(tiny, make_concept(), "crisp", CRISP, values, seed=0).changed().empty


@pytest.mark.parametrize("first_layer", [0, 1])
def test_the_merged_weights_give_the_adapters_logits(tiny, first_layer):
    """TRAPS 5; embeddings, head and norms have no adapter."""
    config = replace(CRISP, first_layer=first_layer)
    ids = torch.tensor([tiny.encode(SENTENCES[0])])
    with crisp.adapted(tiny, config, 0) as (parameters, merged), torch.no_grad():
        plain = tiny.model(ids).logits
        for k, parameter in enumerate(parameters):
            parameter.copy_(0.05 * noise(*parameter.shape, seed=k))
        adapted, values = tiny.model(ids).logits, merged()
        trainable = {name for name, p in tiny.model.named_parameters() if p.requires_grad}
        assert len(trainable) == len(parameters) == 2 * len(values)
    linear = {n for n, m in tiny.model.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)}
    assert set(values) == {f"{n}.weight" for n in linear if int(n.split(".")[2]) >= first_layer}
    with weights_edit(tiny, make_concept(), "crisp", config, values, seed=0).applied(tiny), torch.no_grad():
        torch.testing.assert_close(tiny.model(ids).logits, adapted, atol=1e-5, rtol=1e-5)
    assert (adapted - plain).abs().max() > 0.1


def hand_made(**kind) -> SparseAutoencoder:
    """Reads one coordinate a feature; feature 0 is written along (1, 1), feature 1 along (0, 1)."""
    W_dec = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    return SparseAutoencoder(Site("mlp_out", 0), torch.eye(2), torch.zeros(2), W_dec, torch.zeros(2), **kind)


# Kinds for which feature 0 is active at (2, ·) and not at (1, 2).
STRICT = {"topk": {"k": 1}, "jumprelu": {"threshold": torch.tensor([1.5, 0.0])}}


@pytest.mark.parametrize("kind", STRICT)
def test_the_activity_counts_where_the_feature_was_active(kind):
    """Feature 0 on three tokens: active on the first only, as the autoencoder's kind has it; margin 2 · |mean pre|."""
    before, now = (
        torch.tensor([[2.0, 0.0], [1.0, 2.0], [-1.5, 0.0]]),
        torch.tensor([[0.5, 0.0], [9.0, 0.0], [9.0, 0.0]]),
    )
    value = crisp._activity(hand_made(**STRICT[kind]), [0], now, before, margin=2.0)
    assert float(value) == pytest.approx(0.5 + 2 * abs(2.0 + 1.0 - 1.5) / 3)
    assert float(crisp._activity(hand_made(k=1), [], now, before, margin=2.0)) == 0


# PISCES

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


def test_neurons_below_the_threshold_keep_their_bits():
    W_out, sae = noise(64, 32), random_sae()
    for tau in (0.1, 0.5, 1.0):
        projections = [(W_out @ sae.W_enc[:, f]).abs() for f in (3, 7)]
        touched = torch.stack([p >= tau * p.max() for p in projections]).any(0)
        new = turn_against(W_out, sae, [3, 7], tau, 5.0)
        assert torch.equal((new != W_out).any(1), touched)
        assert tau < 1 or int(touched.sum()) == 2


def test_each_feature_is_turned_on_its_own_neurons():
    """Coefficients of two features add up, because a decoder is linear."""
    W_out, sae = noise(64, 32), random_sae()
    both, *alone = (turn_against(W_out, sae, features, 0.3, 5.0) - W_out for features in ([3, 7], [3], [7]))
    torch.testing.assert_close(both, sum(alone), atol=1e-3, rtol=1e-3)


def random_sae(scale: float = 1.0) -> SparseAutoencoder:
    W_enc, W_dec = noise(32, 40, seed=1), noise(40, 32, seed=2)
    return SparseAutoencoder(Site("mlp_out", 0), W_enc, noise(40), W_dec, noise(32, seed=3), k=4, scale=scale)


def test_an_input_scale_is_part_of_the_autoencoder():
    """The same autoencoder with its scale inside its weights turns neurons the same way."""
    scaled = random_sae(scale=4.0)
    folded = replace(scaled, scale=1.0, W_enc=4 * scaled.W_enc, W_dec=scaled.W_dec / 4, b_dec=scaled.b_dec / 4)
    W_out = noise(64, 32)
    torch.testing.assert_close(folded.decode(folded.encode(W_out)), scaled.decode(scaled.encode(W_out)))
    one, other = (turn_against(W_out, sae, [3, 7], 0.3, 5.0) for sae in (scaled, folded))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("change", [{"k": 1}, {"k": None}, {"k": None, "threshold": torch.ones(64)}, {"scale": 9.0}])
def test_a_selection_in_the_cache_is_that_of_its_autoencoder(tiny, small_saes, change):
    (sae,) = load_saes(tiny, make_concept(), "residual", [0])
    one, again, other = (
        pisces.select_features(tiny, make_concept(), [s], 9, 0.0) for s in (sae, sae, replace(sae, **change))
    )
    assert one.equals(again) and not one.equals(other)


@pytest.mark.parametrize(
    ("ramp", "expected"), [(0, [10, 10]), (1, [1, 10]), (2, [1, 10]), (10, [1, 2])], ids=lambda value: str(value)
)
def test_mu_grows_over_the_first_layers(tiny, small_saes, monkeypatch, ramp, expected):
    used = []
    monkeypatch.setattr(pisces, "turn_against", lambda W, sae, features, tau, mu: used.append(mu) or W)
    edit = pisces.run(tiny, make_concept(), PiscesConfig(layers=(0, 1), min_ratio=0, mu=10.0, ramp=ramp))
    assert used == pytest.approx(expected)
    assert edit.changed().empty
