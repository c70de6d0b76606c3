"""Comparing wordings: stems, accepted answers in texts, similarity of questions, paraphrases."""

import numpy as np
import pytest
from helpers.wordings import DIFFERENT, DIFFERENT_PAIRS, PARAPHRASES, question

from ember.data.types import Question
from ember.data.wording import Texts, accepted, alike, content_stems, paraphrases, rarity, stems


def halves(pairs) -> tuple[list[Question], list[Question]]:
    return [question(p[0], p[1]) for p in pairs], [question(p[2], p[3]) for p in pairs]


# Stems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Romans built roads.", ["the", "roman", "built", "road"]),
        ("Rome's Caesar’s", ["rome", "caesar"]),
        ("walked WALKING walks", ["walk"] * 3),
        ("bold boldly", ["bold"] * 2),
        ("horse horses", ["hors"] * 2),
        ("sing is gas bed", ["sing", "is", "gas", "bed"]),  # what is short stays whole
        ("gods arts years", ["god", "art", "year"]),
        ("city cities, glass glasses", ["city"] * 2 + ["glass"] * 2),
        ("house houses tie ties", ["hous"] * 2 + ["tie"] * 2),
        ("virus basis moss", ["virus", "basis", "moss"]),  # no plurals
        ("co-op_x, 1,000", ["co", "op", "x", "1", "000"]),
        ("Ελλάδα 日本", ["ελλάδα", "日本"]),
        ("?! …", []),
        ("", []),
    ],
)
def test_stems(text, expected):
    assert stems(text) == expected


def test_content_stems_leave_out_what_every_question_has():
    asked = "What is the name of the river that flowed through Rome?"
    assert content_stems(asked) == {"river", "flow", "through", "rome"}
    assert content_stems("What is it called?") == content_stems("") == frozenset()
    assert content_stems("Rome, ROME and Roads") == content_stems("roads of rome")


# Accepted answers


@pytest.mark.parametrize("article", ["the ", "The ", "a ", "an ", "An "])
def test_accepted_drops_a_leading_article(article):
    assert accepted(question("?", f"{article}Tiber")) == [("tiber",)]


def test_accepted_has_every_form_once_in_order():
    forms = accepted(question("?", "the Tiber River", "Tiber", "tiber", "A tiber", "?"))
    assert forms == [("tiber", "river"), ("tiber",)]


@pytest.mark.parametrize("answer", ["Theodora", "Annals", "Athens"])
def test_accepted_keeps_words_that_only_begin_like_an_article(answer):
    assert accepted(question("?", answer)) == [tuple(stems(answer))]


# Answers in texts


@pytest.mark.parametrize(
    ("answer", "text", "holds"),
    [
        ("Rome", "All roads lead to ROME.", True),
        ("Rome", "Romeo waits.", False),
        ("art", "The party started with artists.", False),
        ("art", "The party started with arts and artists.", True),
        ("arts", "The party started with an art.", True),
        ("the Tiber", "Boats on a Tiber of mud.", True),
        ("a legion", "Ten legions marched.", True),
        ("legions", "One legion marched.", True),
        ("Caesar", "It was Caesar's.", True),
        ("Mark Antony", "Mark, Antony and Brutus.", True),
        ("Mark Antony", "Antony Mark", False),
        ("Mark Antony", "Mark or Antony", False),
        ("79 AD", "It fell in 79 AD.", True),
        ("79 AD", "It fell in 179 AD.", False),
        ("?", "What?", False),
    ],
)
def test_holding(answer, text, holds):
    assert Texts(["Nothing here.", text]).holding(question("?", answer)) == ([1] if holds else [])


def test_holding_looks_for_aliases_too():
    texts = Texts(["The Tiber rose.", "A river rose.", "The yellow river rose.", "the tiber"])
    assert texts.holding(question("?", "Tiber", "yellow river")) == [0, 2, 3]


ASKED = question("Which river flows through the city of Rome?", "the Tiber")


@pytest.mark.parametrize(
    ("text", "states"),
    [
        ("The Tiber flows through the middle of Rome.", True),
        ("Rome's river, the Tiber, flooded often.", True),
        ("The Tiber froze.", False),
        ("A river flows through the city of Rome.", False),
        ("Boats came up the Tiber to Rome with grain.", False),  # one word of five is not what was asked
    ],
)
def test_stating_needs_answer_and_fact(text, states):
    texts = Texts(["Bread was cheap.", text])
    weight = dict.fromkeys(content_stems(ASKED.question), 1.0) | {"through": 0.5, "city": 0.5}
    assert texts.stating(ASKED, weight) == ([1] if states else [])


def test_stating_counts_by_weight_but_needs_two_words():
    """Two of five words are enough where they are the rare ones; one never is, unless it is all that is asked."""
    texts = Texts(["The Tiber flows at Rome."])
    flat = dict.fromkeys(content_stems(ASKED.question), 1.0)
    assert texts.stating(ASKED, flat) == []
    assert texts.stating(ASKED, flat | {"rome": 5.0}) == [0]
    assert Texts(["The Tiber is at Rome."]).stating(ASKED, {"rome": 9.0}) == []
    vestals = Texts(["A vestal kept the fire.", "The vestal was absent."])
    assert vestals.stating(question("What did a vestal do?", "fire"), {"vestal": 1.0}) == [0]


# Similarity


def word_sets(seed: int, count: int) -> list[frozenset[str]]:
    rng = np.random.default_rng(seed)
    return [frozenset(rng.choice(list("abcdefgh"), size=rng.integers(0, 6))) for _ in range(count)]


def test_rare_words_weigh_more_and_none_weighs_less_than_nothing():
    weight = rarity([frozenset("ab"), frozenset("a"), frozenset("a")])
    assert weight["b"] == pytest.approx(np.log(4 / 1.5))
    assert weight["b"] > weight["a"] > 0
    assert rarity([]) == {}


def test_alike_against_a_slow_reference():
    first, second = word_sets(0, 12), word_sets(1, 9)
    weight = rarity([*first, *second])

    def mass(words) -> float:
        return sum(weight[word] for word in words)

    expected = [[mass(a & b) / mass(a | b) if a | b else 0.0 for b in second] for a in first]
    np.testing.assert_allclose(alike(first, second), expected, atol=1e-6)


def test_alike_is_one_for_the_same_words_and_zero_for_none_in_common():
    texts = [frozenset("abc"), frozenset("ad"), frozenset("e")]
    similarity = alike(texts, texts)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-6)
    assert similarity[0, 2] == similarity[1, 2] == 0 < similarity[0, 1] < 1
    assert alike([frozenset()], [frozenset()]).tolist() == [[0.0]]
    assert alike([], [frozenset("a")]).shape == (0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_alike_is_symmetric_and_in_range(seed):
    first, second = word_sets(seed, 15), word_sets(seed + 10, 11)
    similarity = alike(first, second)
    assert similarity.shape == (15, 11)
    assert similarity.min() >= 0 and similarity.max() <= 1 + 1e-6
    np.testing.assert_allclose(similarity, alike(second, first).T, atol=1e-6)


# Paraphrases


def test_paraphrases_are_found_among_other_questions_and_nothing_else_is():
    """All in one pool, so that every other combination is a control as well; whichever side comes first."""
    first, second = halves([*PARAPHRASES, *DIFFERENT_PAIRS])
    assert paraphrases(first, second) == [(k, k) for k in range(len(PARAPHRASES))]
    assert sorted((i, j) for j, i in paraphrases(second, first)) == paraphrases(first, second)
    assert {(k, k) for k in range(len(first))} <= set(paraphrases(first, first))
    assert paraphrases([], [ASKED]) == paraphrases([ASKED], []) == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_questions_for_two_facts_are_no_paraphrases(kind):
    assert paraphrases(*halves(DIFFERENT[kind])) == []


def test_the_same_words_with_another_answer_are_the_same_question():
    first, second = halves([("Who was the first king of Rome?", "Romulus", "Who was Rome's first king?", "Remus")])
    assert paraphrases(first, second) == [(0, 0)]


def test_an_alias_is_an_accepted_answer():
    pairs = [*PARAPHRASES, *DIFFERENT_PAIRS]
    first, second = halves(
        [("Who crossed the Rubicon?", "Gaius", "Who led his men over the Rubicon?", "Julius"), *pairs]
    )
    assert (0, 0) not in paraphrases(first, second)
    first[0] = question(first[0].question, "Gaius", "Julius")
    assert (0, 0) in paraphrases(first, second)
