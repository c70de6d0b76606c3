"""What SNMF and RMU compute, against brute force and slow loops, and what they achieve."""

import itertools

import pytest
import torch
from helpers.edits import snapshot, state_with
from helpers.tiny import NEUTRAL, SENTENCES, make_concept, make_loaded, noise

from ember.editing import Edit
from ember.methods import rmu, snmf
from ember.methods.rmu import RmuConfig
from ember.methods.selection import keyness_bits
from ember.methods.snmf import SnmfConfig, carriers, project_out
from ember.methods.training import batches
from ember.models.activations import collect
from ember.models.loading import LoadedModel

DOWN = "model.layers.{}.mlp.down_proj.weight"


# Twelve neurons in eight dimensions; the third neuron carries no feature, the last one both.
MATRIX, FEATURES = noise(12, 8), noise(12, 2, seed=1)
MASKS = torch.zeros(2, 12, dtype=torch.bool)
MASKS[0, [0, 1, 4, 11]] = True
MASKS[1, [3, 5, 11]] = True
WRITTEN = torch.nn.functional.normalize((MATRIX.T @ FEATURES).T, dim=1)  # the unit direction that each writes


def test_a_full_projection_leaves_nothing_of_any_feature_a_neuron_carries():
    new, free, only_first = project_out(MATRIX, FEATURES, MASKS, 1.0), ~MASKS.any(0), MASKS[0] & ~MASKS[1]
    for mask, direction in zip(MASKS, WRITTEN, strict=True):
        assert (MATRIX[mask] @ direction).abs().min() > 1e-2
        assert (new[mask] @ direction).abs().max() < 1e-5
    assert torch.equal(new[free], MATRIX[free])
    assert ((new - MATRIX)[only_first] @ WRITTEN[1]).abs().max() > 1e-2  # not orthogonalized away


@pytest.mark.parametrize("delta", [0.0, 0.5, 1.0, 2.0, 4.0, 7.0])
def test_a_projection_equals_a_loop_over_neurons_also_where_a_feature_was_found_twice(delta):
    """The component is scaled by 1 − δ, so that 4 triples it with the sign flipped."""
    f, new, expected = WRITTEN[0], project_out(MATRIX, FEATURES[:, :1], MASKS[:1], delta), MATRIX.clone()
    for j in MASKS[0].nonzero().flatten():
        expected[j] = MATRIX[j] - delta * f * sum(f[i] * MATRIX[j, i] for i in range(8))
    torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close((new @ f)[MASKS[0]], (1 - delta) * (MATRIX @ f)[MASKS[0]], atol=1e-5, rtol=1e-5)
    assert delta or torch.equal(new, MATRIX)
    twice = torch.cat([FEATURES[:, :1], 3 * FEATURES[:, :1]], 1)
    torch.testing.assert_close(project_out(MATRIX, twice, MASKS[:1].expand(2, -1), delta), new, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mass", [0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_carriers_are_the_smallest_set_that_covers_the_mass(mass, seed):
    column = noise(8, seed=seed)
    column[[2, 5]] = 0
    share = column.abs() / column.abs().sum()
    subsets = (s for size in range(9) for s in itertools.combinations(range(8), size))
    smallest = next(len(s) for s in subsets if share[list(s)].sum() >= mass - 1e-6)
    mask = carriers(column, mass)
    assert int(mask.sum()) == smallest
    assert share[mask].sum() >= mass - 1e-6
    assert not mask[[2, 5]].any()


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
def test_a_planted_feature_is_found_and_projected_out(tiny, planted, tmp_path, side):
    edit = snmf.run(tiny, make_concept(), SnmfConfig(**PLANTED, delta_out=side == "out", delta_in=side == "in"))
    (about,) = edit.provenance.config["selected"]
    assert set(about["top_tokens"].split()[:3]) == {"Rome", "Roman", "Romans"}
    assert [sorted(texts) for texts in planted] == [sorted(SENTENCES), sorted(NEUTRAL)]
    name = {"out": DOWN.format(1), "in": "model.layers.1.mlp.up_proj.weight"}[side]
    assert set(edit.tensors) == {name}
    states = (snapshot(tiny)[name], state_with(edit, tiny)[name])
    old, new = (state.T if side == "out" else state for state in states)  # one row a neuron
    changed = (old != new).any(1).nonzero().flatten().tolist()
    assert changed == list(CARRIERS)
    F = snmf.factorize(tiny, make_concept(), SnmfConfig(**PLANTED), seed=42)[0][1][:, about["feature"]]
    direction = torch.nn.functional.normalize(old.T @ F, dim=0)
    assert (old[changed] @ direction).abs().min() > 1e-2
    assert (new[changed] @ direction).abs().max() < 1e-5
    nothing = snmf.run(tiny, make_concept(), SnmfConfig(**PLANTED, delta_out=0.0))
    assert Edit.load(nothing.save(tmp_path / "edit")).changed().empty


def test_every_band_holds_a_layer_and_a_factorization_in_the_cache_is_that_of_its_settings(tiny, cache):
    for band, layer in {"early": 0, "middle": 0, "late": 1}.items():
        fits, table = snmf.factorize(tiny, make_concept(), SnmfConfig(band=band, rank=3, tokens=20, max_iter=2), seed=0)
        assert set(fits) == set(table.layer) == {layer}
    settings = {"band": "late", "rank": 5, "sparsity": 0.1, "max_iter": 20, "patience": 20, "tol": 1e-9}

    def fit(seed=0, **changes) -> torch.Tensor:
        (F,) = snmf.factorize(tiny, make_concept(), SnmfConfig(**settings | changes), seed=seed)[0].values()
        return F

    one = fit()
    for change in ({"seed": 1}, {"rank": 4}, {"sparsity": 0.2}, {"tokens": 20}, {"max_iter": 2}, {"band": "middle"}):
        assert not torch.equal(fit(**change), one), change
        assert torch.equal(fit(), one)


def plain_stream(loaded: LoadedModel, texts, layer: int) -> torch.Tensor:
    """The stream after a layer at all positions but the first, one text at a time, through a plain hook."""
    kept = []
    handle = loaded.model.model.layers[layer].register_forward_hook(lambda _, __, out: kept.append(out[0, 1:]))
    for text in texts:
        loaded.model(torch.tensor([loaded.encode(text)]))
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("n_trained", [1, 2])
def test_rmu_equals_a_slow_loop(tiny, n_trained):
    """With batches of all texts, so that their order does not matter; it lowers the loss."""
    config = RmuConfig(layer=1, n_trained=n_trained, steering=20.0, retain_weight=3.0, lr=1e-3, steps=4)
    direction, losses = noise(32, seed=42), []
    edit = rmu.run(tiny, make_concept(), config)
    names = [DOWN.format(layer) for layer in range(2 - n_trained, 2)]
    trained = [tiny.model.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(trained, lr=config.lr)
    kept = plain_stream(tiny, NEUTRAL, 1).detach()
    for _ in range(config.steps):
        forget = (plain_stream(tiny, SENTENCES, 1) - 20 * direction / direction.norm()).square().mean()
        retain = (plain_stream(tiny, NEUTRAL, 1) - kept).square().mean()
        optimizer.zero_grad()
        losses.append(forget + config.retain_weight * retain)
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert set(edit.tensors) == set(names)
    for name, parameter in zip(names, trained, strict=True):
        torch.testing.assert_close(edit.tensors[name].values, parameter.detach(), atol=2e-5, rtol=0)


def test_batches_take_every_text_before_any_again():
    loaded, texts = make_loaded(), (*SENTENCES, *NEUTRAL)
    source = batches(loaded, texts, 3, torch.Generator().manual_seed(0))
    seen = [loaded.decode(row[row != loaded.pad_id].tolist()) for _ in range(16) for row in next(source).ids]
    rounds = [seen[k : k + 8] for k in range(0, 48, 8)]
    assert all(set(r) == set(texts) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
