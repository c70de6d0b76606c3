"""A client of OpenAI-compatible chat-completions endpoints (Gemini's, vLLM, Ollama, …) that serves as a judge.

Replies are kept on disk, requests are counted against a budget, and failures that pass are tried again.
"""

import email.utils
import hashlib
import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from ember.errors import DamagedFileError, EmberError
from ember.judging.settings import JudgeConfig
from ember.store.files import write_text
from ember.store.paths import cache_dir
from ember.store.progress import bar

TEMPERATURE = 0.0
_ADVICE = {
    400: "The endpoint does not take the request: check the judge's model, reply_tokens and options.",
    401: "Check the key in {key}.",
    402: "The account behind {key} has no credit.",
    403: "The key in {key} may not use this model: accept its terms, or choose another.",
    404: "Check base_url (it usually ends in /v1) and the model's name.",
}
Read = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What was read from a reply: ``values``, or none of them and the ``reason``. ``served_by`` names the model."""

    values: Mapping[str, Any]
    reply: str
    reason: str = ""
    served_by: str = ""
    cached: bool = False

    def value(self, name: str) -> float:
        """One of the values as a number; NaN where the reply could not be read."""
        return float(self.values.get(name, float("nan")))


class _Passing(Exception):
    """A failure that may be gone at the next attempt; ``wait`` is what the endpoint asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Judge:
    """Asks one prompt at a time or many, at temperature 0.

    Raises
    ------
    EmberError
        On construction, if the environment variable of the key is empty or cannot be a key.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.calls = self.tokens = self.hits = 0
        self._reserved = 0
        self._lock = Lock()
        self._key = os.environ.get(config.key_variable, "").strip() if config.key_variable else ""
        if config.key_variable and not self._key:
            missing = f"the environment variable {config.key_variable}, which is empty"
            raise EmberError(f"the judge {config.model} needs a key in {missing}")
        if not self._key.isascii() or not self._key.isprintable():
            raise EmberError(f"{config.key_variable} holds characters that no key has")

    def about(self) -> dict[str, Any]:
        """The endpoint, model and settings of the replies, and what they cost; for the record."""
        spent = {"calls": self.calls, "tokens": self.tokens, "from_cache": self.hits}
        return {**self._settings(), **spent}

    def probe(self) -> None:
        """Send one short request, whatever is in the cache; fail as ``ask`` does."""
        with self._client() as client:
            body = self._send(client, [{"role": "user", "content": "Reply with the word: ready"}])
        try:
            self._content(body)
        except ValueError as error:
            raise EmberError(f"{self.config.url} cannot serve as a judge: {error}") from None

    def ask(self, prompt: str, read: Read) -> Verdict:
        """One verdict; see ``ask_all``."""
        return self.ask_all([prompt], read)[0]

    def ask_all(self, prompts: Sequence[str], read: Read, *, progress: bool = False) -> list[Verdict]:
        """One verdict a prompt, from the cache or the endpoint.

        ``read`` makes values of a reply, or raises ``ValueError`` with the reason; then the model is told and asked
        again, at most ``rereads`` times. Only replies that could be read are kept.

        Raises
        ------
        EmberError
            If the next request could exceed the budget (replies so far are kept), the endpoint refuses a request, or
            failures last.
        DamagedFileError
            If an entry of the cache is not what was written; the message names it.
        """
        with self._client() as client, ThreadPoolExecutor(self.config.concurrency) as pool:
            waiting = {prompt: pool.submit(self._ask, client, prompt, read) for prompt in dict.fromkeys(prompts)}
            try:
                for task in bar(waiting.values(), show=progress, desc=f"judge {self.config.model}"):
                    task.result()
                return [waiting[prompt].result() for prompt in prompts]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, client: httpx.Client, prompt: str, read: Read) -> Verdict:
        asked = self._settings() | {"prompt": prompt}
        entry = _entry_path(asked)
        if entry.exists():
            kept = _read_entry(entry, asked, read)
            with self._lock:
                self.hits += 1
            return kept
        messages = [{"role": "user", "content": prompt}]
        reply = reason = ""
        for _ in range(1 + self.config.rereads):
            body = self._send(client, messages)
            try:
                reply = self._content(body)
                values = dict(read(reply))
            except ValueError as error:
                reason = str(error)
                # At temperature 0 the same question would bring the same reply.
                again = f"That reply could not be read: {reason}. Reply again, with the JSON object alone."
                said = [{"role": "assistant", "content": reply}] if reply else []
                messages = [{"role": "user", "content": prompt}, *said, {"role": "user", "content": again}]
                messages = messages if said else messages[:1]
                continue
            served_by = self._scrubbed(str(body.get("model", "")))
            _write_entry(entry, {"asked": asked, "reply": reply, "served_by": served_by})
            return Verdict(values, reply, served_by=served_by)
        return Verdict({}, reply, reason=f"not readable in {1 + self.config.rereads} attempts: {reason}")

    def _settings(self) -> dict[str, Any]:
        """What a reply depends on beside its prompt."""
        c = self.config
        return {
            "endpoint": c.url, "model": c.model, "temperature": TEMPERATURE, "reply_tokens": c.reply_tokens,
            "options": dict(c.options),
        }  # fmt: skip

    def _client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.Client(headers=headers, timeout=self.config.timeout)

    def _scrubbed(self, text: str) -> str:
        """Without the key, which some endpoints repeat (placeholders such as "EMPTY" are no secret), as valid UTF-8."""
        text = text.replace(self._key, "[key]") if len(self._key) >= 8 else text
        return text.encode(errors="replace").decode()

    def _content(self, body: Mapping[str, Any]) -> str:
        """The text of a reply; a ``ValueError`` if there is none."""
        try:
            choice = body["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError("the endpoint's answer holds no choices[0].message.content") from None
        if not isinstance(text, str) or not text.strip():
            ended = f" (finish_reason {choice.get('finish_reason')!r}; reply_tokens is {self.config.reply_tokens})"
            raise ValueError(f"the reply is empty{ended}")
        return self._scrubbed(text)

    def _send(self, client: httpx.Client, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The endpoint's answer to one conversation, after as many attempts as it takes."""
        attempts = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_attempt(1 + self.config.retries),
            wait=self._wait,
            reraise=True,
        )
        try:
            return attempts(self._attempt, client, messages)
        except _Passing as error:
            count = 1 + self.config.retries
            raise EmberError(f"{self.config.url} gave no answer in {count} attempts; the last: {error}") from None

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: at least what the endpoint asks for."""
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, _Passing) else None
        if asked is not None and asked > self.config.max_wait:
            limit = f"max_wait is {self.config.max_wait:g} s"
            raise EmberError(f"{self.config.url} asks to wait {asked:.0f} s, and {limit}: {error}") from None
        grown = min(self.config.max_wait, self.config.backoff * 2 ** (state.attempt_number - 1))
        # Jitter, so that requests side by side do not all come back at once.
        return max(grown, asked or 0.0) + random.uniform(0.0, self.config.backoff)

    def _attempt(self, client: httpx.Client, messages: list[dict[str, str]]) -> dict[str, Any]:
        config = self.config
        # Two characters a token is more tokens than nearly any text has.
        expected = sum(len(message["content"]) for message in messages) // 2 + config.reply_tokens
        self._reserve(expected)
        spent = 0
        try:
            sent = {"model": config.model, "messages": messages, "temperature": TEMPERATURE}
            response = client.post(config.url, json=sent | {"max_tokens": config.reply_tokens} | dict(config.options))
            if response.is_success:
                body = _json(response)
                spent = _used(body, expected)
                return body
        except httpx.RequestError as error:
            spent = expected if isinstance(error, httpx.ReadTimeout) else 0  # what timed out may still be charged
            raise _Passing(self._scrubbed(f"{type(error).__name__}: {error}")) from None
        finally:
            with self._lock:
                self._reserved -= expected
                self.tokens += spent
        status, said = response.status_code, self._scrubbed(" ".join(response.text.split()))[:300]
        if status in (408, 425, 429) or status >= 500:
            raise _Passing(f"{status} {said}", _retry_after(response))
        advice = _ADVICE.get(status, "").format(key=config.key_variable or "key_variable (none is set)")
        raise EmberError(f"{config.url} refuses the request for {config.model}: {status} {said}. {advice}".rstrip())

    def _reserve(self, tokens: int) -> None:
        """Count a request and set its tokens aside, or stop."""
        calls, limit = self.config.max_calls, self.config.max_tokens
        with self._lock:
            if calls is not None and self.calls + 1 > calls:
                raise EmberError(f"the judge's budget of max_calls={calls} is spent. {_RESUME}")
            if limit is not None and self.tokens + self._reserved + tokens > limit:
                used = f"{self.tokens} tokens used, {self._reserved + tokens} more possible"
                raise EmberError(f"the next call could exceed the judge's max_tokens={limit} ({used}). {_RESUME}")
            self.calls += 1
            self._reserved += tokens


def open_judge(settings: Mapping[str, Any]) -> Judge | None:
    """The judge of a profile; None if it names none (``{}``), or no key is in the environment.

    In the latter case a warning says so once, and judged scores are missing. With ``required: true`` the judge is also
    asked one short question, so that a wrong key or address shows before any work is done.

    Raises
    ------
    EmberError
        If the judge is required and there is no key, or it does not answer.
    """
    if not settings:
        return None
    config = JudgeConfig(**settings)
    try:
        judge = Judge(config)
    except EmberError as error:
        if config.required:
            advice = "Set it, or take judge.required or the judge out of the profile: then judged scores are missing"
            raise EmberError(f"{error}. {advice}") from None
        warnings.warn(f"{error}. Judged scores will be missing; all others are reported", stacklevel=2)
        return None
    if config.required:
        judge.probe()
    return judge


_RESUME = "Replies so far are kept: raise the budget and run again"


def _json(response: httpx.Response) -> dict[str, Any]:
    """The body of a success; an empty mapping, which holds no reply, if it is no JSON object."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _used(body: Mapping[str, Any], expected: int) -> int:
    """Tokens that a call has used; what was expected if the endpoint does not say."""
    usage = body.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and total >= 0 else expected


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the endpoint asks to wait, given as a number or a date."""
    stated = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", stated):
        return float(stated)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(stated).timestamp() - time.time())
    except ValueError:
        return None


def _entry_path(asked: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "judge" / key[:2] / f"{key}.json"


def _seal(kept: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _write_entry(path: Path, kept: Mapping[str, Any]) -> None:
    write_text(path, json.dumps({**kept, "sha256": _seal(kept)}, indent=1, ensure_ascii=False) + "\n")


def _read_entry(path: Path, asked: Mapping[str, Any], read: Read) -> Verdict:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("sha256") != _seal(kept) or kept["asked"] != asked:
            raise ValueError("it is not what was written")
        return Verdict(dict(read(kept["reply"])), kept["reply"], served_by=kept["served_by"], cached=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"the judge's reply in {path} is damaged ({error}). Delete the file") from error
