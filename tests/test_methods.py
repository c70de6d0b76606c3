"""The contract that every method keeps, alone and after an EMBER edit; SNMF and RMU against slow references."""

import dataclasses
import itertools
import json
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.edits import EMBED, assert_same_edit, differing, listed, snapshot, state_with
from helpers.tiny import NEUTRAL, SENTENCES, make_concept, make_loaded, shrink_saes

from ember.editing import Edit
from ember.errors import EmberError
from ember.methods import METHODS, controls, erase
from ember.methods.ember import edit_from_features, fit
from ember.models.loading import LoadedModel, weights_hash
from ember.tokens import background_frequency, token_table

SETTINGS = {
    "ember": {"rank": 8, "sparsity": 0.1, "max_iter": 60, "patience": 20, "features": (0, 1)},
    "snmf": {
        "band": "late", "delta_in": 1.0, "tokens": 60, "rank": 8, "sparsity": 0.1, "min_keyness": -99, "max_iter": 30,
    },
    "rmu": {"layer": 1, "n_trained": 1, "steps": 3},
    "crisp": {"layers": (1,), "first_layer": 1, "steps": 3, "min_ratio": 0},
    "pisces": {"layers": (0, 1), "min_ratio": 0},
}  # fmt: skip
CONTROLS = ("mean_rows", "matched_rows", "zero_rows", "random_direction", "leace", "random_rows")
SETTINGS |= dict.fromkeys(CONTROLS, SETTINGS["ember"])
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
CHANGES = {
    "ember": {EMBED},
    **{control: {EMBED} for control in CONTROLS},
    "snmf": {f"model.layers.1.{part}.weight" for part in MLP[1:]},
    "rmu": {"model.layers.1.mlp.down_proj.weight"},
    "crisp": {f"model.layers.1.{part}.weight" for part in MLP + ATTENTION},
    "pisces": {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)},
}
RANDOM = {name for name, method in METHODS.items() if method.seeded}
WITH_SAES = ("crisp", "pisces")
BEYOND_EMBEDDINGS = ("snmf", "rmu", "crisp", "pisces")
ARMS = ("alone", "after EMBER")
KINDS = ("llama", "gemma2")
CASES = list(itertools.product(KINDS, METHODS, ARMS))
every = pytest.mark.parametrize("case", CASES, indirect=True, ids=" ".join, scope="module")
after_ember = pytest.mark.parametrize(
    "case", [c for c in CASES if c[2] != "alone"], indirect=True, ids=" ".join, scope="module"
)


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
    modules = dict(loaded.model.named_modules())
    return {
        "weights": weights_hash(loaded.model),
        "recorded": loaded.weights_hash,
        "types": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            (name, kind): len(hooks)
            for name, module in modules.items()
            for kind, hooks in vars(module).items()
            if kind.endswith("hooks")
        },
        "training": {name for name, module in modules.items() if module.training},
        "trainable": {name for name, p in loaded.model.named_parameters() if p.requires_grad},
        "gradients": {name for name, p in loaded.model.named_parameters() if p.grad is not None},
        "storage": {name: p.data_ptr() for name, p in loaded.model.named_parameters()},
        "random state": torch.get_rng_state().tolist(),
        "gradients enabled": torch.is_grad_enabled(),
    }


@dataclass(frozen=True)
class Case:
    """A method's edit of a tiny model, and the facts of the model before and after it was made."""

    kind: str
    method: str
    arm: str
    loaded: LoadedModel
    first: Edit | None
    edit: Edit
    before: dict
    after: dict


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    kind, method, arm = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBER_CACHE", str(tmp_path_factory.mktemp("cache")))
        shrink_saes(patch)
        loaded = make_loaded(kind)
        loaded.model.get_parameter(EMBED).requires_grad_(False)  # flags are kept, not set
        first = first_edit(loaded, arm)
        before = facts(loaded)
        edit = erase(loaded, make_concept(), method, config_of(method), first=first)
        yield Case(kind, method, arm, loaded, first, edit, before, facts(loaded))


# The contract


@every
def test_the_model_is_left_as_it_was(case):
    assert case.after == case.before


@every
def test_the_edit_changes_what_it_lists_and_is_undone_to_the_bit(case):
    before = snapshot(case.loaded)
    found = differing(before, state_with(case.edit, case.loaded))
    assert found == listed(case.edit)
    assert not differing(before, snapshot(case.loaded))
    assert weights_hash(case.loaded.model) == case.before["weights"]


@every
def test_it_changes_what_the_method_may_touch_and_nothing_else(case):
    allowed = CHANGES[case.method] | ({EMBED} if case.first else set())
    assert {name for name, _ in listed(case.edit)} == allowed
    table = token_table(case.loaded, SENTENCES, NEUTRAL)
    own = table if case.method == "random_rows" else table[table.role == "concept"]
    rows = {row for name, row in listed(case.edit) if name == EMBED}
    assert rows <= set(own.token_id)
    assert bool(rows) == (EMBED in allowed)


@every
def test_the_edit_comes_back_from_its_folder(case, tmp_path):
    again = Edit.load(case.edit.save(tmp_path / "edit"))
    assert_same_edit(again, case.edit)
    assert again.identity == case.edit.identity
    assert not differing(state_with(case.edit, case.loaded), state_with(again, case.loaded))


@every
def test_provenance_tells_how_it_was_made(case):
    made_by = case.edit.provenance
    config = made_by.config
    assert (made_by.base_model, made_by.base_hash) == (case.loaded.name, case.loaded.weights_hash)
    if case.first is not None:
        assert made_by.method == f"ember+{case.method}"
        before, last = made_by.config["steps"]
        assert before["config"] == case.first.provenance.config
        assert (last["method"], last["seed"], last["concept"]) == (case.method, 42, "Tiny Rome")
        config = last["config"]
    else:
        assert (made_by.method, made_by.seed, made_by.concept) == (case.method, 42, "Tiny Rome")
    expected = json.loads(json.dumps(dataclasses.asdict(config_of(case.method))))
    assert {name: config[name] for name in expected} == expected
    assert made_by.side == ("input" if case.first or EMBED in CHANGES[case.method] else "none")
    assert made_by.versions["torch"] == torch.__version__


@after_ember
def test_the_composed_edit_equals_one_after_the_other(case):
    with case.first.applied(case.loaded):
        middle = snapshot(case.loaded)
        later = METHODS[case.method].run(case.loaded, make_concept(), config_of(case.method))
        assert not differing(middle, snapshot(case.loaded))
        expected = state_with(later, case.loaded)
    assert not differing(expected, state_with(case.edit, case.loaded))
    assert {name for name, _ in listed(later)} == CHANGES[case.method]


@every
def test_the_same_seed_gives_the_same_bits(case, small_saes):
    """On another copy of the model, with nothing in the cache, whatever the global random state."""
    assert_same_edit(made(case.kind, case.method, case.arm), case.edit)


@every
def test_another_seed_gives_another_edit_where_chance_has_a_part(case, small_saes):
    other = made(case.kind, case.method, case.arm, seed=43)
    assert (other.identity != case.edit.identity) == (case.method in RANDOM)
    assert other.provenance != case.edit.provenance


@every
def test_questions_and_paragraphs_have_no_part(case, small_saes):
    concept = replace(make_concept(), paragraphs=("Caesar.",), questions=(), other_sense=(), simdom="")
    assert made(case.kind, case.method, case.arm, concept=concept).identity == case.edit.identity


@after_ember
@pytest.mark.parametrize("order", [ARMS, ARMS[::-1]], ids=" then ".join)
def test_the_arms_do_not_mix_in_a_shared_cache(case, small_saes, order):
    """TRAPS 4; each arm twice, so that the second time meets what both have left."""
    found = {arm: made(case.kind, case.method, arm) for arm in order}
    assert_same_edit(found[case.arm], case.edit)
    for arm in order:
        assert_same_edit(made(case.kind, case.method, arm), found[arm])
    touched = (state_with(edit, make_loaded(case.kind)) for edit in found.values())
    assert CHANGES[case.method] & {name for name, _ in differing(*touched)}


# What all methods refuse, and failures


@pytest.mark.parametrize("method", WITH_SAES)
def test_autoencoders_are_not_trained_on_an_edited_model(tiny, small_saes, cache, method):
    first = first_edit(tiny, "after EMBER")
    with first.applied(tiny), pytest.raises(EmberError, match="trained on the unedited model"):
        METHODS[method].run(tiny, make_concept(), config_of(method))
    assert not (cache / "sae").exists() or not any((cache / "sae").iterdir())
    erase(tiny, make_concept(), method, config_of(method), first=first)
    entries = set((cache / "sae").iterdir())
    erase(make_loaded(tiny.spec.name.removeprefix("tiny-")), make_concept(), method, config_of(method))
    assert entries and set((cache / "sae").iterdir()) == entries


@pytest.mark.parametrize("method", METHODS)
def test_only_edits_of_embeddings_do_without_known_layers(tiny, small_saes, method):
    tiny.architecture = replace(tiny.architecture, layers="", mlp_up="", mlp_down="")
    before = facts(tiny)
    if EMBED in CHANGES[method]:
        assert listed(erase(tiny, make_concept(), method, config_of(method)))
    else:
        with pytest.raises(EmberError, match="only edits of embeddings are known for this architecture"):
            erase(tiny, make_concept(), method, config_of(method))
    assert facts(tiny) == before


@pytest.mark.parametrize("method", ["rmu", "crisp"])
def test_a_training_that_diverges_leaves_the_model_as_it_was(tiny, small_saes, method):
    before = facts(tiny)
    with pytest.raises(EmberError, match=r"diverged at step [1-9].*lower the learning rate"):
        erase(tiny, make_concept(), method, config_of(method, lr=1e30, steps=5))
    assert facts(tiny) == before


@pytest.mark.parametrize(
    ("method", "changes"),
    [("rmu", {"layer": 2}), ("crisp", {"layers": (1, 2)}), ("pisces", {"layers": (2,)})],
)
def test_layers_that_the_model_lacks_are_refused(tiny, small_saes, method, changes):
    with pytest.raises(ValueError, match=r"must be 0\.\.1, got"):
        erase(tiny, make_concept(), method, config_of(method, **changes))


@pytest.mark.parametrize("method", ["snmf", *WITH_SAES])
def test_no_feature_of_the_concept_is_an_error(tiny, small_saes, method):
    strict = {"min_keyness": 99} if method == "snmf" else {"min_ratio": 1e9}
    with pytest.raises(EmberError, match=r"no S.* feature is much more active on 'Tiny Rome'"):
        erase(tiny, replace(make_concept(), sentences=NEUTRAL), method, config_of(method, **strict))


BAD = [
    ("ember", {"side": "left"}, "side must be one of input, output, both, got 'left'"),
    ("ember", {"rank": 0}, "rank must be at least 1, got 0"),
    ("snmf", {"band": "first"}, "band must be one of early, middle, late, got 'first'"),
    *(("snmf", {name: 0}, f"{name} must be at least 1") for name in ("features", "rank", "tokens", "max_iter")),
    *(("snmf", {name: value}, f"{name} must be in") for name in ("sparsity", "mass") for value in (0, 1.1)),
    *(("rmu", {name: 0}, f"{name} must be at least 1, got 0") for name in ("n_trained", "steps", "batch_size")),
    *(("rmu", {name: -1.0}, f"{name} must be at least 0") for name in ("steering", "retain_weight", "lr")),
    ("rmu", {"lr": float("nan")}, "lr must be at least 0, got nan"),
    ("rmu", {"layer": 1, "n_trained": 3}, "layer must be at least n_trained - 1 = 2, got 1"),
    *(("crisp", {name: 0}, f"{name} must be at least 1") for name in ("features", "lora_rank", "steps", "batch_size")),
    *(("crisp", {"beta": value}, "beta must be in") for value in (-0.1, 1.1)),
    ("crisp", {"layers": ()}, "layers must name at least one"),
    ("crisp", {"layers": (3,), "first_layer": 4}, "first_layer be at most the last"),
    ("pisces", {"layers": ()}, "layers must name at least one"),
    *(("pisces", {"tau": value}, "tau must be in") for value in (0, 1.1)),
    ("pisces", {"mu": -1}, "mu must be at least 0, got -1"),
    ("pisces", {"features": 0}, "features must be at least 1, got 0"),
]


@pytest.mark.parametrize(("method", "changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_configs_check_themselves(method, changes, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method].config(**changes)


@pytest.mark.parametrize("method", METHODS)
def test_configs_are_frozen_and_come_back_from_json(method):
    config = config_of(method)
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    if EMBED not in CHANGES[method]:  # those hold features as a tuple, which JSON does not know
        again = METHODS[method].config(**json.loads(json.dumps(dataclasses.asdict(config))))
        assert again == config and hash(again) == hash(config)


# Controls: the rows are EMBER's, the displacement is not


def test_mean_rows_are_the_mean_of_the_vocabulary(tiny):
    ember, control = (METHODS[m].run(tiny, make_concept(), config_of(m, delta=1.0)) for m in ("ember", "mean_rows"))
    assert control.tensors[EMBED].rows.tolist() == ember.tensors[EMBED].rows.tolist()
    mean = tiny.embedding.detach().double().mean(0).float()
    values = control.tensors[EMBED].values
    torch.testing.assert_close(values, mean.expand_as(values), atol=1e-6, rtol=1e-5)


def test_half_the_strength_goes_half_the_way_to_the_mean(tiny):
    half = METHODS["mean_rows"].run(tiny, make_concept(), config_of("mean_rows", delta=0.5)).tensors[EMBED]
    old = tiny.embedding.detach()[half.rows]
    torch.testing.assert_close(half.values, (old + tiny.embedding.detach().mean(0)) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_a_random_direction_goes_as_far_as_ember_and_elsewhere(tiny, delta):
    ember, aside, again = (
        METHODS[method].run(tiny, make_concept(), config_of(method, delta=delta), seed=1).tensors[EMBED]
        for method in ("ember", "random_direction", "random_direction")
    )
    assert aside.rows.tolist() == ember.rows.tolist()
    assert torch.equal(aside.values, again.values)
    moved, expected = (change.values - tiny.embedding.detach()[change.rows] for change in (aside, ember))
    torch.testing.assert_close(moved.norm(dim=1), expected.norm(dim=1), rtol=1e-3, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=1).abs().max() < 0.7


def control_rows(loaded: LoadedModel, method: str, **changes):
    """The rows that EMBER and a control edit [r], and the control's change of its rows [r, d_model]."""
    edits = [METHODS[m].run(loaded, make_concept(), config_of(m, **changes)).tensors[EMBED] for m in ("ember", method)]
    return edits[0].rows, edits[1].rows, edits[1].values - loaded.embedding.detach()[edits[1].rows]


def test_zeroed_rows_are_zero(tiny):
    rows, same, change = control_rows(tiny, "zero_rows", delta=1.0)
    assert same.tolist() == rows.tolist()
    assert torch.equal(change, -tiny.embedding.detach()[rows])


def test_random_rows_are_as_many_others_of_the_same_texts_moved_as_far(tiny):
    rows, others, change = control_rows(tiny, "random_rows", delta=2.0)
    assert len(others) == len(set(others.tolist())) == len(rows)
    assert not set(others.tolist()) & set(rows.tolist())
    seen = set(token_table(tiny, SENTENCES, NEUTRAL).token_id)
    assert set(others.tolist()) <= seen
    own = METHODS["ember"].run(tiny, make_concept(), config_of("ember", delta=2.0)).tensors[EMBED]
    expected = own.values - tiny.embedding.detach()[rows]
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


def test_matched_rows_become_the_mean_of_rows_of_the_same_frequency(tiny, monkeypatch):
    monkeypatch.setattr(controls, "MATCHED", 3)
    rows, same, change = control_rows(tiny, "matched_rows", delta=1.0)
    assert same.tolist() == rows.tolist()
    frequency = background_frequency(tiny)
    free = [i for i in sorted(frequency) if i not in set(rows.tolist()) | tiny.special_ids]
    E = tiny.embedding.detach()
    assert any(int(row) in frequency for row in rows)
    for row, moved in zip(rows.tolist(), change, strict=True):
        own = math.log(frequency.get(row, min(frequency[i] for i in free)))
        nearest = sorted(free, key=lambda i: (abs(math.log(frequency[i]) - own), i))[:3]
        torch.testing.assert_close(E[row] + moved, E[nearest].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["input", "output"])
def test_leace_keeps_its_promise_on_the_rows_it_was_fitted_on(tiny, side):
    """After LEACE on all of V' the edited rows have the mean of the others; before, they did not (the control)."""
    seen = []
    features = fit(tiny, make_concept(), config_of("leace"))
    edit_from_features(
        tiny, features, config_of("leace", side=side), displacement=lambda target: seen.append(target) or target.old
    )
    (target,) = seen
    ids = torch.tensor(features.table.token_id.tolist())
    edited = torch.isin(ids, target.rows)
    X = target.matrix[ids].double()
    after = controls.leace_eraser(target)(X)
    assert (X[edited].mean(0) - X[~edited].mean(0)).norm() > 0.1
    torch.testing.assert_close(after[edited].mean(0), after[~edited].mean(0), atol=1e-8, rtol=0)
    change = controls.concept_subspace(target, seed=0)
    torch.testing.assert_close(change.double(), X[edited] - after[edited], atol=1e-5, rtol=1e-4)


def test_frequent_tokens_are_spared_on_demand(tiny):
    config = config_of("ember")
    table = fit(tiny, make_concept(), config).table.set_index("token_id")
    rows = METHODS["ember"].run(tiny, make_concept(), config).tensors[EMBED].rows.tolist()
    bound = float(table.zipf[rows].dropna().median())
    spared = METHODS["ember"].run(tiny, make_concept(), replace(config, max_zipf=bound)).tensors[EMBED]
    assert spared.rows.tolist() == [i for i in rows if not table.zipf[i] > bound]
    assert 0 < len(spared.rows) < len(rows)
    with pytest.raises(EmberError, match="no concept-only token of zipf ≤ -99; nothing to edit"):
        METHODS["ember"].run(make_loaded(), only_words(make_concept()), replace(config, max_zipf=-99.0))


def only_words(concept):
    """The concept without punctuation: every token has a frequency."""
    return replace(concept, sentences=tuple(re.sub("[.,]", "", s) for s in concept.sentences))
