"""The one object with which a notebook opens what it needs and saves what it found."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ember.batch.notebooks import code_hash
from ember.batch.planning import ERASE, frame_path, run_name
from ember.batch.profiles import load_profile
from ember.batch.records import RECORD_COLUMNS
from ember.data.arms import Arm
from ember.data.ours import load_concept
from ember.data.types import Concept
from ember.editing import Edit
from ember.errors import EmberError
from ember.evaluation.evaluate import Evaluation, evaluate
from ember.evaluation.search import EvaluationCache
from ember.evaluation.suite import Sizes, Suite, load_suite
from ember.models.loading import LoadedModel, load_model
from ember.reporting.plots import use_theme
from ember.store.environment import device_name, git_commit, library_versions
from ember.store.frames import write_frame
from ember.store.paths import results_dir, results_root

_LABELS = ("attack", "precision", "lr", "budget", "concept", "method", "ember", "seed")


class Run:
    """One run of a notebook: what its profile and its other parameters decide, loaded when it is asked for.

    ``model``, ``concept_name``, ``method``, ``ember`` and ``seed`` say what is loaded and labelled; all parameters make
    up the run's ``name``.
    """

    def __init__(self, notebook: str, *, profile: str, **parameters: Any) -> None:
        use_theme()
        self.notebook, self.parameters, self.started = notebook, parameters, time.time()
        self.profile = load_profile(profile)
        self.name = run_name(notebook, **parameters)
        self.cache = EvaluationCache(results_root() / "cells")

    @property
    def arm(self) -> Arm:
        """The method, and whether it comes after EMBER; EMBER alone where the parameters name none."""
        return Arm(self.parameters.get("method", "ember"), self.parameters.get("ember", False))

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, in the profile's dtype."""
        return load_model(self.parameters["model"], dtype=self.profile.dtype)

    @cached_property
    def concept(self) -> Concept:
        """The concept, from the profile's source."""
        return load_concept(self.parameters["concept_name"], source=self.profile.source)

    @cached_property
    def suite(self) -> Suite:
        """The concept's questions and texts, as many as the profile says."""
        return self.suite_of(**self.profile.sizes)

    def suite_of(self, **sizes: Sizes) -> Suite:
        """The concept's questions and texts in sizes of its own, by split."""
        return load_suite(self.concept, sizes, source=self.profile.source)

    def cached(
        self, compute: Callable[[], pd.DataFrame], *parts: object, loaded: LoadedModel | None = None
    ) -> pd.DataFrame:
        """A frame of item scores from the cache of all notebooks, or computed and kept.

        The key holds the weights, this notebook's code and ``parts``, which must name whatever else decides it.
        """
        key = self.cache.key(loaded or self.loaded, code_hash(self.notebook), *parts)
        return self.cache.get_or_run(key, lambda: Evaluation(compute(), pd.DataFrame())).items

    def folder(self, kind: str, *parts: object) -> Path:
        """A folder among the results that is this notebook's for the same weights, code and ``parts``."""
        return results_root() / kind / self.cache.key(self.loaded, code_hash(self.notebook), *parts)

    def base(self, split: str) -> Evaluation:
        """The evaluation of the unedited model on a split of the suite, which all notebooks and arms share."""
        key = self.cache.key(self.loaded, code_hash(ERASE), self.suite, split, "base")
        return self.cache.get_or_run(key, lambda: evaluate(self.loaded, self.suite, split))

    def evaluation(self, split: str, edit: Callable[[], Edit], *parts: object) -> Evaluation:
        """The evaluation of an edit on a split of the suite; the edit is made only if it is not in the cache.

        ``parts`` must name whatever decides the edit, besides the weights and this notebook's code.
        """
        key = self.cache.key(self.loaded, code_hash(self.notebook), self.suite, split, *parts)
        return self.cache.get_or_run(key, lambda: evaluate(self.loaded, self.suite, split, edit()))

    def saved_edit(self, arm: Arm | None = None) -> Edit:
        """The edit that ``03_erase_concept`` saved for an arm (by default this run's), model, concept and seed."""
        alike = {key: self.parameters[key] for key in ("model", "concept_name", "seed")}
        run, results = run_name(ERASE, **alike, **(arm or self.arm)._asdict()), results_dir(self.profile.name)
        if not (results / "edits" / run).exists():
            raise EmberError(f"no edit of {run} in {results}; run {ERASE} with those parameters first")
        return Edit.load(results / "edits" / run)

    def records(
        self,
        summary: pd.DataFrame,
        *,
        config: Any,
        cell: str,
        split: str,
        seconds: float | None = None,
        arm: Arm | None = None,
        seed: int | None = None,
        concept: str | None = None,
        loaded: LoadedModel | None = None,
    ) -> pd.DataFrame:
        """Rows of ``RECORD_COLUMNS`` for a summary with columns metric, value and, if known, set, n, interval, effect.

        Missing values are NaN, never 0. ``cell`` is the label of ``config`` in its grid; ``seconds`` what it took, by
        default the time since the notebook began. The rest is this run's unless it is given.
        """
        model, (method, ember) = loaded or self.loaded, arm or self.arm
        provenance = {
            "model": model.name, "revision": model.spec.revision, "weights_hash": model.weights_hash,
            "profile": self.profile.name, "concept": concept or self.concept.name, "method": method, "ember": ember,
            "config": json.dumps(config, default=asdict, sort_keys=True), "cell": cell,
            "seed": self.parameters["seed"] if seed is None else seed, "split": split, "git_commit": git_commit(),
            "versions": json.dumps(library_versions()), "device": device_name(model.device), "dtype": model.dtype,
            "wall_seconds": time.time() - self.started if seconds is None else seconds,
        }  # fmt: skip
        return summary.assign(**provenance).reindex(columns=list(RECORD_COLUMNS))

    def save(self, *, labels: Mapping[str, Any] | None = None, **frames: pd.DataFrame) -> Path:
        """Write the run's frames and say what it took; the folder they are in.

        All but ``records``, which tell that themselves, are labelled with the concept and with those parameters that
        name the arm, the attack and the seed, or with ``labels`` alone.
        """
        if labels is None:
            known = {**self.parameters, **({"concept": self.concept.name} if "concept_name" in self.parameters else {})}
            labels = {key: known[key] for key in _LABELS if key in known}
        labelled = {name: f if name == "records" else f.assign(**labels) for name, f in frames.items()}
        paths = [write_frame(frame_path(self.profile.name, self.name, name), f) for name, f in labelled.items()]
        print(self.summary())
        return paths[0].parent

    def summary(self) -> str:
        """One line: minutes since the notebook began, and this process's peak memory."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
        return f"{(time.time() - self.started) / 60:.1f} minutes, peak memory {peak / 1024:.1f} GB"
