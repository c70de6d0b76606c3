"""Scores, selection and contributions of features, their files, and the cache of fits."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny import NEUTRAL, SENTENCES, make_loaded

from ember import features as module
from ember.data.ours import load_concept
from ember.errors import DamagedFileError, EmberError
from ember.factorization import Factorization
from ember.features import ConceptFeatures, concept_features, score_features
from ember.models.loading import weights_hash

TABLE = pd.DataFrame(
    [
        (10, " Rome", "concept", 3.0, True, False), (11, " army", "concept", 1.5, False, True),
        (12, " Roman", "concept", 2.0, True, False), (13, " the", "shared", 4.0, True, False),
        (14, " train", "neutral", -2.0, False, True), (15, ",", "neutral", 0.0, False, False),
    ],
    columns=["token_id", "token", "role", "keyness", "key", "ordinary"],
)  # fmt: skip
G = torch.tensor(
    [
        [0.0, 2.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, -3.0, 4.0, 0.0],
        [0.0, -1.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 1.0, 0.0, 0.0],
        [-5.0, 0.0, 2.0, 1.0, 0.0],
        [0.0, 0.0, 2.0, 0.0, 0.0],
    ]
)
F = torch.arange(20.0).reshape(4, 5) - 7
SMALL = {"rank": 6, "sparsity": 0.05, "ridge": 1e-4, "max_iter": 15, "patience": 10, "tol": 1e-4, "seed": 1}


def hand_made(table: pd.DataFrame = TABLE) -> ConceptFeatures:
    factorization = Factorization(F, G, (3.0, 0.1 + 0.2), True)
    settings = {"rank": 5, "ridge": 1e-4, "spec": {"name": "tiny"}}
    return ConceptFeatures("Tiny Rome", "tiny", "abc", table, factorization, score_features(table, G), settings)


def assert_same(one: ConceptFeatures, other: ConceptFeatures) -> None:
    """Equal to the bit, NaN included."""
    for name in ("concept", "model", "weights_hash", "settings"):
        assert getattr(one, name) == getattr(other, name)
    assert torch.equal(one.factorization.F, other.factorization.F)
    assert torch.equal(one.factorization.G, other.factorization.G)
    assert one.factorization.loss_curve == other.factorization.loss_curve
    assert one.factorization.converged == other.factorization.converged
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    pd.testing.assert_frame_equal(one.scores, other.scores, check_exact=True)


@pytest.fixture
def fits(monkeypatch) -> list[dict]:
    """The settings of every factorization that is really made."""
    made = []

    def counted(X, **settings):
        made.append(settings)
        return fit(X, **settings)

    fit = module.sparse_mf
    monkeypatch.setattr(module, "sparse_mf", counted)
    return made


@pytest.mark.parametrize(("column", "values"), [
    ("score", [0, (2 * 3 + 1 * 2) / 4, 0, 0, 0]), ("key_share", [0, 3 / 4, 0, 0, 0]),
    ("concept_share", [0, 3 / 4, 3 / 8, 4 / 5, 0]), ("ordinary_share", [0, 0, 1, 1, 0]),
    ("ratio_abs", [0, math.nan, (3 / 3) / (4 / 2), (4 / 3) / (1 / 2), math.nan]), ("rows", [0, 2, 1, 1, 0]),
    ("top_tokens", ["train-", "Rome Roman the*", "army train- ,- the*", "army train-", ""]),
])  # fmt: skip
def test_scores_by_hand(column, values):
    """Feature 1 is the concept's; 0 neutral, 2 mixed, 3 an ordinary word of the concept text, 4 dead."""
    found = score_features(TABLE, G).set_index("feature")[column].sort_index().tolist()
    assert found == (values if column == "top_tokens" else pytest.approx(values, nan_ok=True))


def test_the_best_feature_comes_first():
    scores = score_features(TABLE, G, top=2)
    assert scores.feature[0] == 1
    assert scores.score.is_monotonic_decreasing and sorted(scores.feature) == [0, 1, 2, 3, 4]
    assert scores.set_index("feature").top_tokens[2] == "army train-"  # two are shown


def test_mass_outside_key_concept_tokens_dilutes_the_score():
    """On a shared key word as much as on a neutral one."""
    mixed = torch.zeros(6, 3)
    mixed[0] = 1
    mixed[3, 1] = mixed[4, 2] = 1
    scores = score_features(TABLE, mixed).set_index("feature").score
    assert (scores[0], scores[1], scores[2]) == (3.0, 1.5, 1.5)


@pytest.mark.parametrize("scale", [-1.0, 1e-3, -1e4, torch.tensor([2.0, -0.5, -1e3, 1e-2, 7.0])], ids=str)
def test_scores_ignore_scale_and_sign_of_activations(scale):
    pd.testing.assert_frame_equal(score_features(TABLE, G * scale), score_features(TABLE, G), check_exact=False)


def test_top_tokens_shows_each_form_once():
    table = TABLE.assign(token=["Rome", " army", " Rome", " the", " Rome", ","])
    scores = score_features(table, torch.tensor([[3.0, 1, 2, 0, 1, 0]]).T)
    assert scores.top_tokens[0] == "Rome army Rome-"


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, [1]), ({"threshold": 2.0}, [1]), ({"rule": "paper"}, [3]), ({"rule": "paper", "threshold": 0.4}, [3, 2]),
    ({"features": [2, 0]}, [2, 0]), ({"features": [2], "rule": "paper", "threshold": 99.0}, [2]),
], ids=str)  # fmt: skip
def test_select(arguments, expected):
    """Feature 1 has no ratio_abs, feature 3 no score."""
    assert hand_made().select(**arguments) == expected


@pytest.mark.parametrize(("arguments", "said"), [
    ({"features": [5]}, r"0\.\.4, got \[5\]"), ({"features": [1, -1]}, r"0\.\.4, got \[1, -1\]"),
    ({"features": []}, r"0\.\.4, got \[\]"), ({"rule": "judge"}, "'judge'; known: keyness, paper"),
    ({"threshold": 99}, r"Tiny Rome.* ≥ 99.*1 \(2\.00: Rome Roman the\*\)"),
    ({"rule": "paper", "threshold": 99}, r"Tiny Rome.* ≥ 99.*3 \(2\.67: army train-\)"),
], ids=str)  # fmt: skip
def test_select_refuses_what_is_unknown_and_names_the_best_where_nothing_is_selected(arguments, said):
    with pytest.raises(EmberError, match=said):
        hand_made().select(**arguments)


@pytest.mark.parametrize("selected", [[1], [2, 3], [0, 1, 2, 3, 4], [3, 1], [0, 4]])
def test_contributions_row_by_row(selected):
    expected = {}
    for i, row in TABLE.iterrows():
        if row.role == "concept" and any(G[i, k] != 0 for k in selected):
            expected[row.token_id] = sum(G[i, k] * F[:, k] for k in selected)
    found = hand_made().contributions(selected)
    assert found.keys() == expected.keys() and bool(expected) == (selected != [0, 4])
    for i, vector in expected.items():
        torch.testing.assert_close(found[i], vector)


def test_round_trip_to_the_bit(tmp_path, tiny, tiny_concept):
    features = hand_made(TABLE.assign(zipf=[0.1 + 0.2, math.nan, 1 / 3, 7.8, 1e-300, -0.0]))
    assert features.scores.ratio_abs.isna().any()
    for kept in (features, concept_features(tiny, tiny_concept, cache=False, **SMALL)):
        assert_same(ConceptFeatures.load(kept.save(tmp_path / kept.weights_hash)), kept)


@pytest.mark.parametrize("name", ["notes.txt", "features.safetensors"])
def test_what_a_user_keeps_with_features_stays(tmp_path, name):
    """A file of his, or one of ours that is no longer what was written."""
    folder = hand_made().save(tmp_path / "a")
    (folder / name).write_text("mine")
    with pytest.raises(EmberError, match=rf"{folder} holds other files, or changed ones \({name}\)"):
        hand_made().save(folder)
    assert (folder / name).read_text() == "mine"


def test_settings_of_numpy_can_be_saved_and_features_replaced(tmp_path):
    for rank in (np.int64(4), np.int64(5)):
        replace(hand_made(), settings={"rank": rank, "ridge": np.float64(0.1)}).save(tmp_path / "a")
    assert ConceptFeatures.load(tmp_path / "a").settings == {"rank": 5, "ridge": 0.1}


@pytest.mark.parametrize("file", ["features.json", "features.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "flipped"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, file, damage):
    path = hand_made().save(tmp_path / "a") / file
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "missing":
        path.unlink()
    else:
        flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
        path.write_bytes({"empty": b"", "half": whole[:middle], "flipped": flipped}[damage])
    with pytest.raises(DamagedFileError) as error:
        ConceptFeatures.load(path.parent)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"sha256": "x"}'])
def test_json_of_another_form_is_a_damaged_file(tmp_path, content):
    folder = hand_made().save(tmp_path / "a")
    (folder / "features.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"features\."):
        ConceptFeatures.load(folder)
    with pytest.raises(DamagedFileError, match="nowhere"):
        ConceptFeatures.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_second_call_reads_the_cache_unless_it_must_not(tiny, tiny_concept, cache, fits):
    concept_features(tiny, tiny_concept, cache=False, **SMALL)
    assert not cache.exists()
    first = concept_features(tiny, tiny_concept, **SMALL)
    assert_same(concept_features(tiny, tiny_concept, **SMALL), first)
    assert len(fits) == 2
    concept_features(tiny, tiny_concept, cache=False, **SMALL)
    assert len(fits) == 3


@pytest.mark.parametrize("change", [
    {"rank": 7}, {"sparsity": 0.0500001}, {"ridge": 1.0000001e-4}, {"max_iter": 16}, {"patience": 11},
    {"tol": 1.0000001e-4}, {"seed": 2},
], ids=str)  # fmt: skip
def test_the_key_depends_on_each_setting(tiny_concept, cache, fits, change):
    loaded = make_loaded()
    concept_features(loaded, tiny_concept, **SMALL)
    other = concept_features(loaded, tiny_concept, **SMALL | change)
    assert len(fits) == 2 and fits[1] == fits[0] | change
    assert change.items() <= other.settings.items()
    assert change.items() <= concept_features(loaded, tiny_concept, **SMALL | change).settings.items()
    assert len(fits) == 2


def test_the_key_depends_on_weights_and_texts_and_not_on_the_questions(tiny_concept, cache, fits):
    loaded = make_loaded()
    first = concept_features(loaded, tiny_concept, **SMALL)
    for change in ({"sentences": SENTENCES[:3]}, {"neutral": NEUTRAL[:3]}, {"sentences": SENTENCES[::-1]}):
        made = len(fits)
        concept_features(loaded, replace(tiny_concept, **change), **SMALL)
        assert len(fits) == made + 1
    concept_features(loaded, replace(tiny_concept, questions=(), paragraphs=()), **SMALL)
    assert len(fits) == 4
    other = concept_features(make_loaded(seed=1), tiny_concept, **SMALL)
    assert len(fits) == 5 and not torch.equal(first.factorization.F, other.factorization.F)


def test_a_damaged_cache_is_an_error(tiny_concept, cache):
    loaded = make_loaded()
    concept_features(loaded, tiny_concept, **SMALL)
    (path,) = cache.glob("features/*/features.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"features\.safetensors"):
        concept_features(loaded, tiny_concept, **SMALL)


def test_it_factorizes_the_scaled_embeddings(tiny, tiny_concept):
    """At full rank and without sparsity the product is what was factorized."""
    features = concept_features(tiny, tiny_concept, cache=False, **SMALL | {"rank": 32, "sparsity": 1.0})
    assert weights_hash(tiny.model) == tiny.weights_hash  # the model is left alone
    rows = tiny.embedding.detach()[features.table.token_id.tolist()]
    product = features.factorization.G @ features.factorization.F.T
    torch.testing.assert_close(product, rows * tiny.embedding_scale, rtol=1e-2, atol=1e-2)


@pytest.mark.embedded
def test_the_embedded_model_s_features_of_ancient_rome_stand_out(embedded):
    """The paper's ratio alone would pick others (SPEC section 9.3)."""
    features = concept_features(embedded, load_concept("Ancient Rome"))
    selected = features.select()
    scores = features.scores.set_index("feature")
    left = scores.drop(selected)
    assert scores.score[selected].max() > 1
    assert left.score.max() < 0.5 < scores.score[selected].min()
    edited = features.table.set_index("token_id").token[list(features.contributions(selected))]
    assert {" Rome", " Roman", " Caesar", " Tiber"} <= set(edited)
    assert left.ratio_abs.max() > 2


def test_cached_features_are_scored_afresh(tiny, tiny_concept, cache, monkeypatch):
    settings = {"rank": 4, "sparsity": 0.2, "max_iter": 20, "patience": 5}
    concept_features(tiny, tiny_concept, **settings)
    monkeypatch.setattr("ember.features.score_features", lambda table, G: "new scores")
    assert concept_features(tiny, tiny_concept, **settings).scores == "new scores"
