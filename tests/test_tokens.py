"""Roles, counts and keyness of the tokens of two lists of sentences, and the preview of an edit."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny import make_loaded
from wordfreq import word_frequency

from ember import tokens
from ember.models.loading import LoadedModel
from ember.tokens import KEY_G2, background_frequency, preview_rows, token_table


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_loaded()


def table_of(loaded: LoadedModel, *texts) -> pd.DataFrame:
    return token_table(loaded, *texts).set_index("token")


def set_background(monkeypatch, loaded: LoadedModel, **frequencies: float) -> None:
    """General English in which " word" has the frequency ``frequencies["word"]``."""
    background = {loaded.encode(f" {word}")[0]: frequency for word, frequency in frequencies.items()}
    monkeypatch.setattr(tokens, "background_frequency", lambda _: background)


def test_roles_and_counts_by_hand(loaded, tiny_concept):
    """Further sentences share tokens but add none."""
    plain = table_of(loaded, tiny_concept.sentences, tiny_concept.neutral)
    expected = {
        " Roman": ("concept", 3, 0), " Rome": ("concept", 3, 0), " Romans": ("concept", 2, 0),
        "Rome": ("concept", 1, 0), " the": ("shared", 5, 7), " ships": ("shared", 1, 1), ".": ("shared", 4, 4),
        " train": ("neutral", 0, 1), " was": ("neutral", 0, 2),
    }  # fmt: skip
    found = plain.loc[[*expected], ["role", "concept_count", "neutral_count"]]
    assert dict(zip(found.index, found.itertuples(index=False, name=None), strict=True)) == expected
    further = ["Rome is a town in Georgia, quite another place, with a zoo."]
    table = table_of(loaded, tiny_concept.sentences, tiny_concept.neutral, further)
    assert list(table.index) == list(plain.index)
    assert (plain.role["Rome"], table.role["Rome"], table.neutral_count["Rome"]) == ("concept", "shared", 1)
    assert table.role[" Roman"] == "concept"


def test_every_token_is_there_once_and_counted(loaded, tiny_concept):
    table = token_table(loaded, tiny_concept.sentences, tiny_concept.neutral)
    for column, sentences in (("concept_count", tiny_concept.sentences), ("neutral_count", tiny_concept.neutral)):
        ids = [i for sentence in sentences for i in loaded.encode(sentence)]
        assert table[column].tolist() == [ids.count(i) for i in table.token_id]
        assert set(ids) <= set(table.token_id)
    assert table.token_id.is_unique
    assert table.key.any() and table.ordinary.any() and not (table.key & table.ordinary).any()
    assert table.token.tolist() == [loaded.tokenizer.decode([i]) for i in table.token_id]


@pytest.mark.parametrize("bos", [False, True])
def test_special_tokens_are_left_out(bos):
    """Those the tokenizer adds, and those the text spells out."""
    loaded = make_loaded(bos=bos)
    special = ["<s> Rome</s>", "<pad> Roman"]
    assert {0, 1, 2} <= {i for text in special for i in loaded.encode(text, bos=False)}
    assert table_of(loaded, special, ["<s> train"]).index.tolist() == [" Roman", " Rome", " train"]


@pytest.mark.parametrize("bad", [[], [""], ["Rome stood.", " \n"]])
@pytest.mark.parametrize("name", ["concept", "neutral"])
def test_no_or_blank_sentences_are_an_error(loaded, name, bad):
    sentences = {"concept": ["Rome stood."], "neutral": ["The train."]} | {name: bad}
    with pytest.raises(ValueError, match=f"the {name} sentences"):
        token_table(loaded, **sentences)


@pytest.fixture
def keyness(loaded, monkeypatch) -> pd.DataFrame:
    """100 words: " the" as often as in general English, " train" a third as often, a rare " Rome" and " Caesar"."""
    set_background(monkeypatch, loaded, the=0.5, train=0.6, Rome=1e-6, Caesar=2e-5)
    sentences = [" the train the Rome the"] * 10 + [" the train the Rome"] * 10 + [" Caesar" + " long" * 9]
    return table_of(loaded, sentences, [" train"])


@pytest.mark.parametrize(
    ("token", "count", "expected", "key", "ordinary"),
    [
        (" the", 50, 50, False, True),  # as frequent as expected
        (" train", 20, 60, False, True),  # rarer: its log-likelihood ratio passes the threshold from the other side
        (" Rome", 20, 1e-4, True, False),  # rare and repeated
        (" Caesar", 1, 2e-3, False, True),  # seldom expected, but seen once
    ],
)
def test_keyness_by_hand(keyness, token, count, expected, key, ordinary):
    row = keyness.loc[token]
    assert (row.concept_count, row.expected) == (count, pytest.approx(expected))
    assert row.keyness == pytest.approx(math.log2((count + 0.5) / (expected + 0.5)), abs=1e-12)
    g2 = 2 * (count * math.log(count / expected) - (count - expected))
    assert (bool(row.key), bool(row.ordinary)) == (key, ordinary) and (g2 > KEY_G2) == (token in (" train", " Rome"))
    assert keyness.zipf[" Rome"] == pytest.approx(3)
    assert keyness.zipf[" long"] == pytest.approx(0), "an unlisted word has the floor frequency"


def test_key_begins_at_the_threshold_and_tokens_without_letters_are_never_key(loaded, monkeypatch):
    """10 words, frequency 1e-4: log-likelihood ratios 11.8 and 26.4."""
    for mark in (".", ",", "1", "!", "&"):
        row = table_of(loaded, [mark] * 50, ["The train."]).loc[mark]
        assert row.concept_count == 50
        assert row.keyness == 0 and math.isnan(row.zipf) and math.isnan(row.expected)
        assert not row.key and not row.ordinary
    set_background(monkeypatch, loaded, Rome=1e-4)
    for count, key in ((1, False), (2, True)):
        row = table_of(loaded, [" Rome" * count + " the" * (10 - count)], [" train"]).loc[" Rome"]
        assert row.expected == pytest.approx(1e-3)
        assert row.key == key


def test_background_is_an_upper_bound_that_adds_up_the_words_a_token_occurs_in(loaded, monkeypatch):
    for word in ("the", "was", "ships", "Roman"):
        (token,) = loaded.encode(f" {word}")
        found = background_frequency(loaded)[token]
        assert found >= 0.999 * word_frequency(word, "en", wordlist="small") > 0  # rounded
    listed = {"roman": 0.01, "romans": 0.02, "train": 0.04}
    monkeypatch.setattr("wordfreq.get_frequency_dict", lambda *_, **__: listed)
    monkeypatch.setattr(tokens, "_BACKGROUNDS", {})
    background = background_frequency(loaded)
    for word, frequency in ((" Roman", 0.01), (" Romans", 0.02), (" train", 0.04)):
        assert background[loaded.encode(word)[0]] == pytest.approx(frequency)
    piece = loaded.encode("Romans")[-1]
    forms = {word: (f" {word}", f" {word.capitalize()}", word.title()) for word in listed}
    counts = {word: sum(loaded.encode(form).count(piece) for form in forms[word]) for word in listed}
    assert background[piece] == pytest.approx(sum(listed[word] * counts[word] for word in listed))


def test_preview_begins_with_the_largest_change(tiny, tiny_concept):
    """The rows are the tokens' own, in the columns that a reader needs."""
    table = token_table(tiny, tiny_concept.sentences, tiny_concept.neutral)
    ids = [tiny.encode(f" {word}")[0] for word in ("Rome", "Romans", "train")]
    rows = preview_rows(tiny, table, {i: torch.full((32,), float(k)) for i, k in zip(ids, (2, -3, 1), strict=True)})
    columns = ["token_id", "token", "role", "norm", "change", "concept_count", "neutral_count", "zipf", "ordinary"]
    assert rows.columns.tolist() == columns and rows.index.tolist() == [0, 1, 2] and set(rows.token_id) == set(ids)
    assert rows.token.tolist() == [" Romans", " Rome", " train"]
    np.testing.assert_allclose(rows.change, math.sqrt(32) * np.array([3, 2, 1]), rtol=1e-6)
    assert rows.role.tolist() == ["concept", "concept", "neutral"]
    assert rows.concept_count.tolist() == [2, 3, 0]
    np.testing.assert_allclose(rows.norm, [float(tiny.embedding[i].detach().norm()) for i in rows.token_id], rtol=1e-6)
