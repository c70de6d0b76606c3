"""A client of OpenAI-compatible chat-completions endpoints (Gemini's, vLLM, Ollama, …) that serves as a judge.

Replies are kept on disk, requests are counted against a budget, and failures that pass are tried again.
"""

import os
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from threading import Lock
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from ember.errors import EmberError
from ember.judging.replies import Entry, Read, Verdict, content, used
from ember.judging.settings import JudgeConfig
from ember.store.progress import bar
from ember.store.validated import validated

TEMPERATURE = 0.0
_RESUME = "Replies so far are kept: raise the budget and run again"
_ADVICE = {
    400: "The endpoint does not take the request: check the judge's model, reply_tokens and options.",
    401: "Check the key in {key}.",
    402: "The account behind {key} has no credit.",
    403: "The key in {key} may not use this model: accept its terms, or choose another.",
    404: "Check base_url (it usually ends in /v1) and the model's name.",
}


class Judge:
    """Asks prompts, some at a time, at temperature 0. An ``EmberError`` if the key is missing or cannot be one."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.calls = self.tokens = self._reserved = 0
        self._lock = Lock()
        # What a reply depends on beside its prompt.
        self.settings = {
            "endpoint": config.url, "model": config.model, "temperature": TEMPERATURE,
            "reply_tokens": config.reply_tokens, "options": dict(config.options),
        }  # fmt: skip
        self._key = os.environ.get(config.key_variable, "").strip() if config.key_variable else ""
        if config.key_variable and not self._key:
            variable = f"the environment variable {config.key_variable}"
            raise EmberError(f"the judge {config.model} needs a key in {variable}, which is empty")
        if not self._key.isascii() or not self._key.isprintable():
            raise EmberError(f"{config.key_variable} holds characters that no key has")

    def probe(self) -> None:
        """Send one short request, whatever is in the cache; fail as ``ask_all`` does."""
        with self._client() as client:
            body = self._send(client, [{"role": "user", "content": "Reply with the word: ready"}])
        try:
            content(body, self.config.reply_tokens)
        except ValueError as error:
            raise EmberError(f"{self.config.url} cannot serve as a judge: {error}") from None

    def ask_all(self, prompts: Sequence[str], read: Read) -> list[Verdict]:
        """One verdict a prompt, from the cache or the endpoint.

        ``read`` makes values of a reply, or raises ``ValueError`` with the reason; then the model is told and asked
        again, at most ``rereads`` times. Only replies that could be read are kept. An ``EmberError`` if the next
        request could exceed the budget (replies so far are kept), the endpoint refuses a request, or failures last; a
        ``DamagedFileError`` names an entry of the cache that is not what was written.
        """
        different = list(dict.fromkeys(prompts))
        with self._client() as client, ThreadPoolExecutor(self.config.concurrency) as pool:
            # After a failure ``map`` cancels what has not begun.
            asked = pool.map(partial(self._ask, client, read), different)
            shown = bar(asked, total=len(different), desc=f"judge {self.config.model}")
            verdicts = dict(zip(different, shown, strict=True))
        return [verdicts[prompt] for prompt in prompts]

    def _ask(self, client: httpx.Client, read: Read, prompt: str) -> Verdict:
        entry = Entry(self.settings | {"prompt": prompt})
        if entry.path.exists():
            return entry.verdict(read)
        question = {"role": "user", "content": prompt}
        messages, reply, reason = [question], "", ""
        for _ in range(1 + self.config.rereads):
            body = self._send(client, messages)
            try:
                reply = self._scrubbed(content(body, self.config.reply_tokens))
                values = dict(read(reply))
            except ValueError as error:
                reason = str(error)
                # At temperature 0 the same question would bring the same reply.
                again = f"That reply could not be read: {reason}. Reply again, with the JSON object alone."
                said = [{"role": "assistant", "content": reply}, {"role": "user", "content": again}]
                messages = [question, *said] if reply else [question]
            else:
                served_by = self._scrubbed(str(body.get("model", "")))
                entry.write(reply, served_by)
                return Verdict(values, reply, served_by=served_by)
        return Verdict({}, reply, reason=f"not readable in {1 + self.config.rereads} attempts: {reason}")

    def _client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.Client(headers=headers, timeout=self.config.timeout)

    def _scrubbed(self, text: str) -> str:
        """Without the key, which some endpoints repeat (placeholders such as "EMPTY" are no secret), as valid UTF-8."""
        text = text.replace(self._key, "[key]") if len(self._key) >= 8 else text
        return text.encode(errors="replace").decode()

    def _send(self, client: httpx.Client, messages: list[dict[str, str]]) -> Any:
        """The endpoint's answer to one conversation, after as many attempts as it takes."""
        config, count = self.config, 1 + self.config.retries
        stop = stop_after_attempt(count)
        attempts = Retrying(retry=retry_if_exception(_passes), stop=stop, wait=self._wait, reraise=True)
        try:
            return attempts(self._attempt, client, messages)
        except httpx.HTTPError as error:
            said = self._said(error)
            if _passes(error):
                raise EmberError(f"{config.url} gave no answer in {count} attempts; the last: {said}") from None
            advice = _ADVICE.get(int(said[:3]), "").format(key=config.key_variable or "key_variable (none is set)")
            refused = f"{config.url} refuses the request for {config.model}: {said}. {advice}"
            raise EmberError(refused.rstrip()) from None

    def _said(self, error: BaseException) -> str:
        """A failure in one line, which begins with the status if there was an answer."""
        if isinstance(error, httpx.HTTPStatusError):
            text = self._scrubbed(" ".join(error.response.text.split()))
            return f"{error.response.status_code} {text[:300]}"
        return self._scrubbed(f"{type(error).__name__}: {error}")

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: at least what the endpoint asks for."""
        config, error = self.config, state.outcome and state.outcome.exception()
        asked = _retry_after(error.response) if isinstance(error, httpx.HTTPStatusError) else 0.0
        if error and asked > config.max_wait:
            limit = f"max_wait is {config.max_wait:g} s"
            raise EmberError(f"{config.url} asks to wait {asked:.0f} s, and {limit}: {self._said(error)}")
        wait = max(asked, wait_exponential(config.backoff, config.max_wait)(state))
        # Jitter, so that requests side by side do not all come back at once.
        return wait + random.uniform(0, config.backoff)

    def _attempt(self, client: httpx.Client, messages: list[dict[str, str]]) -> Any:
        """The body of a success; None, which holds no reply, if it is no JSON."""
        config, body, spent = self.config, None, 0
        sent = {"model": config.model, "messages": messages, "temperature": TEMPERATURE}
        # Two characters a token is more tokens than nearly any text has.
        expected = sum(len(message["content"]) for message in messages) // 2 + config.reply_tokens
        self._reserve(expected)
        try:
            response = client.post(config.url, json={**sent, "max_tokens": config.reply_tokens, **config.options})
            response.raise_for_status()
            with suppress(ValueError):
                body = response.json()
            spent = used(body, expected)
            return body
        except httpx.ReadTimeout:
            spent = expected  # it may still be charged
            raise
        finally:
            with self._lock:
                self._reserved -= expected
                self.tokens += spent

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


def _passes(error: BaseException) -> bool:
    """Whether a failure may be gone at the next attempt."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.RequestError)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the endpoint asks to wait, given as a number or a date; 0 if it does not say."""
    stated = response.headers.get("retry-after", "")
    with suppress(ValueError):
        return float(stated)
    with suppress(ValueError):
        return parsedate_to_datetime(stated).timestamp() - time.time()
    return 0.0


def open_judge(settings: Mapping[str, Any]) -> Judge | None:
    """The judge of a profile; None if it names none (``{}``), or no key is in the environment.

    In the latter case a warning says so once, and judged scores are missing. With ``required: true`` that is an
    ``EmberError``, and the judge is also asked one short question, so that a wrong key or address shows before any work
    is done. A ``DataError`` or ``UnknownNameError`` names a setting that is missing, wrong or unknown.
    """
    if not settings:
        return None
    config = validated(JudgeConfig, dict(settings), "the judge", word="setting", file="the judge")
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
