"""The judge against a local endpoint that also misbehaves: cache, budget, retries, the key, and what is judged."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.suites import blank, shared_data, suite_of, talkative
from helpers.tiny import make_concept, make_loaded

from ember.errors import DamagedFileError, EmberError
from ember.evaluation.metrics import compare, harmonic_mean
from ember.features import concept_features
from ember.judging.client import Judge, open_judge
from ember.judging.grading import (
    accepted_features,
    feature_verdicts,
    judge_coherence,
    judge_features,
    judge_open_answers,
    judged_scores,
    no_verdicts,
    top_tokens,
)
from ember.judging.settings import JudgeConfig, deciding
from ember.models.loading import weights_hash
from ember.store.paths import REPOSITORY

KEY = "sk-very-secret-0123456789"
VARIABLE = "EMBER_TEST_JUDGE_KEY"
QUICK = {"backoff": 0.01, "max_wait": 2.0, "timeout": 0.3, "retries": 2, "rereads": 2}


def reply(text: str, tokens: int = 10, **more) -> tuple[int, dict, bytes]:
    """Status, headers and body of a chat completion."""
    body = {"model": "served-1", "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return 200, {}, json.dumps({**body, "usage": {"total_tokens": tokens}, **more}).encode()


def failure(status: int, text: str = "no", **headers: str) -> tuple[int, dict, bytes]:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, text.encode()


class Endpoint:
    """A chat-completions endpoint: plays ``script`` once, then answers by ``answer(prompt)``."""

    def __init__(self) -> None:
        self.script: list = []
        self.answer: Callable[[str], str] = lambda prompt: '{"correct": true}'
        self.requests: list[dict] = []
        self.times: list[float] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.times.append(time.monotonic())
                    outer.requests.append({"path": self.path, "key": self.headers["authorization"], **body})
                    step = outer.script.pop(0) if outer.script else None
                if step == "hang":
                    time.sleep(0.6)
                if step in ("hang", "drop"):
                    self.close_connection = True
                    return
                status, headers, content = step or reply(outer.answer(body["messages"][0]["content"]))
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@pytest.fixture
def endpoint(cache, monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Endpoint()
    threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def settings_for(endpoint: Endpoint, **changes) -> dict:
    return {"base_url": endpoint.url, "model": "judge-1", "key_variable": VARIABLE, **QUICK, **changes}


def judge_for(endpoint: Endpoint, **changes) -> Judge:
    return Judge(JudgeConfig(**settings_for(endpoint, **changes)))


def parsed(text: str) -> dict:
    found = json.loads(text)
    if "correct" not in found:
        raise ValueError("no 'correct'")
    return found


# Configuration


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_url": "localhost:11434/v1"}, "base_url must start with http"),
        ({"base_url": "ftp://x/v1"}, "base_url"),
        ({"model": " "}, "model must be a name"),
        ({"model": 4}, "model must be str"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"timeout": "1e1"}, "timeout must be a number"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"rereads": 1.5}, "rereads must be a whole number"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"max_calls": 0}, "max_calls must be at least 1"),
        ({"max_tokens": True}, "max_tokens"),
        ({"required": 1}, "required must be bool"),
        ({"options": {"temperature": 1}}, "options must be a mapping without"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        JudgeConfig(**{"base_url": "http://localhost/v1", "model": "m", **change})


@pytest.mark.parametrize(
    "change", [{"base_url": f"http://user:{KEY}@x/v1"}, {"base_url": f"http://x/v1?key={KEY}"}, {"key_variable": KEY}]
)
def test_a_key_in_the_configuration_is_refused_and_not_repeated(change):
    with pytest.raises(ValueError, match="environment variable") as caught:
        JudgeConfig(**{"base_url": "http://localhost/v1", "model": "m", **change})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["", "  ", "secret\nkey", "geheim€"])
def test_a_key_that_is_missing_or_cannot_be_one_is_an_error_without_it(key, monkeypatch):
    monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(EmberError, match=VARIABLE) as caught:
        Judge(JudgeConfig("http://localhost/v1", "m", VARIABLE))
    assert not key.strip() or key not in str(caught.value)


def test_an_endpoint_without_a_key_gets_none(endpoint):
    judge_for(endpoint, key_variable="").ask("a", parsed)
    assert [request["key"] for request in endpoint.requests] == [None]


# Requests and the cache


def test_a_request_is_a_chat_completion_at_temperature_0(endpoint):
    judge = judge_for(endpoint, options={"reasoning_effort": "none"})
    found = judge.ask("Is it?", parsed)
    (request,) = endpoint.requests
    assert (request.pop("path"), request.pop("key")) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert request == {
        "model": "judge-1", "messages": [{"role": "user", "content": "Is it?"}], "temperature": 0, "max_tokens": 300,
        "reasoning_effort": "none",
    }  # fmt: skip
    assert (found.values, found.served_by, found.cached, found.reason) == ({"correct": True}, "served-1", False, "")
    assert (judge.about()["calls"], judge.about()["tokens"]) == (1, 10)


def test_the_same_question_is_asked_once(endpoint):
    judge = judge_for(endpoint)
    first = judge.ask_all(["a", "b", "a"], parsed)
    again = judge_for(endpoint, retries=0, max_calls=1).ask_all(["b", "a"], parsed)
    assert sorted(endpoint.prompts) == ["a", "b"]
    assert [v.values for v in [*first, *again]] == [{"correct": True}] * 5
    assert all(v.cached for v in again) and not any(v.cached for v in first)


def test_another_process_finds_the_reply(endpoint):
    judge_for(endpoint).ask("a", parsed)
    code = (
        "import json, sys; from ember.judging.client import Judge; from ember.judging.settings import JudgeConfig\n"
        "judge = Judge(JudgeConfig(**json.loads(sys.argv[1])))\n"
        "print(judge.ask('a', json.loads), judge.calls)"
    )
    command = [sys.executable, "-c", code, json.dumps(settings_for(endpoint))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "cached=True" in done.stdout and done.stdout.strip().endswith("0")
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("change", [{"model": "judge-2"}, {"reply_tokens": 50}, {"options": {"seed": 1}}, "url"])
def test_whatever_a_reply_depends_on_makes_a_new_request(endpoint, change):
    judge_for(endpoint).ask("a", parsed)
    change = {"base_url": endpoint.url.replace("/v1", "/v2")} if change == "url" else change
    assert not judge_for(endpoint, **change).ask("a", parsed).cached
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:-20], lambda text: text.replace("true", "false"), lambda text: "{}", lambda text: "[]"],
)
def test_a_damaged_entry_is_named_and_not_read(endpoint, cache, damage):
    judge = judge_for(endpoint)
    judge.ask("a", parsed)
    (entry,) = (path for path in cache.rglob("*") if path.is_file())
    entry.write_text(damage(entry.read_text()))
    with pytest.raises(DamagedFileError, match=str(entry)):
        judge.ask("a", parsed)
    entry.unlink()
    assert judge.ask("a", parsed).values == {"correct": True}


# Failures that pass


@pytest.mark.parametrize("step", [failure(429), failure(500), failure(503), failure(408), "hang", "drop"], ids=str)
def test_a_failure_that_passes_is_tried_again(endpoint, step):
    endpoint.script = [step]
    found = judge_for(endpoint).ask("a", parsed)
    assert found.values == {"correct": True}
    assert endpoint.prompts == ["a", "a"]


@pytest.mark.parametrize("step", [failure(500, "overloaded"), failure(429), "hang", "drop"], ids=str)
def test_a_failure_that_lasts_ends_after_the_retries(endpoint, step):
    endpoint.script = [step] * 9
    with pytest.raises(EmberError, match=r"gave no answer in 3 attempts"):
        judge_for(endpoint).ask("a", parsed)
    assert len(endpoint.requests) == 3


def test_nobody_listens(cache):
    judge = Judge(JudgeConfig("http://127.0.0.1:9/v1", "m", **QUICK))
    with pytest.raises(
        EmberError, match=r"127\.0\.0\.1:9/v1/chat/completions gave no answer in 3 attempts: .*Connect|Connect"
    ):
        judge.ask("a", parsed)


@pytest.mark.parametrize("asked", ["0.4", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_the_endpoint_s_own_wait_is_kept(endpoint, status, asked):
    # A date has no fractions of seconds, so two seconds ahead are one at least.
    stated = asked if asked != "date" else formatdate(time.time() + 2, usegmt=True)
    endpoint.script = [failure(status, Retry_After=stated)]
    judge_for(endpoint, max_wait=5.0).ask("a", parsed)
    first, second = endpoint.times
    assert second - first >= (0.4 if asked != "date" else 0.9)


def test_a_wait_beyond_the_limit_ends_at_once(endpoint):
    endpoint.script = [failure(429, "daily quota", Retry_After="3600")]
    with pytest.raises(EmberError, match=r"asks to wait 3600 s, and max_wait is 2 s: 429 daily quota"):
        judge_for(endpoint).ask("a", parsed)
    assert len(endpoint.requests) == 1


def test_waits_grow(endpoint):
    endpoint.script = [failure(500)] * 3
    judge_for(endpoint, retries=3, backoff=0.1).ask("a", parsed)
    waits = np.diff(endpoint.times)
    assert (waits >= [0.1, 0.2, 0.4]).all() and waits.max() < 1


@pytest.mark.parametrize(
    ("status", "advice"), [(400, "options"), (401, VARIABLE), (403, "accept its terms"), (404, "base_url"), (301, "")]
)
def test_a_refusal_fails_at_once_with_what_to_do(endpoint, status, advice):
    endpoint.script = [failure(status, f"bad key {KEY}")]
    with pytest.raises(EmberError, match=rf"refuses the request for judge-1: {status} bad key \[key\].*{advice}"):
        judge_for(endpoint).ask("a", parsed)
    assert len(endpoint.requests) == 1


# Replies that make no sense


NONSENSE = [
    reply("I think so."),
    reply('{"right": true}'),
    reply(""),
    (200, {}, b"<html>"),
    (200, {}, b"[1]"),
    (200, {}, b'{"choices": []}'),
]


@pytest.mark.parametrize("step", NONSENSE, ids=lambda step: step[2].decode()[-60:])
def test_nonsense_is_asked_again_and_then_missing_with_the_reason(endpoint, cache, step):
    endpoint.script = [step] * 3
    judge = judge_for(endpoint)
    found = judge.ask("a", parsed)
    assert found.values == {} and np.isnan(found.value("correct"))
    assert found.reason.startswith("not readable in 3 attempts: ")
    assert len(endpoint.requests) == 3
    assert not any(path.is_file() for path in cache.rglob("*"))  # asked anew next time
    assert judge.ask("a", parsed).values == {"correct": True}


def test_the_model_is_told_what_was_wrong(endpoint):
    endpoint.script = [reply('{"right": 1}')]
    assert judge_for(endpoint).ask("a", parsed).values == {"correct": True}
    user, assistant, told = endpoint.requests[1]["messages"]
    assert (user["content"], assistant["content"]) == ("a", '{"right": 1}')
    assert "no 'correct'" in told["content"]


def test_a_reply_that_is_no_unicode_can_be_kept(endpoint):
    endpoint.script = [reply('{"correct": true, "why": "\ud800"}')]
    judge = judge_for(endpoint)
    first = judge.ask("a", parsed)
    assert first.values == judge.ask("a", parsed).values == {"correct": True, "why": "?"}


# Budget


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_budget_in_calls_stops_before_the_next(endpoint, concurrency):
    judge = judge_for(endpoint, max_calls=3, concurrency=concurrency)
    with pytest.raises(EmberError, match="max_calls=3 is spent"):
        judge.ask_all(list("abcdefgh"), parsed)
    assert len(endpoint.requests) == 3
    # What was answered is kept: a larger budget goes on from there.
    assert len(judge_for(endpoint, max_calls=5).ask_all(list("abcdefgh"), parsed)) == 8
    assert sorted(endpoint.prompts) == list("abcdefgh")


def test_retries_count_as_calls(endpoint):
    endpoint.script = [failure(500)] * 9
    with pytest.raises(EmberError, match="max_calls=2"):
        judge_for(endpoint, max_calls=2).ask("a", parsed)
    assert len(endpoint.requests) == 2


def test_the_budget_in_tokens_stops_before_a_call_that_could_exceed_it(endpoint):
    """Each call may take 10 + 20 // 2 tokens and takes 10."""
    judge = judge_for(endpoint, max_tokens=45, reply_tokens=10, concurrency=1)
    prompts = [letter * 20 for letter in "abcdefgh"]
    with pytest.raises(EmberError, match=r"max_tokens=45 \(30 tokens used, 20 more possible\)"):
        judge.ask_all(prompts, parsed)
    assert len(endpoint.requests) == 3 and judge.tokens == 30


def test_tokens_that_the_endpoint_does_not_state_count_as_expected(endpoint):
    endpoint.script = [reply('{"correct": true}', usage=None)]
    judge = judge_for(endpoint, reply_tokens=10)
    judge.ask("a" * 20, parsed)
    assert judge.tokens == 20


# The key


def test_the_key_is_nowhere_but_in_the_request(endpoint, cache):
    """Not even where the endpoint repeats it."""
    endpoint.script = [reply(json.dumps({"correct": True, "echo": KEY})), failure(429, KEY), failure(401, KEY)]
    judge = judge_for(endpoint)
    shown = [repr(judge), repr(judge.config), repr(vars(judge.config)), repr(judge.about())]
    shown.append(repr(judge.ask("a", parsed)))
    with pytest.raises(EmberError) as caught:
        judge.ask("b", parsed)
    shown += [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files and all(KEY not in text for text in [*shown, *(path.read_text() for path in files)])
    assert endpoint.requests[0]["key"] == f"Bearer {KEY}"


# A profile's judge


def test_no_judge_is_no_judge():
    assert open_judge({}) is None


def test_without_a_key_there_is_one_note_and_no_judge(endpoint, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    with pytest.warns(UserWarning, match=rf"{VARIABLE}.*Judged scores will be missing") as noted:
        assert open_judge(settings_for(endpoint)) is None
    assert len(noted) == 1 and not endpoint.requests


def test_a_required_judge_without_a_key_fails_with_what_to_do(endpoint, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(EmberError, match=rf"{VARIABLE}.*take judge\.required or the judge out of the profile"):
        open_judge(settings_for(endpoint, required=True))


@pytest.mark.parametrize("step", [failure(401), (200, {}, b"<html>")], ids=["refused", "no endpoint"])
def test_a_required_judge_must_answer_before_work_starts(endpoint, step):
    endpoint.script = [reply("ready"), step]
    assert isinstance(open_judge(settings_for(endpoint, required=True)), Judge)
    with pytest.raises(EmberError, match=endpoint.url):
        open_judge(settings_for(endpoint, required=True))
    assert isinstance(open_judge(settings_for(endpoint)), Judge) and len(endpoint.requests) == 2


def test_a_key_that_arrives_makes_results_stale_and_a_larger_budget_does_not(endpoint, monkeypatch):
    before = deciding(settings_for(endpoint))
    assert deciding(settings_for(endpoint, max_calls=7, retries=9)) == before
    assert deciding(settings_for(endpoint, model="other")) != before
    monkeypatch.delenv(VARIABLE)
    assert deciding(settings_for(endpoint)) != before


# What is judged


QUESTIONS = [q for q in make_concept().questions if q.split == "test"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"correct": true}', 1.0),
        ('```json\n{"correct": false}\n```', 0.0),
        ('<think>{"correct": true}?</think>The {answer} is wrong: {"correct": false}', 0.0),
        ('{"correct": 1}', np.nan),
        ('{"correct": "yes"}', np.nan),
        ("yes", np.nan),
    ],
)
def test_open_answers_are_right_wrong_or_missing(endpoint, text, value):
    endpoint.answer = lambda prompt: text
    found = judge_open_answers(judge_for(endpoint), QUESTIONS[:2], ["in Gaul", ""])
    wanted = [("concept_open", q.id, "open_correct", value) for q in QUESTIONS[:2]]
    pd.testing.assert_frame_equal(found.items, pd.DataFrame(wanted, columns=found.items.columns))
    assert (found.verdicts.reason != "").tolist() == [np.isnan(value)] * 2


def test_the_judge_sees_question_reference_and_answer(endpoint):
    question = replace(QUESTIONS[0], answer="Rome {x}", aliases=("Roma",))
    found = judge_open_answers(judge_for(endpoint), [question], ["in {Gaul}"])
    (prompt,) = endpoint.prompts
    for part in (question.question, "Rome {x} / Roma", "in {Gaul}"):
        assert part in prompt
    row = found.verdicts.iloc[0]
    assert (row.prompt, row.reply, row.judge) == (prompt, '{"correct": true}', "open")
    assert (row.model, row.served_by, row.endpoint) == ("judge-1", "served-1", f"{endpoint.url}/chat/completions")
    assert json.loads(row.settings) == {"temperature": 0, "reply_tokens": 300, "options": {}}
    assert {"open", "coherence", "about", "describe"} == found.about["prompts"].keys()
    assert found.verdicts.columns.tolist() == no_verdicts().columns.tolist()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"instruction": 2, "fluency": 0}', (2, 0)),
        ('{"instruction": 1.0, "fluency": 2}', (1, 2)),
        ('{"instruction": 3, "fluency": 1}', None),
        ('{"instruction": -1, "fluency": 1}', None),
        ('{"instruction": 1.5, "fluency": 1}', None),
        ('{"instruction": true, "fluency": 1}', None),
        ('{"instruction": NaN, "fluency": 1}', None),
        ('{"instruction": 1}', None),
    ],
)
def test_coherence_has_two_scores_of_0_to_2_or_none(endpoint, text, values):
    endpoint.answer = lambda prompt: text
    responses = pd.DataFrame({"item": ["i"], "prompt": ["Say yes."], "text": ["Yes."]})
    items = judge_coherence(judge_for(endpoint), responses).items
    assert items.metric.tolist() == ["judge_instruction", "judge_fluency"]
    assert set(items.set) == {"generation"}
    np.testing.assert_array_equal(items.value, values or (np.nan, np.nan))


@pytest.fixture
def features(cache):
    return concept_features(make_loaded(), make_concept(), rank=4, sparsity=0.3, max_iter=20)


def test_the_judge_of_features_sees_the_most_active_tokens(features):
    shown = top_tokens(features, 1, count=5)
    G = features.factorization.G[:, 1].abs()
    place = {token: k for k, token in enumerate(features.table.token)}
    activations = [float(G[place[token]]) for token in shown]
    assert activations == sorted(activations, reverse=True) and activations[0] == float(G.max())
    assert 0 < len(top_tokens(features, 1, count=10**6)) == int((G > 0).sum())


@pytest.mark.parametrize(
    ("about", "confidence", "accepted"), [(True, 0.85, 1), (True, 0.84, 0), (False, 0.99, 0), (True, 1.2, np.nan)]
)
def test_a_feature_is_accepted_with_a_confidence_of_85_percent(endpoint, features, about, confidence, accepted):
    described = {}

    def answer(prompt: str) -> str:
        if "<tokens>" in prompt:
            described[prompt] = f"words number {len(described)}"
            return json.dumps({"description": described[prompt]})
        assert any(text in prompt for text in described.values()) and "Tiny Rome" in prompt
        return json.dumps({"about": about, "confidence": confidence})

    endpoint.answer = answer
    found = judge_features(judge_for(endpoint), "Tiny Rome", features, [2, 0])
    rows = found.items.set_index(["item", "metric"]).value
    np.testing.assert_array_equal([rows["2", "accepted"], rows["0", "accepted"]], [accepted] * 2)
    assert accepted_features(found) == ([2, 0] if accepted == 1 else [])
    table = features.scores.merge(feature_verdicts(found), how="left", on="feature").set_index("feature")
    np.testing.assert_array_equal(table.judge_accepted[[2, 0]], [accepted] * 2)
    assert table.judge_confidence.notna().sum() == (0 if np.isnan(accepted) else 2)
    assert found.verdicts.judge.tolist() == ["describe"] * 2 + ["about"] * 2
    first = next(prompt for prompt in endpoint.prompts if "<tokens>" in prompt)
    assert any(repr(top_tokens(features, k)[0]) in first for k in (0, 2))


def test_a_feature_that_is_not_described_is_missing_and_not_refused(endpoint, features):
    endpoint.answer = lambda prompt: "hm" if "<tokens>" in prompt else "never asked"
    found = judge_features(judge_for(endpoint), "Tiny Rome", features, [1])
    assert found.items.value.isna().all() and found.items.metric.tolist() == ["about", "confidence", "accepted"]
    assert all("<tokens>" in prompt for prompt in endpoint.prompts)


# An evaluation with a judge


def verdict_on(prompt: str) -> str:
    """By the answer's length, so that other answers get other verdicts."""
    if "<reference>" in prompt:
        return json.dumps({"correct": len(prompt.split("<answer>")[1]) % 2 == 0})
    return json.dumps({"instruction": 1 + len(prompt) % 2, "fluency": 2})


@pytest.fixture
def asking(monkeypatch):
    """A suite whose sizes leave two open answers a set and two generations to a judge."""
    data = shared_data()
    monkeypatch.setattr("ember.evaluation.evaluate.load_shared", lambda *_, **__: data)
    return suite_of(open_answers=2, judge=True, generations=2, questions=3, instructions=2, letters=True)


def test_an_evaluation_with_a_judge_is_of_the_edited_model(endpoint, tiny, asking):
    from ember.evaluation.evaluate import evaluate

    endpoint.answer = verdict_on
    tiny = talkative(tiny)
    edit, judge = blank(tiny, " Romans", " the"), judge_for(endpoint)
    base, after = (judged_scores(tiny, asking, "test", judge, chosen) for chosen in (None, edit))
    with edit.applied(tiny):
        inside = judged_scores(tiny, asking, "test", judge)
    pd.testing.assert_frame_equal(after.items, inside.items)
    assert base.verdicts.prompt.tolist() != after.verdicts.prompt.tolist() == inside.verdicts.prompt.tolist()
    assert weights_hash(tiny.model) == tiny.weights_hash
    assert after.items.columns.tolist() == ["set", "item", "metric", "value"]
    found = {(s, m): len(part) for (s, m), part in after.items.groupby(["set", "metric"])}
    assert found == {
        ("concept_open", "open_correct"): 2, ("simdom_open", "open_correct"): 2,
        ("generation", "judge_instruction"): 2, ("generation", "judge_fluency"): 2,
    }  # fmt: skip
    plain = evaluate(tiny, asking, "test", edit)
    given = judged_scores(tiny, asking, "test", judge, edit, responses=plain.samples)
    pd.testing.assert_frame_equal(given.items, after.items)
    wrong = plain.samples.assign(item="other")
    with pytest.raises(ValueError, match="responses are not those"):
        judged_scores(tiny, asking, "test", judge, edit, responses=wrong)


def test_chat_prompts_of_open_answers_have_one_bos(endpoint, asking, monkeypatch):
    loaded, seen = make_loaded(bos=True), []
    generate = lambda loaded, prompts, **_: seen.extend(prompts) or [[5]] * len(prompts)  # noqa: E731
    monkeypatch.setattr("ember.judging.grading.generate_greedy", generate)
    judged_scores(loaded, asking, "test", judge_for(endpoint, rereads=0))
    assert len(seen) == 6 and all(ids.count(1) == 1 and ids[0] == 1 for ids in seen)


def test_sizes_that_ask_for_nothing_get_nothing(endpoint, asking, monkeypatch):
    found = judged_scores(make_loaded(), suite_of(), "test", judge_for(endpoint))
    assert found.items.empty and found.verdicts.empty and not endpoint.requests
    with pytest.raises(ValueError, match="split must be one of"):
        judged_scores(make_loaded(), suite_of(), "dev", judge_for(endpoint))


JUDGED = {
    "concept_open/open_correct": ([1, 1, 1, 1], [1, 0, 0, 0]),
    "simdom_open/open_correct": ([1, 1, 0, 0], [1, 1, 1, 0]),
    "generation/judge_instruction": ([2, 2, 2, 2], [1, 1, 1, 1]),
    "generation/judge_fluency": ([1, 1, 1, 1], [2, 2, 2, 2]),
}
LETTERS = {
    f"{name}/letter_correct": ([1] * 3 + [0], after)
    for name, after in (("concept", [1, 1, 0, 0]), ("simdom", [1, 1, 1, 0]), ("general", [1, 1, 1, 1]))
}


def with_rows(extra: dict, side: int) -> pd.DataFrame:
    from helpers.items import DEFAULTS, make_items

    rows = [
        (key.split("/")[0], f"{key.split('/')[0]}-{i}", key.split("/")[1], float(value))
        for key, both in extra.items()
        for i, value in enumerate(both[side])
    ]
    plain = make_items(sizes=dict.fromkeys(DEFAULTS, 4))
    return pd.concat([plain, pd.DataFrame(rows, columns=plain.columns)], ignore_index=True)


def test_judged_and_lettered_scores_are_the_paper_s_formulas():
    rows = JUDGED | LETTERS
    found = compare(with_rows(rows, 0), with_rows(rows, 1), n_resamples=20)
    assert found.value("efficacy_letter") == pytest.approx(0.5)  # (0.5 - 0.25) / (0.75 - 0.25) is left
    assert found.value("specificity_letter") == pytest.approx(1)
    assert found.value("efficacy_open") == pytest.approx(0.75)  # min(1, 0.25 / 1) is left
    assert found.value("specificity_open") == pytest.approx(1)  # min(1, 0.75 / 0.5), and general questions by letter
    assert found.value("coherence_judged") == pytest.approx(harmonic_mean(0.5, 1.0))
    for name, efficacy, specificity in (("final_letter", 0.5, 1.0), ("final_open", 0.75, 1.0)):
        assert found.value(name) == pytest.approx(harmonic_mean(efficacy, specificity, harmonic_mean(0.5, 1.0)))
    wanted = harmonic_mean(found.value("efficacy"), found.value("specificity"), found.value("coherence_judged"))
    assert found.value("final_judged") == pytest.approx(wanted)
    assert found.value("delta_letter_correct", "concept") == pytest.approx(-0.25)
    plain = compare(with_rows({}, 0), with_rows({}, 1), n_resamples=20).summary
    shared = found.summary.merge(plain, on=["set", "metric"], suffixes=("", "_plain"))
    assert len(shared) == len(plain) and (shared.value == shared.value_plain).all()


def test_what_no_judge_has_seen_is_not_there():
    metrics = set(compare(with_rows({}, 0), with_rows({}, 1), n_resamples=20).summary.metric)
    assert not any(tag in name for name in metrics for tag in ("judge", "open", "letter"))
    lettered = set(compare(with_rows(LETTERS, 0), with_rows(LETTERS, 1), n_resamples=20).summary.metric)
    extra = {"efficacy_letter", "specificity_letter", "harmonic_letter", "letter_correct", "delta_letter_correct"}
    assert lettered - metrics == extra  # the paper's final score needs judged coherence


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_missing_verdicts_are_nan_and_never_0():
    missing = {key: (base, [np.nan] * 4) for key, (base, _) in JUDGED.items()}
    found = compare(with_rows(missing, 0), with_rows(missing, 1), n_resamples=20)
    for name in (
        "efficacy_open",
        "specificity_open",
        "harmonic_open",
        "coherence_judged",
        "final_judged",
        "final_open",
    ):
        assert np.isnan(found.value(name)), name
    assert np.isnan(found.value("open_correct", "concept_open"))
    assert found.value("final") == compare(with_rows({}, 0), with_rows({}, 1), n_resamples=20).value("final")
    one = {**JUDGED, "concept_open/open_correct": ([1, 1, 1, 1], [1, np.nan, 0, 0])}
    assert compare(with_rows(one, 0), with_rows(one, 1), n_resamples=20).value("efficacy_open") == pytest.approx(2 / 3)


def test_files_are_whole_or_absent_after_an_interrupted_write(endpoint, cache, monkeypatch):
    def broken(self: Path, *_: object, **__: object) -> None:
        raise OSError("disk full")

    judge = judge_for(endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", broken)
        with pytest.raises(OSError, match="disk full"):
            judge.ask("a", parsed)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert judge.ask("a", parsed).values == {"correct": True}
