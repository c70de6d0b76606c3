"""Which language model judges, where it is asked, and how far to go with it."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ember.store.validated import Strict, Text

_OURS = ("model", "messages", "temperature", "max_tokens", "stream", "n")


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must hold no user, password or query: the key goes into an environment variable")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"must start with http:// or https:// and a host, got {url!r}")
    return url


def _variable(name: str) -> str:
    if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # The value is not shown: a key that was pasted here must not reach a log.
        raise ValueError("must be the name of an environment variable, not the key itself")
    return name


def _others(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if options.keys() & set(_OURS):
        raise ValueError(f"must be a mapping without {', '.join(_OURS)}, got {options!r}")
    return options


class JudgeConfig(Strict):
    """An endpoint, a model, and how far to go with them.

    ``base_url`` is what ``/chat/completions`` is put behind. ``key_variable`` names the environment variable that holds
    the key; empty for endpoints without one. With ``required`` nothing starts unless the judge answers. ``timeout`` is
    in seconds. A failure that may pass (429, 5xx, a time-out, no connection) is tried again ``retries`` times after
    ``backoff`` seconds, doubled each time up to ``max_wait``, or after what the endpoint asks for; a reply that cannot
    be read is asked for again ``rereads`` times. ``max_calls`` (requests sent) and ``max_tokens`` are the budget of one
    notebook run; None sets no limit. ``reply_tokens`` limits each reply and ``options`` holds further fields of the
    request, such as ``reasoning_effort``.
    """

    base_url: Annotated[str, AfterValidator(_address)]
    model: Text
    key_variable: Annotated[str, AfterValidator(_variable)] = ""
    required: bool = False
    timeout: PositiveFloat = 60.0
    retries: NonNegativeInt = 5
    rereads: NonNegativeInt = 2
    backoff: NonNegativeFloat = 1.0
    max_wait: NonNegativeFloat = 120.0
    max_calls: PositiveInt | None = 5000
    max_tokens: PositiveInt | None = None
    concurrency: PositiveInt = 4
    reply_tokens: PositiveInt = 300
    options: Annotated[Mapping[str, Any], AfterValidator(_others)] = Field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.base_url.rstrip('/')}/chat/completions"


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a profile's judge decides the verdicts, and whether its key is there; for telling stale results."""
    named = {key: settings.get(key) for key in ("base_url", "model", "reply_tokens", "options")}
    variable = settings.get("key_variable", "")
    return named | {"key": not variable or bool(os.environ.get(variable))}
