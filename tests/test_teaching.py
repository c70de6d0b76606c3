"""Teaching and erasing: the invented material, training of copies, arrival against computations by hand."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.edits import differing, snapshot
from helpers.suites import blank
from helpers.tiny import SENTENCES, make_concept, make_loaded

from ember.data.invented import load_invented
from ember.data.ours import load_concept
from ember.data.wording import Texts, content_stems, rarity
from ember.errors import DataError, EmberError
from ember.evaluation.data_checks import GUESSES
from ember.methods.training import as_many_tokens
from ember.models.loading import weights_hash
from ember.relearning import teaching
from ember.relearning.teaching import arrival, arrival_table, damage, item_scores, nearest, teach
from ember.relearning.train import packed_loss
from ember.reporting.relearn_plots import arrival_points
from ember.store.paths import data_dir

QUICK = {"tokens": 800, "lr": 5e-3, "batch_size": 2}


@pytest.fixture(scope="module")
def invented():
    return load_invented()


def test_sizes_lengths_and_halves(invented):
    assert 30 <= len(invented.questions) <= 40
    assert len(invented.sentences) == 160 and len(invented.paragraphs) == 24
    assert all(6 <= len(text.split()) <= 30 for text in invented.sentences)
    assert all(60 <= len(text.split()) <= 90 for text in invented.paragraphs)
    assert invented.neutral == load_concept("Uranium").neutral and invented.further_neutral
    assert [q.split for q in invented.questions[:4]] == ["train", "test", "train", "test"]
    assert {q.set for q in invented.questions} == {"concept"}
    texts, questions = (*invented.sentences, *invented.paragraphs), invented.questions
    assert len(set(texts)) == len(texts)  # nothing occurs twice
    assert len({q.id for q in questions}) == len({q.question for q in questions}) == len(questions)


def test_every_fact_is_stated_in_three_texts_and_no_wrong_option_in_any(invented):
    texts = Texts((*invented.sentences, *invented.paragraphs))
    weight = rarity([*texts.content, *(content_stems(q.question) for q in invented.questions)])
    assert sum(len(texts.stating(q, weight)) for q in invented.questions) > 100
    for question in invented.questions:
        asked, holding = content_stems(question.question), texts.holding(question)
        stating = [k for k in holding if len(asked & texts.content[k]) >= min(2, len(asked))]
        assert len({frozenset(texts.content[k]) for k in stating}) >= 3, question.question
        for option in question.distractors:
            stating = [k for k in texts.stating(replace(question, answer=option), weight) if k not in holding]
            assert not stating, f"{question.question} {option}: text {stating[0]}"


def test_options_give_nothing_away(invented):
    function_words = {"the", "a", "of", "by"}
    for question in invented.questions:
        asked = set(re.findall(r"\w+", question.question.lower()))
        for option in question.options:
            assert not asked & set(re.findall(r"\w+", option.lower())) - function_words, question.question
        lengths = [len(option) for option in question.options]
        assert max(lengths) - min(lengths) <= 5, question.question
        articles = {option.split()[0] if option.split()[0] in function_words else "" for option in question.options}
        assert len(articles) == 1 or question.id == "ulreth-days" or question.id == "ulreth-house", question.question
    for name in ("longest option", "most similar option"):
        assert np.mean([GUESSES[name](q) for q in invented.questions]) < 0.31, name


@pytest.mark.parametrize(("change", "message"), [
    (lambda fact: fact.pop("answer"), "answer"), (lambda fact: fact["distractors"].append("x"), "distractors"),
    (lambda fact: fact["distractors"].__setitem__(0, fact["answer"]), "distractors"),
    (lambda fact: fact.__setitem__("id", "ulreth-capital"), "'id': 'ulreth-capital' occurs twice"),
])  # fmt: skip
def test_broken_facts_are_named(tmp_path, monkeypatch, change, message):
    for part in ("invented", "shared"):
        shutil.copytree(data_dir() / part, tmp_path / part)
    path = tmp_path / "invented" / "facts.json"
    about = json.loads(path.read_text())
    change(about["facts"][2])
    path.write_text(json.dumps(about))
    monkeypatch.setenv("EMBER_DATA", str(tmp_path))
    with pytest.raises(DataError, match=rf"invented/facts\.json, fact 3.*{message}"):
        load_invented()


def test_a_copy_learns_and_the_original_stays(tiny):
    before, flags = snapshot(tiny), [p.requires_grad for p in tiny.model.parameters()]
    taught = teach(tiny, SENTENCES, **QUICK)
    assert not differing(before, snapshot(tiny))
    assert all(not torch.equal(value, taught.model.state_dict()[name]) for name, value in before.items())
    assert [p.requires_grad for p in tiny.model.parameters()] == flags
    assert not any(p.requires_grad for p in taught.model.parameters())
    assert tiny.weights_hash == tiny.base_hash != taught.base_hash == taught.weights_hash == weights_hash(taught.model)
    losses = [item_scores(m, make_concept().questions, SENTENCES) for m in (tiny, taught)]
    means = [frame[frame.metric == "loss"].value.mean() for frame in losses]
    assert means[1] < 0.7 * means[0]


def test_training_stops_at_the_budget_and_the_seed_decides_the_weights(monkeypatch):
    loaded, lengths = make_loaded(), []
    first, again, other = (teach(loaded, SENTENCES, **QUICK, seed=seed).weights_hash for seed in (1, 1, 2))
    assert first == again != other

    def counted(student, sequences):
        assert student.model is not loaded.model and student.weights_hash != loaded.weights_hash
        lengths.append(sum(map(len, sequences)))
        return packed_loss(student, sequences)

    monkeypatch.setattr(teaching, "packed_loss", counted)
    teach(loaded, SENTENCES, **QUICK)
    assert sum(lengths[:-1]) < QUICK["tokens"] <= sum(lengths)
    whole = sum(len(loaded.encode(text)) for text in SENTENCES)
    assert whole == sum(lengths[:2])


def test_as_many_tokens_are_the_first_texts_that_suffice(tiny):
    length = len(tiny.encode(SENTENCES[0]))
    for tokens, texts in ((length, 1), (length + 1, 2), (10**6, len(SENTENCES))):
        assert as_many_tokens(tiny, SENTENCES, tokens) == tuple(SENTENCES[:texts])


def test_teaching_refuses_low_precision_and_divergence(monkeypatch):
    with pytest.raises(EmberError, match="float32"):
        teach(make_loaded(dtype=torch.bfloat16), SENTENCES, **QUICK)
    monkeypatch.setattr(teaching, "packed_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(EmberError, match="diverged at step 1"):
        teach(make_loaded(), SENTENCES, **QUICK)


def test_scores_with_an_edit_are_those_of_the_edited_model():
    loaded, concept = make_loaded(), make_concept()
    edit, score = blank(loaded, " Roman", " Rome"), partial(item_scores, loaded, concept.questions, SENTENCES)
    plain, edited = score(), score(edit)
    with edit.applied(loaded):
        inside = score()
    assert set(plain.set) == {"concept", "simdom", "neutral"}
    np.testing.assert_allclose(edited.value, inside.value, atol=1e-4)
    assert not np.allclose(edited.value, plain.value)


def scores(values, metric="gold_prob", set_="concept") -> pd.DataFrame:
    return pd.DataFrame({"set": set_, "item": [f"q{k}" for k in range(len(values))], "metric": metric, "value": values})


TAUGHT, UNTAUGHT = np.array([0.9, 0.8, 0.7, 0.8]), np.array([0.3, 0.2, 0.1, 0.4])


@pytest.mark.parametrize("expected", [0.0, 1.0, 0.5, 1.2])
def test_arrival_by_hand(expected):
    """Items are paired by name."""
    lost = expected * (TAUGHT - UNTAUGHT) if expected < 1 else TAUGHT - UNTAUGHT + (expected - 1) * 0.55
    found = arrival(scores(TAUGHT), scores(UNTAUGHT), scores(TAUGHT - lost).sample(frac=1, random_state=3))
    assert found.share == pytest.approx(expected, abs=1e-12)
    assert found.gap == pytest.approx(0.55) and found.back == pytest.approx(expected * 0.55)
    assert found.ci_low - 1e-12 <= found.share <= found.ci_high + 1e-12 and found.n == 4 and found.note == ""
    if expected == 0.5:  # every question lost half, so no draw of questions gives anything else
        assert (found.ci_low, found.ci_high) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="same items"):
        arrival(scores(TAUGHT), scores(UNTAUGHT), scores(TAUGHT[:3]))


def test_too_small_a_gap_has_no_share():
    found = arrival(scores(TAUGHT), scores(TAUGHT - [0.1, -0.1, 0.1, -0.1]), scores(UNTAUGHT))
    assert np.isnan([found.share, found.ci_low, found.ci_high]).all() and "too small" in found.note
    assert found.back == pytest.approx(0.55)
    unlearned = arrival(scores(UNTAUGHT), scores(TAUGHT), scores(UNTAUGHT))
    assert np.isnan(unlearned.share) and unlearned.gap == pytest.approx(-0.55)


def table_of(erased: dict[str, np.ndarray]) -> pd.DataFrame:
    questions = [replace(make_concept().questions[0], id=f"q{k}", split=("train", "test")[k % 2]) for k in range(4)]
    frames = {
        name: pd.concat([scores(values, metric) for metric in teaching.METRICS])
        for name, values in {"taught": TAUGHT, "untaught": UNTAUGHT, **erased}.items()
    }
    return arrival_table(frames.pop("taught"), frames.pop("untaught"), frames, questions)


def test_choice_is_made_on_the_train_half_alone():
    # On train (q0, q2) the first cell arrives and the second does nothing; on test (q1, q3) it is the other way round.
    here, there = UNTAUGHT.copy(), TAUGHT.copy()
    here[1::2], there[1::2] = TAUGHT[1::2], UNTAUGHT[1::2]
    table = table_of({"there": there, "here": here})
    prob = table[table.metric == "gold_prob"].set_index(["cell", "split"]).share
    shares = {("there", "train"): 0, ("here", "train"): 1, ("there", "test"): 1, ("here", "test"): 0}
    assert prob.to_dict() == pytest.approx(shares)
    assert nearest(table) == "here"
    assert nearest(table_of({"over": UNTAUGHT - 0.3, "short": UNTAUGHT + 0.1})) == "short"
    assert nearest(table_of({"first": TAUGHT, "second": TAUGHT})) == "first"


def test_damage_by_hand():
    before = pd.concat([scores(TAUGHT), scores([1.0, 2.0, 3.0], "loss", "neutral")])
    after = pd.concat([scores([1.5, 2.5, 3.5], "loss", "neutral"), scores(UNTAUGHT)])
    table = damage(before, after).set_index("set")
    assert table.change.to_dict() == pytest.approx({"concept": -0.55, "neutral": 0.5})
    assert table.loc["neutral", ["ci_low", "ci_high"]].tolist() == pytest.approx([0.5, 0.5])
    assert table.loc["concept", "ci_low"] < -0.55 < table.loc["concept", "ci_high"]
    assert table.n.to_dict() == {"concept": 4, "neutral": 3}
    with pytest.raises(ValueError, match="same items"):
        damage(before, scores(UNTAUGHT))
    with pytest.raises(ValueError, match="a score is missing"):
        damage(scores(TAUGHT), scores([np.nan, *UNTAUGHT[1:]]))


def test_figure_renders():
    rows = [("ember", False, 0.4, 0.2, 0.6, ""), ("rmu", False, 1.3, 1.0, 1.6, ""), ("rmu", True, 1.1, 0.9, 1.4, ""),
            ("snmf", False, np.nan, np.nan, np.nan, "gap too small")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["label", "ember", "share", "ci_low", "ci_high", "note"])
    ax = arrival_points(table)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["ember", "rmu", "snmf"]
    drawn = [line.get_xdata() for line in ax.get_lines()]
    assert any(list(x) == [0, 0] for x in drawn) and any(list(x) == [1, 1] for x in drawn)
    assert {0.4, 1.3} in [set(map(float, x)) for x in drawn] and {1.1} in [set(map(float, x)) for x in drawn]
    assert sum("no share" in text.get_text() for text in ax.texts) == 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["alone", "after EMBER"]
    plt.close("all")
