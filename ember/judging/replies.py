"""What an endpoint answers, the verdict in it, and replies on disk."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ember.errors import DamagedFileError
from ember.store.files import write_text
from ember.store.paths import cache_dir

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


class Entry:
    """A reply on disk, under the hash of all that it depends on."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.asked = asked
        key = _hash(asked)[:32]
        self.path = cache_dir() / "judge" / key[:2] / f"{key}.json"

    def write(self, reply: str, served_by: str) -> None:
        kept = {"asked": self.asked, "reply": reply, "served_by": served_by}
        write_text(self.path, json.dumps({**kept, "sha256": _hash(kept)}, indent=1, ensure_ascii=False) + "\n")

    def verdict(self, read: Read) -> Verdict:
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept.pop("sha256") != _hash(kept) or kept["asked"] != self.asked:
                raise ValueError("it is not what was written")
            return Verdict(dict(read(kept["reply"])), kept["reply"], served_by=kept["served_by"], cached=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"the judge's reply in {self.path} is damaged ({error}). Delete the file") from error


def _hash(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content(body: Any, reply_tokens: int) -> str:
    """The text of a reply of at most so many tokens; a ``ValueError`` if there is none."""
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("the endpoint's answer holds no choices[0].message.content") from None
    if not isinstance(text, str) or not text.strip():
        ended = f"finish_reason {choice.get('finish_reason')!r}; reply_tokens is {reply_tokens}"
        raise ValueError(f"the reply is empty ({ended})")
    return text


def used(body: Any, expected: int) -> int:
    """Tokens that a call has used; what was expected if the endpoint does not say."""
    try:
        total = int(body["usage"]["total_tokens"])
    except (KeyError, TypeError, ValueError):
        return expected
    return total if total >= 0 else expected
