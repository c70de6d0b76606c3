"""The contract that every method keeps, alone and after an EMBER edit, and what the controls are."""

import dataclasses
import itertools
import json
import math
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from concept_erasure import LeaceEraser
from helpers.edits import EMBED, assert_same_edit, differing, listed, snapshot, state_with
from helpers.edits import SETTINGS as FIT
from helpers.tiny import NEUTRAL, SENTENCES, SMALL_SAES, make_concept, make_loaded

from ember.editing import Edit
from ember.errors import DamagedFileError, EmberError
from ember.methods import METHODS, controls, erase
from ember.methods.controls import CONTROLS
from ember.methods.ember import RowTarget, edit_from_features, fit
from ember.methods.sae import SaeTraining
from ember.models.loading import LoadedModel, weights_hash
from ember.tokens import background_frequency, token_table

SNMF = {"band": "late", "delta_in": 1.0, "tokens": 60, "rank": 8, "sparsity": 0.1, "min_keyness": -99, "max_iter": 30}
SETTINGS = {
    "snmf": SNMF,
    "rmu": {"layer": 1, "n_trained": 1, "steps": 3},
    "crisp": {"layers": (1,), "first_layer": 1, "steps": 3, "min_ratio": 0, "sae_training": SMALL_SAES},
    "pisces": {"layers": (0, 1), "min_ratio": 0, "sae_training": SMALL_SAES},
    **dict.fromkeys(("ember", *CONTROLS), FIT),
}
LINEAR = [*(f"mlp.{part}_proj" for part in ("up", "down", "gate")), *(f"self_attn.{part}_proj" for part in "qkvo")]
CHANGES = {
    **{name: {EMBED} for name in ("ember", *CONTROLS)},
    "snmf": {f"model.layers.1.{part}.weight" for part in LINEAR[:2]},
    "rmu": {"model.layers.1.mlp.down_proj.weight"},
    "crisp": {f"model.layers.1.{part}.weight" for part in LINEAR},
    "pisces": {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)},
}
ARMS = ("alone", "after EMBER")
CASES = list(itertools.product(("llama", "gemma2"), METHODS, ARMS))
every = pytest.mark.parametrize("case", CASES, indirect=True, ids=" ".join, scope="module")
after_ember = pytest.mark.parametrize("case", CASES[1::2], indirect=True, ids=" ".join, scope="module")


def config_of(method: str, **changes):
    return METHODS[method].config(**SETTINGS[method] | changes)


def first_edit(loaded: LoadedModel, arm: str) -> Edit | None:
    """The EMBER edit of the ``after EMBER`` arm."""
    return None if arm == "alone" else METHODS["ember"].run(loaded, make_concept(), config_of("ember", delta=3.0))


def made(kind: str, method: str, arm: str, *, concept=None, **options) -> Edit:
    """The method's edit of a fresh model, with the global random state elsewhere than in ``case``."""
    loaded = make_loaded(kind)
    torch.manual_seed(99)
    return erase(loaded, concept or make_concept(), method, config_of(method), first=first_edit(loaded, arm), **options)


def facts(loaded: LoadedModel) -> dict:
    """Everything about a model that a method must leave as it is."""
    return {
        "weights": (weights_hash(loaded.model), loaded.weights_hash),
        "modules": {name: (type(m), m.training, sorted(vars(m))) for name, m in loaded.model.named_modules()},
        "hooks": [[len(v) for k, v in vars(m).items() if k.endswith("hooks")] for m in loaded.model.modules()],
        "parameters": {n: (p.requires_grad, p.grad, p.data_ptr()) for n, p in loaded.model.named_parameters()},
        "global state": (torch.get_rng_state().tolist(), torch.is_grad_enabled()),
    }


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A method's edit of a tiny model, and the facts of the model before and after it was made."""
    kind, method, arm = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBER_CACHE", str(tmp_path_factory.mktemp("cache")))
        loaded = make_loaded(kind)
        loaded.model.get_parameter(EMBED).requires_grad_(False)  # flags are kept, not set
        first = first_edit(loaded, arm)
        made = {"kind": kind, "method": method, "arm": arm, "loaded": loaded, "first": first, "before": facts(loaded)}
        made["edit"] = erase(loaded, make_concept(), method, config_of(method), first=first)
        yield SimpleNamespace(**made, after=facts(loaded))


@every
def test_the_model_is_left_as_it_was_the_edit_changes_what_it_lists_and_may_and_tells_how_it_was_made(case, tmp_path):
    assert case.after == case.before
    before, changed = snapshot(case.loaded), state_with(case.edit, case.loaded)
    assert differing(before, changed) == listed(case.edit)
    assert facts(case.loaded)["weights"] == case.before["weights"]
    again = Edit.load(case.edit.save(tmp_path / "edit"))
    assert_same_edit(again, case.edit)
    assert again.identity == case.edit.identity
    assert not differing(changed, state_with(again, case.loaded))
    allowed = CHANGES[case.method] | ({EMBED} if case.first else set())
    assert {name for name, _ in listed(case.edit)} == allowed
    table = token_table(case.loaded, SENTENCES, NEUTRAL)
    own = table if case.method == "random_rows" else table[table.role == "concept"]
    rows = {row for name, row in listed(case.edit) if name == EMBED}
    assert rows <= set(own.token_id)
    assert bool(rows) == (EMBED in allowed)
    made_by, last = case.edit.provenance, vars(case.edit.provenance)
    assert (made_by.base_model, made_by.base_hash) == (case.loaded.name, case.loaded.weights_hash)
    assert made_by.method == (f"ember+{case.method}" if case.first else case.method)
    if case.first:
        before, last = made_by.config["steps"]
        assert before["config"] == case.first.provenance.config
    assert (last["method"], last["seed"], last["concept"]) == (case.method, 42, "Tiny Rome")
    config = config_of(case.method)
    expected = json.loads(json.dumps(dataclasses.asdict(config)))
    assert expected.items() <= last["config"].items()
    if EMBED not in CHANGES[case.method]:  # those hold features as a tuple, which JSON does not know
        assert type(config)(**expected) == config and hash(type(config)(**expected)) == hash(config)
    assert made_by.side == ("input" if case.first or EMBED in CHANGES[case.method] else "none")
    assert made_by.versions["torch"] == torch.__version__


@after_ember
def test_the_composed_edit_is_one_after_the_other_and_arms_that_share_a_cache_do_not_mix(case, tmp_path, monkeypatch):
    """TRAPS 4; in both orders, each arm twice, so that the second time meets what both have left."""
    with case.first.applied(case.loaded):
        middle = snapshot(case.loaded)
        later = METHODS[case.method].run(case.loaded, make_concept(), config_of(case.method))
        assert not differing(middle, snapshot(case.loaded))
        expected = state_with(later, case.loaded)
    assert not differing(expected, state_with(case.edit, case.loaded))
    assert {name for name, _ in listed(later)} == CHANGES[case.method]
    for order in (ARMS, ARMS[::-1]):
        monkeypatch.setenv("EMBER_CACHE", str(tmp_path / order[0]))
        found = {arm: made(case.kind, case.method, arm) for arm in order}
        assert_same_edit(found[case.arm], case.edit)
        for arm in order:
            assert_same_edit(made(case.kind, case.method, arm), found[arm])
        touched = (state_with(edit, make_loaded(case.kind)) for edit in found.values())
        assert CHANGES[case.method] & {name for name, _ in differing(*touched)}


@every
def test_the_seed_decides_where_chance_has_a_part_and_no_question_or_paragraph_does(case, cache):
    """On another copy of the model, with nothing in the cache, whatever the global random state."""
    assert_same_edit(made(case.kind, case.method, case.arm), case.edit)
    other = made(case.kind, case.method, case.arm, seed=43)
    assert (other.identity != case.edit.identity) == METHODS[case.method].seeded
    assert other.provenance != case.edit.provenance
    bare = replace(make_concept(), paragraphs=("Caesar.",), questions=(), other_sense=(), simdom="")
    assert made(case.kind, case.method, case.arm, concept=bare).identity == case.edit.identity


@pytest.mark.parametrize("method", ["crisp", "pisces"])
def test_autoencoders_are_not_trained_on_an_edited_model(tiny, cache, method):
    first = first_edit(tiny, "after EMBER")
    with first.applied(tiny), pytest.raises(EmberError, match="trained on the unedited model"):
        METHODS[method].run(tiny, make_concept(), config_of(method))
    assert not (cache / "sae").exists() or not any((cache / "sae").iterdir())
    erase(tiny, make_concept(), method, config_of(method), first=first)
    entries = set((cache / "sae").iterdir())
    erase(make_loaded(tiny.spec.name.removeprefix("tiny-")), make_concept(), method, config_of(method))
    assert entries and set((cache / "sae").iterdir()) == entries


BEYOND = [name for name in METHODS if EMBED not in CHANGES[name]]
REFUSED = {
    "only edits of embeddings are known for this architecture": {name: {} for name in BEYOND},
    r"diverged at step [1-9].*lower the learning rate": {name: {"lr": 1e30, "steps": 5} for name in ("rmu", "crisp")},
    r"must be 0\.\.1, got": {"rmu": {"layer": 2}, "crisp": {"layers": (1, 2)}, "pisces": {"layers": (2,)}},
    "no S.* feature is much more active on 'Tiny Rome'": {
        "snmf": {"min_keyness": 99}, "crisp": {"min_ratio": 1e9}, "pisces": {"min_ratio": 1e9},
    },
}  # fmt: skip


@pytest.mark.parametrize(("message", "method"), [(message, name) for message in REFUSED for name in REFUSED[message]])
def test_an_edit_that_fails_leaves_the_model_as_it_was(tiny, cache, message, method):
    before, concept = facts(tiny), replace(make_concept(), sentences=NEUTRAL)
    known, changes = tiny.architecture, REFUSED[message][method]
    tiny.architecture = known if changes else replace(known, layers="", mlp_up="", mlp_down="")
    with pytest.raises((EmberError, ValueError), match=message):
        erase(tiny, concept, method, config_of(method, **changes))
    assert facts(tiny) == before


AT_LEAST_1 = {
    "ember": "rank", "snmf": "features rank tokens max_iter patience", "rmu": "n_trained steps batch_size",
    "crisp": "features lora_rank steps batch_size", "pisces": "features", "autoencoders": "width k epochs batch_size",
}  # fmt: skip
SHARES = {"ember": "sparsity", "snmf": "sparsity mass", "pisces": "tau"}
BAD = [
    *((method, names, 0, "must be at least 1, got 0") for method, names in AT_LEAST_1.items()),
    *((*share, value, rf"must be in \(0, 1\], got {value}") for value in (0, 1.1) for share in SHARES.items()),
    ("ember", "side", "left", "must be one of input, output, both, got 'left'"),
    ("ember", "precision", "half", "must be one of float64, float32, got 'half'"),
    ("ember", "rule", "best", "must be one of keyness, paper, got 'best'"),
    ("snmf", "band", "first", "must be one of early, middle, late, got 'first'"),
    ("rmu", "steering retain_weight lr", -1.0, "must be at least 0, got -1.0"),
    ("rmu", "lr", float("nan"), "must be at least 0, got nan"),
    ("rmu", "layer", 1, "must be at least n_trained - 1 = 2, got 1"),
    *(("crisp", "beta", value, rf"must be in \[0, 1\], got {value}") for value in (-0.1, 1.1)),
    *(("crisp", "first_layer", value, rf"must be 0\.\.10, the last of layers, got {value}") for value in (-1, 11)),
    *((method, "layers", (), "must name at least one layer") for method in ("crisp", "pisces")),
    ("pisces", "mu", -1, "must be at least 0, got -1"),
    ("autoencoders", "k", 5000, r"must be 1\.\.width = 1536, got 5000"),
]


@pytest.mark.parametrize(("method", "names", "value", "message"), BAD, ids=str)
def test_configs_check_themselves(method, names, value, message):
    kind = SaeTraining if method == "autoencoders" else METHODS[method].config
    assert kind.__dataclass_params__.frozen
    for name in names.split():
        with pytest.raises(ValueError, match=f"^{name} {message}$"):
            kind(**{name: value})


def change_by(loaded: LoadedModel, method: str, **changes) -> tuple[list[int], torch.Tensor]:
    """The rows that a method edits [r], and by how much [r, d_model]."""
    edit = METHODS[method].run(loaded, make_concept(), config_of(method, **changes)).tensors[EMBED]
    return edit.rows.tolist(), edit.values - loaded.embedding.detach()[edit.rows]


def target_of(loaded: LoadedModel, side: str = "input") -> RowTarget:
    """What a control edit sets out from."""
    seen, config = Mock(side_effect=lambda target: target.old), config_of("leace", side=side)
    edit_from_features(loaded, fit(loaded, make_concept(), config), config, displacement=seen)
    return seen.call_args.args[0]


def test_where_and_how_far_the_controls_move_rows(tiny, cache):
    """To the mean of all, to zero, as far as EMBER but elsewhere; or other rows of the same texts."""
    tiny.architecture = replace(tiny.architecture, layers="", mlp_up="", mlp_down="")  # edits of embeddings need none
    E, (rows, own) = tiny.embedding.detach(), change_by(tiny, "ember")
    for name in CONTROLS:  # each shares rows or displacements with EMBER, and goes delta times as far
        (moved, whole), (same, half) = (change_by(tiny, name, delta=delta) for delta in (1.0, 0.5))
        assert moved == same and len(set(moved)) == len(rows), name
        assert (moved == rows) != torch.allclose(whole, own, atol=1e-5, rtol=1e-4), name
        torch.testing.assert_close(half, whole / 2, atol=1e-5, rtol=1e-4)
    mean = E[rows] + change_by(tiny, "mean_rows")[1]
    torch.testing.assert_close(mean, E.mean(0).expand_as(own), atol=1e-6, rtol=1e-5)
    assert torch.equal(change_by(tiny, "zero_rows")[1], -E[rows])
    _, aside = change_by(tiny, "random_direction")
    torch.testing.assert_close(aside.norm(dim=1), own.norm(dim=1), rtol=1e-3, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(aside, own, dim=1).abs().max() < 0.7
    others, _ = change_by(tiny, "random_rows")
    assert not set(others) & set(rows)
    assert set(others) <= set(token_table(tiny, SENTENCES, NEUTRAL).token_id)


def test_matched_rows_become_the_mean_of_rows_of_the_same_frequency(tiny, cache):
    target, frequency = target_of(tiny), background_frequency(tiny)
    rows, E = target.rows.tolist(), tiny.embedding.detach()
    free = [i for i in sorted(frequency) if i not in set(rows) | tiny.special_ids]
    assert any(row in frequency for row in rows)
    new = E[rows] - controls.towards_matched_mean(target, matched=3)
    for row, value in zip(rows, new, strict=True):
        own = math.log(frequency.get(row, min(frequency[i] for i in free)))
        nearest = sorted(free, key=lambda i: (abs(math.log(frequency[i]) - own), i))[:3]
        torch.testing.assert_close(value, E[nearest].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["input", "output"])
def test_leace_keeps_its_promise_on_the_rows_it_was_fitted_on(tiny, cache, side):
    """After LEACE on all of V' the edited rows have the mean of the others; before, they did not (the control)."""
    target = target_of(tiny, side)
    ids = torch.tensor(target.features.table.token_id.tolist())
    edited = torch.isin(ids, target.rows)
    X = target.matrix[ids].double()
    after = LeaceEraser.fit(X, edited.double())(X)
    assert (X[edited].mean(0) - X[~edited].mean(0)).norm() > 0.1
    torch.testing.assert_close(after[edited].mean(0), after[~edited].mean(0), atol=1e-8, rtol=0)
    change = controls.concept_subspace(target)
    torch.testing.assert_close(change.double(), X[edited] - after[edited], atol=1e-5, rtol=1e-4)


def test_frequent_tokens_are_spared_on_demand(tiny, cache):
    zipf = fit(tiny, make_concept(), config_of("ember")).table.set_index("token_id").zipf
    rows, _ = change_by(tiny, "ember")
    bound = float(zipf[rows].dropna().median())
    spared, _ = change_by(tiny, "ember", max_zipf=bound)
    assert spared == [i for i in rows if not zipf[i] > bound]
    assert 0 < len(spared) < len(rows)
    # Without punctuation every token has a frequency.
    words = replace(make_concept(), sentences=tuple(re.sub("[.,]", "", s) for s in SENTENCES))
    with pytest.raises(EmberError, match="no concept-only token of zipf ≤ -99; nothing to edit"):
        erase(make_loaded(), words, "ember", config_of("ember", max_zipf=-99.0))


def test_features_may_come_from_a_folder(tiny, cache, tmp_path):
    features = fit(tiny, make_concept(), config_of("ember"), seed=7)
    features = replace(features, settings={**features.settings, "imported": {"file": "theirs.pkl"}})
    folder = features.save(tmp_path / "features")
    taken = config_of("ember", features_from=str(folder), rank=9)
    for make in (partial(erase, tiny, make_concept(), method) for method in ("ember", "mean_rows")):
        own, other = make(config_of("ember"), seed=7), make(config_of("ember"))
        fits, edit = set((cache / "features").iterdir()), make(taken)
        assert edit.identity == own.identity != other.identity
        assert set((cache / "features").iterdir()) == fits  # nothing is factorized
        about = edit.provenance.config
        assert (about["features_from"], about["fitted"]["imported"]) == (str(folder), {"file": "theirs.pkl"})
        assert own.provenance.config["features_from"] is None and "fitted" not in own.provenance.config
    with pytest.raises(EmberError, match=rf"^the features in {folder} were fitted on tiny-\w+ \(\w{{12}}\), not this"):
        erase(make_loaded("llama", seed=5), make_concept(), "ember", taken)
    with pytest.raises(EmberError, match=f"^{folder} holds features of 'Tiny Rome', not of 'Athens'$"):
        erase(tiny, replace(make_concept(), name="Athens"), "ember", taken)
    with pytest.raises(DamagedFileError, match=str(tmp_path / "none")):
        erase(tiny, make_concept(), "ember", replace(taken, features_from=str(tmp_path / "none")))
