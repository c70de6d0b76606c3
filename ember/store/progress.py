"""Progress bars."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A transient ``tqdm`` bar; ``TQDM_DISABLE=1`` turns all bars off, as it does for tqdm itself."""
    return tqdm(iterable, leave=False, **options)
