"""Ground truth for erasure: teach a model what it does not know, erase it, compare with one that never learned it.

One copy of a model is taught an invented subject, another copy reads as much neutral text.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch

from ember.data.types import SPLITS, Question
from ember.editing import Edit
from ember.errors import EmberError
from ember.evaluation.evaluate import question_scores, text_scores
from ember.evaluation.resampling import interval, pooled_mean_draws
from ember.methods.training import require_finite
from ember.models.loading import LoadedModel
from ember.relearning.optimizers import make_optimizer, stepping_backward
from ember.relearning.regained import KEYS, SHARE, Share, share_regained
from ember.relearning.train import RelearnConfig, packed_loss, training_plan
from ember.store.progress import bar

METRICS = ("gold_prob", "gold_logprob", "correct")


def teach(
    loaded: LoadedModel, texts: Sequence[str], *, tokens: int, lr: float = 1e-4, batch_size: int = 4, seed: int = 42
) -> LoadedModel:
    """Fine-tune a copy of the model on texts with AdamW; the model itself is left bit-identical.

    Texts are ordered and cut, and ``tokens`` counted, as in relearning (``training_plan``). The copy has a weights hash
    of its own. A model that is not in float32, no texts, or training that diverges is an ``EmberError``.
    """
    if loaded.dtype != "float32":
        raise EmberError(f"teaching needs a model in float32, not in {loaded.dtype}")
    config = RelearnConfig((tokens,), lr=lr, batch_size=batch_size)
    plan = training_plan(loaded, texts, config, seed)
    student = replace(loaded, model=copy.deepcopy(loaded.model))
    steps = {}
    for parameter in student.model.requires_grad_(True).parameters():
        steps[parameter] = make_optimizer("adamw", [parameter], lr=lr, weight_decay=config.weight_decay).step
    with student.in_training(config, seed), torch.enable_grad(), stepping_backward(steps):
        for step, sequences in enumerate(bar(plan, desc="teaching"), 1):
            loss = packed_loss(student, sequences)
            require_finite(loss, "teaching", step)
            loss.backward()
    student.model.requires_grad_(False)
    return replace(student, parameter_hashes={})  # which are taken anew


def item_scores(
    loaded: LoadedModel, questions: Iterable[Question], texts: Sequence[str], edit: Edit | None = None
) -> pd.DataFrame:
    """Scores of questions, by their sets, and of neutral texts, with the edit applied if given: ``KEYS`` and value."""
    asked = list(questions)
    scored = question_scores(loaded, asked, edit)
    scored["set"] = scored["item"].map({question.id: question.set for question in asked})
    losses = text_scores(loaded, texts, edit).assign(set="neutral")
    return pd.concat([scored, losses[losses.metric == "loss"]], ignore_index=True)[[*KEYS, "value"]]


def arrival(taught: pd.DataFrame, untaught: pd.DataFrame, erased: pd.DataFrame) -> Share:
    """Where erasure stands between the taught model (0) and the one that never learned (1); above 1 it overshoots.

    The ``Share`` (taught − erased) / (taught − untaught) of means over items: ``back`` is what erasure took, ``gap``
    what teaching gave. The frames hold one measure of the same items, or it is a ``ValueError``.
    """
    before, target, after = _aligned(taught, untaught, erased).to_numpy(float).T
    return share_regained([(-target, -before, -after)])  # what comes back there is what goes away here


def arrival_table(
    taught: pd.DataFrame, untaught: pd.DataFrame, erased: Mapping[str, pd.DataFrame], questions: Sequence[Question]
) -> pd.DataFrame:
    """``arrival`` of every cell by half of the questions: cell, split, metric and what ``Share`` holds."""
    rows = []
    for split in SPLITS:
        mine = {question.id for question in questions if question.split == split}
        for metric in METRICS:
            for cell, scores in erased.items():
                frames = (taught, untaught, scores)
                share = arrival(*(f[f["item"].isin(mine) & (f.metric == metric)] for f in frames))
                rows.append((cell, split, metric, *share))
    return pd.DataFrame(rows, columns=["cell", "split", "metric", *SHARE])


def nearest(table: pd.DataFrame) -> str:
    """The cell nearest to never having learned: the first with the smallest |back − gap| of train ``gold_prob``."""
    train = table[(table.split == "train") & (table.metric == "gold_prob")]
    return str(train.cell[(train.back - train.gap).abs().idxmin()])


def damage(reference: pd.DataFrame, erased: pd.DataFrame) -> pd.DataFrame:
    """Mean change from a reference model, item by item: set, metric, change, ci_low, ci_high, n.

    From the taught copy it is what erasure did, from the one that never learned how far off erasure ends.
    """
    rows = []
    for key, part in _aligned(reference, erased).groupby(level=["set", "metric"], sort=False):
        before, after = part.to_numpy(float).T
        change = (after - before)[None]
        rows.append((*key, change.mean(), *interval(pooled_mean_draws([change])[0]), change.size))
    return pd.DataFrame(rows, columns=["set", "metric", "change", "ci_low", "ci_high", "n"])


def _aligned(*frames: pd.DataFrame) -> pd.DataFrame:
    """The scores of several models side by side, one row an item."""
    columns = [frame.set_index(KEYS).value for frame in frames]
    if any(set(column.index) != set(columns[0].index) for column in columns):
        raise ValueError("the models were not scored on the same items")
    scores = pd.concat(columns, axis=1)
    if scores.isna().any(axis=None):
        raise ValueError("a score is missing")
    return scores
