"""Robust concept erasure by precise editing of token embeddings (EMBER, arXiv 2606.03695).

The root of the package is the core: ``tokens``, ``factorization``, ``features`` and ``editing``. All else is in a room
with one charter, which its ``__init__`` states; each imports only from those before it: ``store``, ``data``,
``models``, the core, ``methods``, ``evaluation``, ``relearning``, ``judging``, ``reporting``, ``batch``.

The names below load lazily, so that ``import ember`` and the command line stay fast.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load_model": "ember.models.loading",
    "load_concept": "ember.data.ours",
    "concept_from_sentences": "ember.data.ours",
    "sparse_mf": "ember.factorization",
    "semi_nmf": "ember.factorization",
    "concept_features": "ember.features",
    "preview": "ember.methods.ember",
    "Edit": "ember.editing",
    "METHODS": "ember.methods",
    "erase": "ember.methods",
    "load_suite": "ember.evaluation.suite",
    "evaluate": "ember.evaluation.evaluate",
    "compare": "ember.evaluation.metrics",
    "ATTACKS": "ember.relearning.attacks",
    "relearn": "ember.relearning.train",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ember' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
