"""The erasure methods by name, one file a method; what they share is in ``training`` and ``selection``.

Adding one is a file here and a line in ``METHODS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import UnknownNameError
from ember.methods import controls, crisp, ember, pisces, rmu, selection, snmf
from ember.models.loading import LoadedModel


@dataclass(frozen=True)
class Method:
    """A method's config class and ``run(loaded, concept, config, *, seed) -> Edit``, which leaves the model as is.

    ``prepare(loaded, concept, config)`` makes what a method needs from the unedited model, if it needs anything.
    ``seeded`` tells whether the edit depends on the seed.
    """

    config: type[Any]
    run: Callable[..., Edit]
    prepare: Callable[..., object] | None = None
    seeded: bool = True


METHODS: dict[str, Method] = {
    "ember": Method(ember.EmberConfig, ember.run),
    "snmf": Method(snmf.SnmfConfig, snmf.run),
    "rmu": Method(rmu.RmuConfig, rmu.run),
    "crisp": Method(crisp.CrispConfig, crisp.run, selection.prepare),
    "pisces": Method(pisces.PiscesConfig, pisces.run, selection.prepare, seeded=False),
    **{name: Method(ember.EmberConfig, partial(run, method=name)) for name, run in controls.CONTROLS.items()},
}


def erase(
    loaded: LoadedModel, concept: Concept, method: str, config: Any, *, first: Edit | None = None, seed: int = 42
) -> Edit:
    """The edit of a method, or with ``first`` (an EMBER edit) of the method run after it, composed into one.

    The model is left bit-identical. Besides an ``UnknownNameError``, errors are a ``NothingFoundError`` if no feature
    carries the concept, a ``ValueError`` if the model lacks a layer, and an ``EmberError`` if training diverges.
    """
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    chosen = METHODS[method]
    if first is None:
        return chosen.run(loaded, concept, config, seed=seed)
    if chosen.prepare:
        chosen.prepare(loaded, concept, config)
    with first.applied(loaded):
        later = chosen.run(loaded, concept, config, seed=seed)
    return first.then(later)
