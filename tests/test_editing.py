"""Edits are applied exactly, undone to the bit, refused elsewhere, composed and saved."""

import itertools
import json
import os
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers.edits import (
    EMBED,
    FILES,
    HEAD,
    NORM,
    SETTINGS,
    UP,
    assert_same_edit,
    differing,
    later_edit,
    listed,
    noise_edit,
    provenance_of,
    snapshot,
    state_with,
)  # fmt: skip
from helpers.tiny import SENTENCES, make_concept, make_loaded, make_model, save
from safetensors.torch import load_file, save_file

import ember.editing
from ember.editing import Edit
from ember.errors import DamagedFileError, EmberError, WrongWeightsError
from ember.evaluation.evaluate import question_scores, text_scores
from ember.features import ConceptFeatures, concept_features
from ember.methods.ember import EmberConfig, fit, run
from ember.models.loading import load_model, untie, weights_hash
from ember.models.weights import parameter_hashes
from ember.store.files import sha256_of

EVERYWHERE = {EMBED: [5, 300, 6], HEAD: [5, 0], UP: [2], NORM: [31]}


@pytest.mark.parametrize(("side", "names"), [("input", [EMBED]), ("output", [HEAD]), ("both", [EMBED, HEAD])], ids=str)
def test_an_edit_keeps_to_its_side_and_its_rows(tiny, cache, side, names):
    """One of strength 0 changes nothing, to the bit."""
    edit, none = (run(tiny, make_concept(), EmberConfig(**SETTINGS, side=side, delta=delta)) for delta in (1.0, 0.0))
    assert weights_hash(tiny.model) == tiny.weights_hash  # making it leaves the model as it is
    found = differing(snapshot(tiny), state_with(edit, tiny))
    assert {name for name, _ in found} == set(names)
    assert found == listed(edit) == listed(none)
    assert edit.provenance.side == side
    with none.applied(tiny):
        assert weights_hash(tiny.model) == tiny.weights_hash


def test_changed_lists_exactly_the_rows_that_differ(tiny):
    """No rows mean all rows; the edit does not follow what it was made from."""
    rows = {EMBED: [300, 5, 7], HEAD: [1], UP: [0, 63], NORM: [3]}
    edit = noise_edit(tiny, rows)
    assert listed(edit) == {(name, row) for name, chosen in rows.items() for row in chosen}
    assert differing(snapshot(tiny), state_with(edit, tiny)) == listed(edit)
    assert len(edit.changed()) == len(listed(edit))
    new = torch.zeros(tiny.embedding.shape)
    edit = Edit.from_values(tiny, {EMBED: (None, new)}, provenance_of(tiny))
    assert listed(edit) == {(EMBED, row) for row in range(512)}
    assert torch.equal(state_with(edit, tiny)[EMBED], new)
    rows, values = torch.tensor([5, 6]), torch.zeros(2, 32)
    edit = Edit.from_values(tiny, {EMBED: (rows, values)}, provenance_of(tiny))
    rows += 1
    values += 1
    assert edit.tensors[EMBED].rows.tolist() == [5, 6] and (edit.tensors[EMBED].values == 0).all()


@pytest.mark.parametrize("delta", [1.0, 2.5])
def test_the_scaled_embedding_moves_by_the_contribution(tiny, cache, delta):
    """Also for Gemma, whose forward pass multiplies its embeddings."""
    config = EmberConfig(**SETTINGS, delta=delta)
    contributions = fit(tiny, make_concept(), config).contributions(config.features)
    ids = torch.tensor([sorted(contributions)])

    def first_layer() -> torch.Tensor:
        with torch.inference_mode():
            return tiny.model(ids, output_hidden_states=True).hidden_states[0][0]

    before = first_layer()
    with run(tiny, make_concept(), config).applied(tiny):
        moved = before - first_layer()
    expected = delta * torch.stack([contributions[int(i)] for i in ids[0]])
    assert expected.norm(dim=1).min() > 1e-3
    torch.testing.assert_close(moved, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_applied_is_undone_to_the_bit_and_nested_edits_one_by_one(kind, dtype):
    """Zeros keep their sign."""
    loaded = make_loaded(kind, dtype=dtype)
    with torch.no_grad():
        loaded.embedding[5] = -0.0
    loaded.parameter_hashes = parameter_hashes(loaded.model)
    base, first = loaded.weights_hash, noise_edit(loaded, EVERYWHERE)
    later = later_edit(loaded, first, {EMBED: [6, 7], UP: [2]})
    with first.applied(loaded):
        middle = weights_hash(loaded.model)
        assert middle == loaded.weights_hash != base
        with later.applied(loaded):
            assert weights_hash(loaded.model) == loaded.weights_hash not in (middle, base)
        assert weights_hash(loaded.model) == middle
    assert weights_hash(loaded.model) == loaded.weights_hash == base


def test_applied_is_undone_after_an_exception_and_where_it_fails_halfway(tiny, monkeypatch):
    edit, write = noise_edit(tiny, EVERYWHERE), ember.editing.write
    for failure in (ValueError("x"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(failure)), edit.applied(tiny):
            raise failure
        assert weights_hash(tiny.model) == tiny.weights_hash

    def fail_once(*arguments) -> None:
        if next(failing):
            raise MemoryError
        write(*arguments)

    monkeypatch.setattr(ember.editing, "write", fail_once)
    for call in range(len(EVERYWHERE)):
        failing = itertools.chain([False] * call, [True], itertools.repeat(False))
        with pytest.raises(MemoryError), edit.applied(tiny):
            pytest.fail("the edit was applied in part")
        assert weights_hash(tiny.model) == tiny.weights_hash


def test_the_order_of_edits_never_changes_the_base_scores(tiny):
    rows = (tiny.encode(text, bos=False) for text in (" Romans", " Rome"))
    edits = [noise_edit(tiny, {EMBED: chosen}, seed=k) for k, chosen in enumerate(rows)]

    def scores(edit: Edit | None = None) -> pd.DataFrame:
        parts = question_scores(tiny, make_concept().questions[:4], edit), text_scores(tiny, SENTENCES, edit)
        return pd.concat(parts, ignore_index=True)

    base, alone = scores(), [scores(edit) for edit in edits]
    for k in (0, 0, 1, 0):
        assert not alone[k].equals(base)
        pd.testing.assert_frame_equal(scores(edits[k]), alone[k], check_exact=True)
        pd.testing.assert_frame_equal(scores(), base, check_exact=True)


def test_features_fitted_under_an_edit_are_not_kept_as_the_bases(tiny, cache):
    """An edit that is to follow another is made with that one applied (see ``Edit.then``)."""

    def fresh() -> ConceptFeatures:
        settings = {k: v for k, v in SETTINGS.items() if k != "features"}
        return concept_features(tiny, make_concept(), cache=False, **settings)

    config, base = EmberConfig(**SETTINGS), fresh()
    with noise_edit(tiny, {EMBED: sorted(base.contributions((0, 1)))}).applied(tiny):
        under = fit(tiny, make_concept(), config).factorization.F
        assert torch.equal(under, fresh().factorization.F)
    assert torch.equal(fit(tiny, make_concept(), config).factorization.F, base.factorization.F)
    assert not torch.equal(base.factorization.F, under)


@pytest.mark.parametrize("as_module", [True, False])
def test_apply_keeps_the_edit_once_and_tells_the_model(as_module, tiny):
    """Caches, features and later edits are keyed by the hash, which a bare module does not have."""
    before, edit = snapshot(tiny), noise_edit(tiny, EVERYWHERE)
    expected = state_with(edit, tiny)
    edit.apply(tiny.model if as_module else tiny)
    assert not differing(expected, snapshot(tiny))
    assert differing(before, snapshot(tiny)) == listed(edit)
    kept = weights_hash(tiny.model)
    assert as_module or tiny.weights_hash == kept
    for model in (tiny.model, tiny.model if as_module else tiny):
        with pytest.raises(WrongWeightsError):
            edit.apply(model)
    assert weights_hash(tiny.model) == kept


def assert_refused(edit: Edit, model, said: str | None = None, kind: type[EmberError] = WrongWeightsError) -> None:
    """Neither way of using the edit takes the model, a loaded one or a module, or changes it."""
    module = model if isinstance(model, torch.nn.Module) else model.model
    before = weights_hash(module)
    for given in (model, module):
        with pytest.raises(kind, match=said):
            edit.apply(given)
        with pytest.raises(kind, match=said), edit.applied(given):
            pytest.fail("the edit was applied")
    assert weights_hash(module) == before


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_other_weights_are_refused_also_where_one_bit_of_an_edited_row_differs(kind):
    loaded = make_loaded(kind)
    edit = noise_edit(loaded, {HEAD: [1], EMBED: [300, 5]})
    assert_refused(edit, make_loaded(kind, seed=1), f"noise edit was made for tiny-{kind}")
    assert_refused(edit, make_loaded(kind, dtype=torch.bfloat16))
    missing = Edit({"model.wte.weight": edit.tensors[EMBED]}, edit.provenance)
    assert_refused(missing, loaded, r"model\.wte\.weight")
    with torch.no_grad():
        loaded.embedding.view(torch.int32)[5, -1] ^= 1
    assert_refused(edit, loaded.model, re.escape(EMBED))
    for name in (UP, NORM, HEAD, EMBED):  # to keep an edit, the model must be the same everywhere
        other = make_loaded(kind)
        with torch.no_grad():
            other.model.get_parameter(name)[9] += 1
        before = weights_hash(other.model)
        for model in (other, other.model):
            with pytest.raises(WrongWeightsError, match=before[:12]):
                edit.apply(model)
        assert weights_hash(other.model) == before


@pytest.mark.parametrize("name", [EMBED, HEAD])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_tied_model_is_refused(kind, name):
    edit, tied = noise_edit(make_loaded(kind), {name: [5]}), make_model(kind, tied=True)
    assert_refused(edit, tied, r"share storage; untie them .*ember\.models\.loading\.untie", EmberError)
    untie(tied)
    with edit.applied(tied):
        pass
    edit.apply(tied)


def test_bad_rows_and_values_of_another_shape_are_refused(tiny):
    def made(rows, shape):
        return Edit.from_values(tiny, {EMBED: (torch.tensor(rows), torch.zeros(shape))}, provenance_of(tiny))

    for rows in ([5, 5], [-1, 511], [-513], [512], [5.0, 6.0], [True, False]):
        with pytest.raises((ValueError, IndexError)):
            made(rows, (len(rows), 32))
    for shape in ((1, 32), (2, 31), (2, 1), (32,), (2,), (2, 32, 1)):
        with pytest.raises(ValueError, match=rf"{re.escape(EMBED)}.*shape \({shape[0]},.*rows \(2, 32\)"):
            made([5, 6], shape)


@pytest.mark.parametrize(("earlier", "rows"), [
    ({EMBED: [5, 300, 6]}, {EMBED: [7, 6, 5]}), ({EMBED: [5, 6]}, {EMBED: [6, 5]}), ({EMBED: [5]}, {EMBED: [6]}),
    ({EMBED: [5]}, {HEAD: [5], NORM: [0]}), (EVERYWHERE, {EMBED: [6, 1], UP: [2, 3], NORM: [0]}),
], ids=["overlapping rows", "the same rows", "other rows", "other parameters", "several parameters"])  # fmt: skip
def test_then_equals_one_after_the_other(tiny, earlier, rows, tmp_path):
    first = noise_edit(tiny, earlier)
    later = later_edit(tiny, first, rows)
    with first.applied(tiny):
        expected = state_with(later, tiny)
    before, both = state_with(first, tiny), first.then(later)
    assert not differing(before, state_with(first, tiny))  # itself unchanged
    assert not differing(expected, state_with(both, tiny))
    assert listed(both) == listed(first) | listed(later)
    again = Edit.load(both.save(tmp_path / "edit"))
    assert_same_edit(again, both)
    assert not differing(expected, state_with(again, tiny))
    both.apply(tiny)
    assert not differing(expected, snapshot(tiny))


def test_three_edits_in_a_row_and_one_that_does_not_follow(tiny):
    """Of two edits of the same row of the base, one after the other is refused, so is their composition."""
    first = noise_edit(tiny, {EMBED: [5, 6]})
    second = later_edit(tiny, first, {EMBED: [6, 7]})
    assert first.then(second).provenance.side == "input"
    third = later_edit(tiny, first.then(second), {EMBED: [5, 7, 8]}, side="output")
    one, other = first.then(second).then(third), first.then(second.then(third))
    assert one.provenance.side == other.provenance.side == "both"
    assert not differing(state_with(one, tiny), state_with(other, tiny))
    assert listed(one) == {(EMBED, row) for row in (5, 6, 7, 8)}
    other = noise_edit(tiny, {EMBED: [6, 7]}, seed=1)
    with first.applied(tiny):
        assert_refused(other, tiny)
    with pytest.raises(WrongWeightsError):
        first.then(other)


def test_the_steps_of_a_composition_are_those_of_its_edits_in_order(tiny):
    """Also of three, and where one, like RMU and CRISP, has a setting called steps; an edit is its own only step."""
    for config in ({"scale": 0.5}, {}, {"steps": 30}):
        alone = noise_edit(tiny, {EMBED: [5]}, config=config)
        assert alone.steps == [{"method": "noise", "config": config, "seed": 7, "concept": "Tiny Rome"}]
    first = noise_edit(tiny, {EMBED: [5]}, config={"mark": 1})
    second = later_edit(tiny, first, {EMBED: [6]}, method="rmu", config={"steps": 30}, concept="Gaul")
    two = first.then(second)
    third = later_edit(tiny, two, {HEAD: [6]}, config={"mark": 3})  # of the first one's method
    assert two.then(third).steps == [
        {"method": "noise", "config": {"mark": 1}, "seed": 7, "concept": "Tiny Rome"},
        {"method": "rmu", "config": {"steps": 30}, "seed": 7, "concept": "Gaul"},
        {"method": "noise", "config": {"mark": 3}, "seed": 7, "concept": "Tiny Rome"},
    ]


def test_identity_is_stable_and_tells_edits_apart(tiny, tmp_path):
    """Stable across objects, files, the order of the tensors, and whatever the record says of where it comes from."""
    rows = {EMBED: [5, 6], HEAD: [7], UP: [0]}
    edit = noise_edit(tiny, rows)
    record = replace(edit.provenance, method="other", config={"x": 1}, concept="", versions={})
    again = Edit.load(edit.save(tmp_path / "edit"))
    same = [noise_edit(tiny, rows), Edit(dict(reversed(edit.tensors.items())), edit.provenance), again]
    with edit.applied(tiny):
        applied = edit.identity
    assert {other.identity for other in (*same, Edit(edit.tensors, record))} == {edit.identity} == {applied}
    edit = noise_edit(tiny, {EMBED: [5, 6]})
    change = edit.tensors[EMBED]
    one_bit = change.values.clone()
    one_bit.view(torch.int32)[1, 3] ^= 1
    later = later_edit(tiny, edit, {EMBED: [6]})
    assert edit.then(later).identity == edit.then(later_edit(tiny, edit, {EMBED: [6]})).identity
    others = [
        later, edit.then(later), Edit({EMBED: replace(change, values=one_bit)}, edit.provenance),
        Edit({EMBED: replace(change, rows=torch.tensor([5, 7]))}, edit.provenance),
        Edit({HEAD: change}, edit.provenance),
        Edit({EMBED: change, HEAD: change}, edit.provenance), Edit({}, edit.provenance),
        Edit(edit.tensors, replace(edit.provenance, base_hash="0" * 64)), noise_edit(tiny, {EMBED: [5, 6]}, seed=1),
        noise_edit(tiny, {EMBED: [5, 6, 7]}),
    ]  # fmt: skip
    assert len({edit.identity, *(other.identity for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_edit_comes_back_to_the_bit_and_meets_the_reloaded_model(dtype, tmp_path):
    """As the model card says."""
    loaded = make_loaded(dtype=dtype)
    edit = noise_edit(loaded, EVERYWHERE)
    again = Edit.load(edit.save(tmp_path / "deep" / "edit"))
    assert_same_edit(again, edit)
    assert again.tensors[EMBED].values.dtype == dtype
    assert not differing(state_with(edit, loaded), state_with(again, loaded))
    folder = save(tmp_path / "model", make_model("gemma2", tied=True))
    noise_edit(load_model(folder), {EMBED: [5]}).save(tmp_path / "edit")
    loaded = load_model(folder)
    before = snapshot(loaded)
    Edit.load(tmp_path / "edit").apply(loaded)
    assert differing(before, snapshot(loaded)) == {(EMBED, 5)}


def test_the_files_are_json_safetensors_and_a_card(tiny, tmp_path):
    folder, other = (noise_edit(tiny, EVERYWHERE).save(tmp_path / name) for name in "ab")
    assert sorted(os.listdir(folder)) == FILES
    assert [(folder / name).read_bytes() for name in FILES] == [(other / name).read_bytes() for name in FILES]
    assert json.loads((folder / "edit.json").read_text())["provenance"]["base_hash"] == tiny.weights_hash
    assert len(load_file(folder / "edit.safetensors")) == 3 * len(EVERYWHERE)
    card = (folder / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {tiny.name}\n")
    for part in (tiny.weights_hash, "Tiny Rome", "seed 7", f"`{EMBED}`: 3 rows", f"`{NORM}`: 1 rows"):
        assert part in card


def test_saving_replaces_an_older_edit_or_leaves_it(tiny, tmp_path, monkeypatch):
    """A model card that a user went on writing stays (for other files see ``test_files``)."""
    folder, newer = tmp_path / "edit", noise_edit(tiny, {HEAD: [6]}, seed=1)
    for edit in (noise_edit(tiny, {EMBED: [5]}), newer):
        edit.save(folder)
    assert_same_edit(Edit.load(folder), newer)
    with monkeypatch.context() as patch:
        patch.setattr(ember.editing, "save_file", lambda *_: pytest.fail("the disk is full"))
        for name in ("edit", "new"):
            with pytest.raises(pytest.fail.Exception, match="the disk is full"):
                noise_edit(tiny, {EMBED: [6]}).save(tmp_path / name)
    assert os.listdir(tmp_path) == ["edit"]
    assert_same_edit(Edit.load(folder), newer)
    (folder / "README.md").write_text("mine")
    with pytest.raises(EmberError, match=rf"{folder} holds other files, or changed ones \(README.md\)"):
        noise_edit(tiny, {EMBED: [6]}).save(folder)
    assert (folder / "README.md").read_text() == "mine" and sorted(os.listdir(folder)) == FILES


def test_a_damaged_edit_is_named(tmp_path):
    """Its folder is one of ``sealed_dir``; for damaged files see ``test_files``."""
    folder = noise_edit(make_loaded(), {EMBED: [5], HEAD: [6]}).save(tmp_path / "the-edit")
    record, tensors = folder / "edit.json", folder / "edit.safetensors"
    about, arrays = json.loads(record.read_text()), load_file(tensors)
    provenance = about["provenance"]

    def assert_named() -> None:
        with pytest.raises(DamagedFileError, match=re.escape(str(folder))):
            Edit.load(folder)

    record.unlink()
    assert_named()
    for broken in (
        about | {"format": 1}, {k: v for k, v in about.items() if k != "format"}, about | {"provenance": None},
        about | {"provenance": {k: v for k, v in provenance.items() if k != "base_hash"}},
        about | {"provenance": provenance | {"mood": "good"}},
    ):  # fmt: skip
        record.write_text(json.dumps(broken))
        assert_named()
    record.write_text(json.dumps(about))
    assert Edit.load(folder).tensors.keys() == {EMBED, HEAD}
    del arrays[f"{EMBED}::before"]
    save_file(arrays, tensors)
    record.write_text(json.dumps(about | {"sha256": about["sha256"] | {tensors.name: sha256_of(tensors)}}))
    assert_named()
    tensors.unlink()
    assert_named()
