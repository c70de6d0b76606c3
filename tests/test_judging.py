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
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from helpers.items import make_items
from helpers.suites import blank, suite_of, talkative
from helpers.tiny import make_concept, make_loaded

from ember.errors import DamagedFileError, EmberError
from ember.evaluation.evaluate import evaluate
from ember.evaluation.metrics import Comparison, compare, harmonic_mean
from ember.features import concept_features
from ember.judging import grading
from ember.judging.client import Judge, open_judge
from ember.judging.grading import judge_features, judge_open_answers, judged_scores, top_tokens
from ember.judging.replies import Verdict
from ember.judging.settings import JudgeConfig, deciding
from ember.models.loading import weights_hash
from ember.store.paths import REPOSITORY

KEY = "sk-very-secret-0123456789"
VARIABLE = "EMBER_TEST_JUDGE_KEY"
QUICK = {"backoff": 0.01, "max_wait": 2.0, "timeout": 0.3, "retries": 2, "rereads": 2}
YES = {"correct": True}


def reply(text: str, **more) -> tuple[int, dict, bytes]:
    """Status, headers and body of a chat completion."""
    body = {"model": "served-1", "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return 200, {}, json.dumps({**body, "usage": {"total_tokens": 10}, **more}).encode()


def failure(status: int, text: str = "no", **headers: str) -> tuple[int, dict, bytes]:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, text.encode()


class Handler(BaseHTTPRequestHandler):
    log_message = Mock()

    def do_POST(self) -> None:
        at, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        with at.lock:
            at.times.append(time.monotonic())
            at.requests.append({"path": self.path, "key": self.headers["authorization"], **body})
            step = at.script.pop(0) if at.script else reply(at.answer(body["messages"][0]["content"]))
        if step == "hang":
            time.sleep(0.6)
        if step in ("hang", "drop"):
            self.close_connection = True
            return
        status, headers, content = step
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Endpoint(ThreadingHTTPServer):
    """A chat-completions endpoint: plays ``script`` once, then answers by ``answer(prompt)``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}/v1", threading.Lock()
        self.answer: Callable[[str], str] = lambda prompt: '{"correct": true}'
        self.script, self.requests, self.times = [], [], []

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@pytest.fixture
def endpoint(cache, monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Endpoint() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield made
        made.shutdown()


def settings_for(endpoint: Endpoint, **changes) -> dict:
    return {"base_url": endpoint.url, "model": "judge-1", "key_variable": VARIABLE, **QUICK, **changes}


def judge_for(endpoint: Endpoint, **changes) -> Judge:
    return Judge(JudgeConfig(**settings_for(endpoint, **changes)))


def parsed(text: str) -> dict:
    if "correct" in (values := json.loads(text)):
        return values
    raise ValueError("no 'correct'")


def ask(judge: Judge, prompt: str = "a") -> Verdict:
    return judge.ask_all([prompt], parsed)[0]


def files_of(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("change", "said"), [
    ({"base_url": "localhost:11434/v1"}, "'base_url': must start with http:// .*'localhost:11434/v1'"),
    ({"base_url": "ftp://x/v1"}, "'base_url': must start with http"),
    ({"model": " "}, "'model': expected text, got ' '"), ({"model": 4}, "'model': expected text, got 4"),
    *(({key: 0}, f"'{key}': expected greater than 0, got 0") for key in ("timeout", "concurrency", "max_calls")),
    ({"timeout": "1e1"}, "'timeout': expected a valid number, got '1e1'"),
    ({"retries": -1}, "'retries': expected greater than or equal to 0, got -1"),
    ({"rereads": 1.5}, "'rereads': expected a valid integer.*1.5"),
    ({"max_tokens": True}, "'max_tokens': .* got True"),
    ({"required": 1}, "'required': expected a valid boolean, got 1"),
    ({"options": {"temperature": 1}}, "'options': must be a mapping without model.*'temperature': 1"),
    ({"modell": "m"}, "unknown setting in the judge 'modell'; known: .*model"),
    *(({name: value}, f"'{name}': .* environment variable") for name, value in (
        ("base_url", f"http://user:{KEY}@x/v1"), ("base_url", f"http://x/v1?key={KEY}"), ("key_variable", KEY))),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name_and_a_key_among_them_is_not_repeated(change, said):
    settings = {"base_url": "http://localhost/v1", "model": "m", **change}
    with pytest.raises(EmberError, match=said) as caught:
        open_judge(settings)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    if "modell" not in change:
        with pytest.raises(ValueError, match=next(iter(change))) as direct:
            JudgeConfig(**settings)
        assert KEY not in str(direct.value)


def test_a_request_is_a_chat_completion_at_temperature_0_with_the_key_if_there_is_one(endpoint):
    judge = judge_for(endpoint, options={"reasoning_effort": "none"})
    assert ask(judge, "Is it?") == Verdict(YES, '{"correct": true}', "", "served-1", cached=False)
    (request,) = endpoint.requests
    assert request == {
        "path": "/v1/chat/completions", "key": f"Bearer {KEY}", "model": "judge-1", "temperature": 0, "max_tokens": 300,
        "messages": [{"role": "user", "content": "Is it?"}], "reasoning_effort": "none",
    }  # fmt: skip
    assert (judge.calls, judge.tokens) == (1, 10)
    ask(judge_for(endpoint, key_variable=""), "Without a key?")
    assert endpoint.requests[1]["key"] is None


def test_a_question_is_asked_once_by_all_processes_and_anew_where_the_reply_could_differ(endpoint):
    first = judge_for(endpoint).ask_all(["a", "b", "a"], parsed)
    again = judge_for(endpoint, retries=0, max_calls=1).ask_all(["b", "a"], parsed)
    assert [v.values for v in [*first, *again]] == [YES] * 5
    assert all(v.cached for v in again) and not any(v.cached for v in first)
    code = f"import json; from ember.judging.client import open_judge; judge = open_judge({settings_for(endpoint)})"
    command = [sys.executable, "-c", f"{code}; print(judge.ask_all(['a'], json.loads), judge.calls)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "cached=True" in done.stdout and done.stdout.strip().endswith("0")
    assert sorted(endpoint.prompts) == ["a", "b"]
    other = {"base_url": endpoint.url.replace("/v1", "/v2")}
    for count, change in enumerate([{"model": "judge-2"}, {"reply_tokens": 50}, {"options": {"seed": 1}}, other], 3):
        assert not ask(judge_for(endpoint, **change)).cached and len(endpoint.requests) == count


def test_an_interrupted_write_leaves_no_entry_and_a_damaged_entry_is_named_and_not_read(endpoint, cache, monkeypatch):
    judge = judge_for(endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", Mock(side_effect=OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            ask(judge)
    assert not files_of(cache) and ask(judge).values == YES
    (entry,) = files_of(cache)
    whole = entry.read_text()
    for damaged in (whole[:-20], whole.replace("true", "false"), "{}", "[]"):
        entry.write_text(damaged)
        with pytest.raises(DamagedFileError, match=str(entry)):
            ask(judge)
    entry.unlink()
    assert ask(judge).values == YES


@pytest.mark.parametrize("step", [*map(failure, (429, 500, 503, 408)), "hang", "drop"], ids=str)
def test_a_failure_that_passes_is_tried_again_and_one_that_lasts_ends_after_the_retries(endpoint, step):
    endpoint.script = [step]
    assert ask(judge_for(endpoint)).values == YES
    endpoint.script = [step] * 9
    with pytest.raises(EmberError, match=r"gave no answer in 3 attempts"):
        ask(judge_for(endpoint), "b")
    assert endpoint.prompts == ["a", "a", "b", "b", "b"]


def test_waits_grow_the_endpoint_s_own_is_kept_and_a_refusal_or_too_long_a_wait_ends_at_once(endpoint):
    endpoint.script = [failure(500)] * 3
    ask(judge_for(endpoint, retries=3, backoff=0.1))
    waits = np.diff(endpoint.times)
    assert (waits >= [0.1, 0.2, 0.4]).all() and waits.max() < 1
    for status in (429, 503):
        # A date has no fractions of seconds, so two seconds ahead are one at least.
        for stated, least in ((formatdate(time.time() + 2, usegmt=True), 0.9), ("0.4", 0.4)):
            endpoint.script = [failure(status, Retry_After=stated)]
            ask(judge_for(endpoint, max_wait=5.0), f"{status} {stated}")
            assert np.diff(endpoint.times)[-1] >= least
    with pytest.raises(EmberError, match=r"127\.0\.0\.1:9/v1/chat/completions gave no answer in 3 attempts.* Connect"):
        ask(judge_for(endpoint, base_url="http://127.0.0.1:9/v1"))  # nobody listens
    endpoint.requests.clear()
    refused = r"refuses the request for judge-1: {} bad key \[key\].*{}"
    advice = ((400, "options"), (401, VARIABLE), (403, "its terms"), (404, "base_url"), (301, ""))
    steps = [(failure(status, f"bad key {KEY}"), refused.format(status, told)) for status, told in advice]
    wait = "asks to wait 3600 s, and max_wait is 2 s: 429 daily quota"
    for count, (step, said) in enumerate([*steps, (failure(429, "daily quota", Retry_After="3600"), wait)], 1):
        endpoint.script = [step]
        with pytest.raises(EmberError, match=said):
            ask(judge_for(endpoint), "b")
        assert len(endpoint.requests) == count


def test_nonsense_is_asked_again_with_what_was_wrong_and_then_missing_with_the_reason(endpoint, cache):
    bodies = [(200, {}, body) for body in (b"<html>", b"[1]", b'{"choices": []}')]
    for step in (*map(reply, ("I think so.", '{"right": true}', "")), *bodies):
        endpoint.script, judge, before = [step] * 3, judge_for(endpoint), len(endpoint.requests)
        verdict = ask(judge, str(step))
        assert verdict.values == {} and np.isnan(verdict.value("correct")), step
        assert verdict.reason.startswith("not readable in 3 attempts: ") and len(endpoint.requests) == before + 3
    assert not files_of(cache) and ask(judge, str(step)).values == YES  # asked anew next time
    # A reply that is no Unicode can be kept.
    endpoint.script, judge = [reply('{"right": 1}'), reply('{"correct": true, "why": "\ud800"}')], judge_for(endpoint)
    assert ask(judge).values == ask(judge).values == {"correct": True, "why": "?"}
    user, assistant, told = endpoint.requests[-1]["messages"]
    assert (user["content"], assistant["content"]) == ("a", '{"right": 1}')
    assert "no 'correct'" in told["content"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_budget_in_calls_or_tokens_stops_before_the_call_that_could_exceed_it(endpoint, concurrency):
    with pytest.raises(EmberError, match="max_calls=3 is spent"):
        judge_for(endpoint, max_calls=3, concurrency=concurrency).ask_all(list("abcdefgh"), parsed)
    assert len(endpoint.requests) == 3
    # What was answered is kept: a larger budget goes on from there.
    assert len(judge_for(endpoint, max_calls=5).ask_all(list("abcdefgh"), parsed)) == 8
    assert sorted(endpoint.prompts) == list("abcdefgh")
    endpoint.script = [failure(500)] * 9  # what is tried again counts too
    with pytest.raises(EmberError, match="max_calls=2"):
        ask(judge_for(endpoint, max_calls=2), "i")
    assert len(endpoint.requests) == 8 + 2
    # Each call may take 10 + 20 // 2 tokens and takes 10; as many as it may where the endpoint does not state them.
    endpoint.script = []
    judge = judge_for(endpoint, max_tokens=45, reply_tokens=10, concurrency=1)
    with pytest.raises(EmberError, match=r"max_tokens=45 \(30 tokens used, 20 more possible\)"):
        judge.ask_all([letter * 20 for letter in "abcdefgh"], parsed)
    assert len(endpoint.requests) == 10 + 3 and judge.tokens == 30
    for letter, usage in zip("ijkl", (None, {}, {"total_tokens": -1}, {"total_tokens": "many"}), strict=True):
        endpoint.script, judge = [reply('{"correct": true}', usage=usage)], judge_for(endpoint, reply_tokens=10)
        ask(judge, letter * 20)
        assert judge.tokens == 20, usage


def test_the_key_is_nowhere_but_in_the_request_and_one_that_cannot_be_is_an_error(endpoint, cache, monkeypatch):
    """Not even where the endpoint repeats it."""
    endpoint.script = [reply(json.dumps({"correct": True, "echo": KEY})), failure(429, KEY), failure(401, KEY)]
    judge = judge_for(endpoint)
    shown = [repr(judge), repr(judge.config), repr(vars(judge.config)), repr(judge.settings), repr(ask(judge))]
    with pytest.raises(EmberError) as caught:
        ask(judge, "b")
    shown += [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    files = files_of(cache)
    assert files and all(KEY not in text for text in [*shown, *(path.read_text() for path in files)])
    assert endpoint.requests[0]["key"] == f"Bearer {KEY}"
    for key in ("", "  ", "secret\nkey", "geheim€"):
        monkeypatch.setenv(VARIABLE, key)
        with pytest.raises(EmberError, match=VARIABLE) as caught:
            judge_for(endpoint)
        assert not key.strip() or key not in str(caught.value)


def test_without_a_key_there_is_one_note_and_no_judge_and_a_required_one_must_answer(endpoint, monkeypatch):
    assert open_judge({}) is None and isinstance(open_judge(settings_for(endpoint)), Judge) and not endpoint.requests
    for count, step in enumerate((failure(401), (200, {}, b"<html>")), 1):
        endpoint.script = [reply("ready"), step]
        assert isinstance(open_judge(settings_for(endpoint, required=True)), Judge)
        with pytest.raises(EmberError, match=endpoint.url):
            open_judge(settings_for(endpoint, required=True))
        assert len(endpoint.requests) == 2 * count
    monkeypatch.delenv(VARIABLE)
    with pytest.warns(UserWarning, match=rf"{VARIABLE}.*Judged scores will be missing") as noted:
        assert open_judge(settings_for(endpoint)) is None
    with pytest.raises(EmberError, match=rf"{VARIABLE}.*take judge\.required or the judge out of the profile"):
        open_judge(settings_for(endpoint, required=True))
    assert len(noted) == 1 and len(endpoint.requests) == 4
    # A key that arrives makes results stale, a larger budget does not.
    without = deciding(settings_for(endpoint))
    monkeypatch.setenv(VARIABLE, KEY)
    before = deciding(settings_for(endpoint))
    assert deciding(settings_for(endpoint, max_calls=7, retries=9)) == before != without
    assert deciding(settings_for(endpoint, model="other")) != before


def test_open_answers_are_right_wrong_or_missing_and_coherence_is_two_scores(endpoint):
    questions = [q for q in make_concept().questions if q.split == "test"][:2]
    questions[0] = replace(questions[0], answer="Rome {x}", aliases=("Roma",))
    for text, value in (
        ('{"correct": true}', 1.0), ('```json\n{"correct": false}\n```', 0.0), ('{"correct": 1}', np.nan),
        ('<think>{"correct": true}?</think>The {answer} is wrong: {"correct": false}', 0.0),
        ('{"correct": "yes"}', np.nan), ("yes", np.nan),
    ):  # fmt: skip
        endpoint.answer = lambda prompt, text=text: text
        judged = judge_open_answers(judge_for(endpoint, model=text), questions, ["in {Gaul}", ""])
        wanted = [("concept_open", q.id, "open_correct", value) for q in questions]
        pd.testing.assert_frame_equal(judged.items, pd.DataFrame(wanted, columns=judged.items.columns))
        assert (judged.verdicts.reason != "").tolist() == [np.isnan(value)] * 2
        row = judged.verdicts.iloc[0]
        assert all(part in row.prompt for part in (questions[0].question, "Rome {x} / Roma", "in {Gaul}"))
        assert row.prompt in endpoint.prompts and (row.reply, row.judge) == (text, "open")
        assert (row.model, row.endpoint) == (text, f"{endpoint.url}/chat/completions")
        told = ("", {}) if np.isnan(value) else ("served-1", {"correct": bool(value)})
        assert (row.served_by, json.loads(row["values"])) == told
        assert json.loads(row.settings) == {"temperature": 0, "reply_tokens": 300, "options": {}}
        assert judged.verdicts.columns.tolist() == grading.no_verdicts().columns.tolist()
    # Coherence has two scores of 0 to 2 or none.
    bad = [f'{{"instruction": {value}, "fluency": 1}}' for value in ("3", "-1", "1.5", "true", "NaN")]
    good = {'{"instruction": 2, "fluency": 0}': (2, 0), '{"instruction": 1.0, "fluency": 2}': (1, 2)}
    responses = pd.DataFrame({"item": ["i"], "prompt": ["Say yes."], "text": ["Yes."]})
    for text in (*good, *bad, '{"instruction": 1}'):
        endpoint.answer = lambda prompt, text=text: text
        items = grading.judge_coherence(judge_for(endpoint, model=text), responses).items
        assert items.metric.tolist() == ["judge_instruction", "judge_fluency"] and set(items.set) == {"generation"}
        np.testing.assert_array_equal(items.value, good.get(text, (np.nan, np.nan)), err_msg=text)


def test_features_are_accepted_with_a_confidence_of_85_percent_by_their_most_active_tokens(endpoint):
    features = concept_features(make_loaded(), make_concept(), rank=4, sparsity=0.3, max_iter=20)
    for about, confidence, accepted in ((True, 0.85, 1), (True, 0.84, 0), (False, 0.99, 0), (True, 1.2, np.nan)):
        described = {}

        def answer(prompt: str, about=about, confidence=confidence, described=described) -> str:
            if "<tokens>" in prompt:
                described[prompt] = f"words number {len(described)}"
                return json.dumps({"description": described[prompt]})
            assert any(text in prompt for text in described.values()) and "Tiny Rome" in prompt
            return json.dumps({"about": about, "confidence": confidence})

        endpoint.answer = answer
        judged = judge_features(judge_for(endpoint, model=str((about, confidence))), "Tiny Rome", features, [2, 0])
        rows = judged.items.set_index(["item", "metric"]).value
        np.testing.assert_array_equal([rows["2", "accepted"], rows["0", "accepted"]], [accepted] * 2)
        assert grading.accepted_features(judged) == ([2, 0] if accepted == 1 else [])
        table = features.scores.merge(grading.feature_verdicts(judged), how="left", on="feature").set_index("feature")
        np.testing.assert_array_equal(table.judge_accepted[[2, 0]], [accepted] * 2)
        assert table.judge_confidence.notna().sum() == (0 if np.isnan(accepted) else 2)
        assert judged.verdicts.judge.tolist() == ["describe"] * 2 + ["about"] * 2
    first = next(prompt for prompt in endpoint.prompts if "<tokens>" in prompt)
    assert any(repr(top_tokens(features, k)[0]) in first for k in (0, 2))
    G = features.factorization.G[:, 1].abs()
    place = {token: k for k, token in enumerate(features.table.token)}
    activations = [float(G[place[token]]) for token in top_tokens(features, 1, count=5)]
    assert activations == sorted(activations, reverse=True) and activations[0] == float(G.max())
    assert 0 < len(top_tokens(features, 1, count=10**6)) == int((G > 0).sum())
    before = len(endpoint.prompts)  # without a description, a feature is missing
    endpoint.answer = lambda prompt: "hm" if "<tokens>" in prompt else "never asked"
    judged = judge_features(judge_for(endpoint), "Tiny Rome", features, [1])
    assert judged.items.value.isna().all() and judged.items.metric.tolist() == ["about", "confidence", "accepted"]
    assert endpoint.prompts[before:] and all("<tokens>" in prompt for prompt in endpoint.prompts[before:])


def verdict_on(prompt: str) -> str:
    """By the answer's length, so that other answers get other verdicts."""
    parity = len(prompt.split("<answer>")[-1]) % 2
    return json.dumps({"correct": not parity} if "<reference>" in prompt else {"instruction": 1 + parity, "fluency": 2})


# Two open answers a set and two generations are left to a judge.
ASKING = {"open_answers": 2, "judge": True, "generations": 2, "questions": 3, "instructions": 2, "letters": True}


def test_an_evaluation_with_a_judge_is_of_the_edited_model_and_sizes_of_nothing_get_nothing(endpoint, tiny):
    empty = judged_scores(tiny, suite_of(), "test", judge_for(endpoint))
    assert empty.items.empty and empty.verdicts.empty and not endpoint.requests
    with pytest.raises(ValueError, match="split must be one of"):
        judged_scores(tiny, suite_of(), "dev", judge_for(endpoint))
    endpoint.answer = verdict_on
    tiny, suite, judge = talkative(tiny), suite_of(**ASKING), judge_for(endpoint)
    edit = blank(tiny, " Romans", " the")
    base, after = (judged_scores(tiny, suite, "test", judge, chosen) for chosen in (None, edit))
    with edit.applied(tiny):
        inside = judged_scores(tiny, suite, "test", judge)
    pd.testing.assert_frame_equal(after.items, inside.items)
    assert base.verdicts.prompt.tolist() != after.verdicts.prompt.tolist() == inside.verdicts.prompt.tolist()
    assert weights_hash(tiny.model) == tiny.weights_hash
    assert after.items.columns.tolist() == ["set", "item", "metric", "value"]
    assert after.items.value_counts(["set", "metric"]).to_dict() == {
        ("concept_open", "open_correct"): 2, ("simdom_open", "open_correct"): 2,
        ("generation", "judge_instruction"): 2, ("generation", "judge_fluency"): 2,
    }  # fmt: skip
    plain = evaluate(tiny, suite, "test", edit)
    given = judged_scores(tiny, suite, "test", judge, edit, responses=plain.samples)
    pd.testing.assert_frame_equal(given.items, after.items)
    with pytest.raises(ValueError, match="responses are not those"):
        judged_scores(tiny, suite, "test", judge, edit, responses=plain.samples.assign(item="other"))


def test_chat_prompts_of_open_answers_have_one_bos(endpoint, monkeypatch):
    generate = Mock(side_effect=lambda loaded, prompts, **_: [[5]] * len(prompts))
    monkeypatch.setattr("ember.judging.grading.generate_greedy", generate)
    judged_scores(make_loaded(bos=True), suite_of(**ASKING), "test", judge_for(endpoint, rereads=0))
    seen = [ids for call in generate.call_args_list for ids in call.args[1]]
    assert len(seen) == 6 and all(ids.count(1) == 1 and ids[0] == 1 for ids in seen)


# Scores before and after, of which a comparison makes the paper's.
JUDGED = {
    "concept_open/open_correct": (1, [1, 0, 0, 0]), "simdom_open/open_correct": ([1, 1, 0, 0], [1, 1, 1, 0]),
    "generation/judge_instruction": (2, 1), "generation/judge_fluency": (1, 2),
}  # fmt: skip
LETTERS = {
    f"{name}/letter_correct": ([1, 1, 1, 0], after)
    for name, after in (("concept", [1, 1, 0, 0]), ("simdom", [1, 1, 1, 0]), ("general", 1))
}


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_judged_and_lettered_scores_are_the_paper_s_formulas_and_missing_verdicts_are_nan_and_never_0():

    def compared(extra: dict) -> Comparison:
        sides = (make_items({key: both[side] for key, both in extra.items()}) for side in (0, 1))
        return compare(*sides, n_resamples=20)

    plain, found, coherence = compared({}), compared(JUDGED | LETTERS), harmonic_mean(0.5, 1.0)
    wanted = {
        "efficacy_letter": 0.5, "specificity_letter": 1,  # (0.5 - 0.25) / (0.75 - 0.25) is left
        "efficacy_open": 0.75,  # min(1, 0.25 / 1) is left
        "specificity_open": 1,  # min(1, 0.75 / 0.5), and general questions by letter
        "coherence_judged": coherence, "final_letter": harmonic_mean(0.5, 1.0, coherence),
        "final_open": harmonic_mean(0.75, 1.0, coherence),
        "final_judged": harmonic_mean(found.value("efficacy"), found.value("specificity"), coherence),
    }  # fmt: skip
    assert [found.value(name) for name in wanted] == pytest.approx([float(value) for value in wanted.values()])
    assert found.value("delta_letter_correct", "concept") == pytest.approx(-0.25)
    shared = found.summary.merge(plain.summary, on=["set", "metric"], suffixes=("", "_plain"))
    assert len(shared) == len(plain.summary) and (shared.value == shared.value_plain).all()
    # What no judge has seen is not there.
    metrics = set(plain.summary.metric)
    assert not any(tag in name for name in metrics for tag in ("judge", "open", "letter"))
    extra = {"efficacy_letter", "specificity_letter", "harmonic_letter", "letter_correct", "delta_letter_correct"}
    assert set(compared(LETTERS).summary.metric) - metrics == extra  # the final score needs judged coherence
    found = compared({key: (base, np.nan) for key, (base, _) in JUDGED.items()})
    names = ("efficacy_open", "specificity_open", "harmonic_open", "coherence_judged", "final_judged", "final_open")
    assert all(np.isnan(found.value(name)) for name in names)
    assert np.isnan(found.value("open_correct", "concept_open")) and found.value("final") == plain.value("final")
    one = compared(JUDGED | {"concept_open/open_correct": (1, [1, np.nan, 0, 0])})
    assert one.value("efficacy_open") == pytest.approx(2 / 3)
