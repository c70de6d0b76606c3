"""Scores, selection and contributions of features, their files, and the cache of fits."""

import math
import re
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
G = torch.tensor([
    [0.0, 2, 0, 0, 0], [0, 0, -3, 4, 0], [0, -1, 0, 0, 0], [0, 1, 1, 0, 0], [-5, 0, 2, 1, 0], [0, 0, 2, 0, 0],
])  # fmt: skip
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
    for name in ("F", "G"):
        assert torch.equal(getattr(one.factorization, name), getattr(other.factorization, name))
    for name in ("loss_curve", "converged"):
        assert getattr(one.factorization, name) == getattr(other.factorization, name)
    for name in ("table", "scores"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)


@pytest.fixture
def fits(monkeypatch) -> list[dict]:
    """The settings of every factorization that is really made."""
    made, fit = [], module.sparse_mf
    monkeypatch.setattr(module, "sparse_mf", lambda X, **settings: made.append(settings) or fit(X, **settings))
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


def test_the_best_feature_comes_first_and_top_tokens_show_each_form_once():
    scores = score_features(TABLE, G, top=2)
    assert scores.feature[0] == 1
    assert scores.score.is_monotonic_decreasing and sorted(scores.feature) == [0, 1, 2, 3, 4]
    assert scores.set_index("feature").top_tokens[2] == "army train-"  # two are shown
    table = TABLE.assign(token=["Rome", " army", " Rome", " the", " Rome", ","])
    assert score_features(table, torch.tensor([[3.0, 1, 2, 0, 1, 0]]).T).top_tokens[0] == "Rome army Rome-"


def test_mass_outside_key_concept_tokens_dilutes_the_score():
    """On a shared key word as much as on a neutral one."""
    mixed = torch.zeros(6, 3)
    mixed[0] = mixed[3, 1] = mixed[4, 2] = 1
    scores = score_features(TABLE, mixed).set_index("feature").score
    assert (scores[0], scores[1], scores[2]) == (3.0, 1.5, 1.5)


@pytest.mark.parametrize("scale", [-1.0, 1e-3, -1e4, torch.tensor([2.0, -0.5, -1e3, 1e-2, 7.0])], ids=str)
def test_scores_ignore_scale_and_sign_of_activations(scale):
    pd.testing.assert_frame_equal(score_features(TABLE, G * scale), score_features(TABLE, G), check_exact=False)


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, [1]), ({"threshold": 2.0}, [1]), ({"rule": "paper"}, [3]), ({"rule": "paper", "threshold": 0.4}, [3, 2]),
    ({"features": [2, 0]}, [2, 0]), ({"features": [2], "rule": "paper", "threshold": 99.0}, [2]),
    ({"features": [5]}, r"0\.\.4, got \[5\]"), ({"features": [1, -1]}, r"0\.\.4, got \[1, -1\]"),
    ({"features": []}, r"0\.\.4, got \[\]"), ({"rule": "judge"}, "'judge'; known: keyness, paper"),
    ({"threshold": 99}, r"Tiny Rome.* ≥ 99.*1 \(2\.00: Rome Roman the\*\)"),
    ({"rule": "paper", "threshold": 99}, r"Tiny Rome.* ≥ 99.*3 \(2\.67: army train-\)"),
], ids=str)  # fmt: skip
def test_select_takes_what_is_named_or_best_and_refuses_what_is_unknown(arguments, expected):
    """Feature 1 has no ratio_abs, feature 3 no score."""
    if isinstance(expected, list):
        assert hand_made().select(**arguments) == expected
    else:
        with pytest.raises(EmberError, match=expected):
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
    for rank in (np.int64(4), np.int64(5)):  # settings of NumPy; the second replace the first
        replace(hand_made(), settings={"rank": rank, "ridge": np.float64(0.1)}).save(tmp_path / "a")
    assert ConceptFeatures.load(tmp_path / "a").settings == {"rank": 5, "ridge": 0.1}


@pytest.mark.parametrize("content", [None, "", "mine", "[]", "null", "{}", '{"sha256": "x"}'])
@pytest.mark.parametrize("file", ["features.json", "features.safetensors"])
def test_a_damaged_file_is_an_error_that_names_it_and_is_never_replaced(tmp_path, file, content):
    """Its folder is one of ``sealed_dir``; see ``test_files``."""
    folder = hand_made().save(tmp_path / "a")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(DamagedFileError, match=re.escape(f"{folder}/features.")) as caught:
        ConceptFeatures.load(folder)
    assert str(folder / file) in str(caught.value) or content == "{}"
    with pytest.raises(DamagedFileError, match="nowhere"):
        ConceptFeatures.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    if content:
        with pytest.raises(EmberError, match=rf"{folder} holds other files, or changed ones \(.*{file}"):
            hand_made().save(folder)
        assert (folder / file).read_text() == content


def test_the_second_call_reads_the_cache_unless_it_must_not(tiny, tiny_concept, cache, fits, monkeypatch):
    """The scores are taken afresh; a damaged cache is an error."""
    concept_features(tiny, tiny_concept, cache=False, **SMALL)
    assert not cache.exists()
    first = concept_features(tiny, tiny_concept, **SMALL)
    assert_same(concept_features(tiny, tiny_concept, **SMALL), first)
    assert len(fits) == 2
    concept_features(tiny, tiny_concept, cache=False, **SMALL)
    assert len(fits) == 3
    monkeypatch.setattr(module, "score_features", lambda table, G: "new scores")
    assert concept_features(tiny, tiny_concept, **SMALL).scores == "new scores"
    (path,) = cache.glob("features/*/features.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"features\.safetensors"):
        concept_features(tiny, tiny_concept, **SMALL)


def test_the_key_depends_on_each_setting_weights_and_texts_and_not_on_the_questions(tiny_concept, cache, fits):
    loaded = make_loaded()
    first = concept_features(loaded, tiny_concept, **SMALL)
    for change in ({"rank": 7}, {"sparsity": 0.0500001}, {"ridge": 1.0000001e-4}, {"max_iter": 16}, {"patience": 11},
                   {"tol": 1.0000001e-4}, {"seed": 2}):  # fmt: skip
        made = len(fits)
        for _ in range(2):  # the second is read from the cache
            found = concept_features(loaded, tiny_concept, **SMALL | change)
            assert change.items() <= found.settings.items()
            assert len(fits) == made + 1 and fits[-1] == fits[0] | change
    for change in ({"sentences": SENTENCES[:3]}, {"neutral": NEUTRAL[:3]}, {"sentences": SENTENCES[::-1]}):
        made = len(fits)
        concept_features(loaded, replace(tiny_concept, **change), **SMALL)
        assert len(fits) == made + 1
    concept_features(loaded, replace(tiny_concept, questions=(), paragraphs=()), **SMALL)
    assert len(fits) == made + 1
    other = concept_features(make_loaded(seed=1), tiny_concept, **SMALL)
    assert len(fits) == made + 2 and not torch.equal(first.factorization.F, other.factorization.F)


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
