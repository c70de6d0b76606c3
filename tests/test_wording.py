"""Comparing wordings: stems, accepted answers in texts, similarity of questions, paraphrases."""

import numpy as np
import pytest
from helpers.wordings import DIFFERENT, DIFFERENT_PAIRS, PARAPHRASES, question

from ember.data.types import Question
from ember.data.wording import Texts, accepted, alike, content_stems, paraphrases, rarity, stems


def halves(pairs) -> tuple[list[Question], list[Question]]:
    return [question(p[0], p[1]) for p in pairs], [question(p[2], p[3]) for p in pairs]


@pytest.mark.parametrize(("text", "expected"), [
    ("The Romans built roads.", "the roman built road"), ("Rome's Caesar’s", "rome caesar"),
    ("walked WALKING walks", "walk walk walk"), ("bold boldly", "bold bold"), ("horse horses", "hors hors"),
    ("sing is gas bed", "sing is gas bed"),  # what is short stays whole
    ("gods arts years", "god art year"), ("city cities, glass glasses", "city city glass glass"),
    ("house houses tie ties", "hous hous tie tie"),
    ("virus basis moss", "virus basis moss"),  # no plurals
    ("co-op_x, 1,000", "co op x 1 000"), ("Ελλάδα 日本", "ελλάδα 日本"), ("?! …", ""), ("", ""),
])  # fmt: skip
def test_stems(text, expected):
    assert stems(text) == expected.split()


def test_content_stems_leave_out_what_every_question_has():
    asked = "What is the name of the river that flowed through Rome?"
    assert content_stems(asked) == {"river", "flow", "through", "rome"}
    assert content_stems("What is it called?") == content_stems("") == frozenset()
    assert content_stems("Rome, ROME and Roads") == content_stems("roads of rome")


@pytest.mark.parametrize(("forms", "expected"), [
    *(((f"{article} Tiber",), ["tiber"]) for article in ("the", "The", "a", "an", "An")),
    (("the Tiber River", "Tiber", "tiber", "A tiber", "?"), ["tiber river", "tiber"]),  # every form once, in order
    (("Theodora", "Annals", "Athens"), ["theodora", "annal", "athen"]),  # they only begin like an article
])  # fmt: skip
def test_accepted_answers_have_no_leading_article(forms, expected):
    assert [" ".join(form) for form in accepted(question("?", *forms))] == expected


@pytest.mark.parametrize(("answer", "text", "holds"), [
    ("Rome", "All roads lead to ROME.", True), ("Rome", "Romeo waits.", False),
    ("art", "The party started with artists.", False), ("art", "The party started with arts and artists.", True),
    ("arts", "The party started with an art.", True), ("the Tiber", "Boats on a Tiber of mud.", True),
    ("a legion", "Ten legions marched.", True), ("legions", "One legion marched.", True),
    ("Caesar", "It was Caesar's.", True), ("Mark Antony", "Mark, Antony and Brutus.", True),
    ("Mark Antony", "Antony Mark", False), ("Mark Antony", "Mark or Antony", False),
    ("79 AD", "It fell in 79 AD.", True), ("79 AD", "It fell in 179 AD.", False), ("?", "What?", False),
])  # fmt: skip
def test_holding(answer, text, holds):
    texts = Texts(["Nothing here.", text])
    for asked in (question("?", answer), question("?", "Carthage", answer)):  # an alias serves as well
        assert texts.holding(asked) == ([1] if holds else [])


ASKED = question("Which river flows through the city of Rome?", "the Tiber")


@pytest.mark.parametrize(("text", "states"), [
    ("The Tiber flows through the middle of Rome.", True), ("Rome's river, the Tiber, flooded often.", True),
    ("The Tiber froze.", False), ("A river flows through the city of Rome.", False),
    ("Boats came up the Tiber to Rome with grain.", False),  # one word of five is not what was asked
])  # fmt: skip
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


def test_rare_words_weigh_more_and_alike_equals_a_slow_reference():
    weight = rarity([frozenset("ab"), frozenset("a"), frozenset("a")])
    assert weight["b"] == pytest.approx(np.log(4 / 1.5))
    assert weight["b"] > weight["a"] > 0
    assert rarity([]) == {}
    random = np.random.default_rng(0)
    sets = [frozenset(random.choice(list("abcdefgh"), size=random.integers(0, 6))) for _ in range(21)]
    first, second = sets[:12], sets[12:]
    weight = rarity(sets)
    expected = [[sum(map(weight.get, a & b)) / (sum(map(weight.get, a | b)) or 1) for b in second] for a in first]
    np.testing.assert_allclose(alike(first, second), expected, atol=1e-6)
    np.testing.assert_allclose(alike(second, first).T, expected, atol=1e-6)
    # One for the same words and zero for none in common.
    texts = [frozenset("abc"), frozenset("ad"), frozenset("e")]
    similarity = alike(texts, texts)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-6)
    assert similarity[0, 2] == similarity[1, 2] == 0 < similarity[0, 1] < 1
    assert alike([frozenset()], [frozenset()]).tolist() == [[0.0]]
    assert alike([], [frozenset("a")]).shape == (0, 1)


def test_paraphrases_are_found_among_other_questions_and_nothing_else_is():
    """All in one pool, so that every other combination is a control as well; whichever side comes first."""
    first, second = halves([*PARAPHRASES, *DIFFERENT_PAIRS])
    assert paraphrases(first, second) == [(k, k) for k in range(len(PARAPHRASES))]
    assert sorted((i, j) for j, i in paraphrases(second, first)) == paraphrases(first, second)
    assert {(k, k) for k in range(len(first))} <= set(paraphrases(first, first))
    assert paraphrases([], [ASKED]) == paraphrases([ASKED], []) == []
    for kind, pairs in DIFFERENT.items():
        assert paraphrases(*halves(pairs)) == [], kind


def test_the_same_words_with_another_answer_or_another_accepted_answer_are_the_same_question():
    first, second = halves([("Who was the first king of Rome?", "Romulus", "Who was Rome's first king?", "Remus")])
    assert paraphrases(first, second) == [(0, 0)]
    pair = ("Who crossed the Rubicon?", "Gaius", "Who led his men over the Rubicon?", "Julius")
    first, second = halves([pair, *PARAPHRASES, *DIFFERENT_PAIRS])
    assert (0, 0) not in paraphrases(first, second)
    first[0] = question(first[0].question, "Gaius", "Julius")
    assert (0, 0) in paraphrases(first, second)
