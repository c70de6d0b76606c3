"""Which language model judges, where it is asked, and how far to go with it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from ember.errors import require_at_least

_OURS = ("model", "messages", "temperature", "max_tokens", "stream", "n")


@dataclass(frozen=True)
class JudgeConfig:
    """An endpoint, a model, and how far to go with them.

    ``base_url`` is what ``/chat/completions`` is put behind. ``key_variable`` names the environment variable that holds
    the key; empty for endpoints without one. With ``required`` nothing starts unless the judge answers. ``timeout`` is
    in seconds. A failure that may pass (429, 5xx, a time-out, no connection) is tried again ``retries`` times after
    ``backoff`` seconds, doubled each time up to ``max_wait``, or after what the endpoint asks for; a reply that cannot
    be read is asked for again ``rereads`` times. ``max_calls`` (requests sent) and ``max_tokens`` are the budget of one
    notebook run; None sets no limit. ``reply_tokens`` limits each reply and ``options`` holds further fields of the
    request, such as ``reasoning_effort``.
    """

    base_url: str
    model: str
    key_variable: str = ""
    required: bool = False
    timeout: float = 60.0
    retries: int = 5
    rereads: int = 2
    backoff: float = 1.0
    max_wait: float = 120.0
    max_calls: int | None = 5000
    max_tokens: int | None = None
    concurrency: int = 4
    reply_tokens: int = 300
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name, kind in (("base_url", str), ("model", str), ("key_variable", str), ("required", bool)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be {kind.__name__}, got {getattr(self, name)!r}")
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url must hold no user, password or query: the key goes into an environment variable")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must start with http:// or https:// and a host, got {self.base_url!r}")
        if not self.model.strip():
            raise ValueError(f"model must be a name, got {self.model!r}")
        if self.key_variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # The value is not shown: a key that was pasted here must not reach a log.
            raise ValueError("key_variable must be the name of an environment variable, not the key itself")
        for name in ("timeout", "retries", "rereads", "backoff", "max_wait", "concurrency", "reply_tokens"):
            value = getattr(self, name)
            kinds = (int, float) if name in ("timeout", "backoff", "max_wait") else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool):
                wanted = "number" if float in kinds else "whole number"
                raise ValueError(f"{name} must be a {wanted}, got {value!r}")
        require_at_least(self, 0, "retries", "rereads", "backoff", "max_wait")
        require_at_least(self, 1, "concurrency", "reply_tokens")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}")
        for name in ("max_calls", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be at least 1, or null for no limit, got {value!r}")
        if not isinstance(self.options, Mapping) or set(self.options) & set(_OURS):
            raise ValueError(f"options must be a mapping without {', '.join(_OURS)}, got {self.options!r}")

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.base_url.rstrip('/')}/chat/completions"


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a profile's judge decides the verdicts, and whether its key is there; for telling stale results."""
    named = {key: settings.get(key) for key in ("base_url", "model", "reply_tokens", "options")}
    variable = settings.get("key_variable", "")
    return named | {"key": not variable or bool(os.environ.get(variable))}
