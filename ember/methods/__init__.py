"""The erasure methods by name. Adding one is a file here and a line in ``METHODS``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ember.editing import Edit
from ember.methods import ember


@dataclass(frozen=True)
class Method:
    """A method's config class and ``run(loaded, concept, config, *, seed) -> Edit``, which leaves the model as is."""

    config: type[Any]
    run: Callable[..., Edit]


METHODS: dict[str, Method] = {
    "ember": Method(ember.EmberConfig, ember.run),
}
