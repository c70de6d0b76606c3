"""Progress bars; ``TQDM_DISABLE=1`` turns all of them off."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def bar(iterable: Iterable[Any] | None = None, *, show: bool, **options: Any) -> Any:
    """A transient ``tqdm`` bar if ``show``; the iterable without one otherwise."""
    # An explicit disable=False would override TQDM_DISABLE.
    if not show:
        options["disable"] = True
    return tqdm(iterable, leave=False, **options)
