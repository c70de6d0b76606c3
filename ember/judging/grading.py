"""What the paper leaves to a language model as judge: features, open answers, coherence (paper, section 4).

Every verdict comes with the prompt sent, the reply and the model that gave it.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd

from ember.data.types import SPLITS, Question
from ember.editing import Edit, applying
from ember.evaluation.suite import Suite
from ember.features import ConceptFeatures
from ember.judging.client import Judge
from ember.judging.prompts import PROMPTS, read_reply
from ember.judging.replies import Verdict
from ember.models.loading import LoadedModel
from ember.models.scoring import generate_greedy

OPEN_PROMPT = "{question}\nAnswer in a few words."
VERDICT_COLUMNS = (
    "set", "item", "judge", "values", "reason", "prompt", "reply", "endpoint", "model", "settings",
    "served_by", "cached",
)  # fmt: skip


class Judged(NamedTuple):
    """Scores and how they came about: ``items`` (set, item, metric, value) and ``verdicts`` (``VERDICT_COLUMNS``)."""

    items: pd.DataFrame
    verdicts: pd.DataFrame


def judged_scores(
    loaded: LoadedModel,
    suite: Suite,
    split: str,
    judge: Judge,
    edit: Edit | None = None,
    *,
    responses: pd.DataFrame | None = None,
) -> Judged:
    """What the suite's sizes leave to a judge, of the model with ``edit`` applied if given.

    With ``open_answers``, in the sets ``concept_open`` and ``simdom_open``: ``open_correct`` (0 or 1) of a greedy
    answer through the chat template. With ``judge``, in the set ``generation``: ``judge_instruction`` and
    ``judge_fluency`` (0-2) of the responses to the split's instructions: those of ``responses`` (the ``samples`` of an
    evaluation of the same model) or, without it, greedy ones. NaN where the judge's reply could not be read; the
    verdict says why. The model is left as it was. Errors are those of ``Judge.ask_all``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    size = suite.sizes[split]
    questions = [q for name in ("concept", "simdom") for q in suite.questions[name][split][: size.open_answers]]
    instructions = suite.instructions[split][: size.generations] if size.judge else ()
    if responses is not None and size.judge and set(responses.item) != {i.id for i in instructions}:
        raise ValueError("responses are not those to the instructions of this split and size")
    prompts = [i.instruction for i in instructions] if responses is None else []
    asked = [OPEN_PROMPT.format(question=q.question) for q in questions] + prompts
    with applying(loaded, edit):
        encoded = [loaded.encode_chat(text) for text in asked]
        outputs = generate_greedy(loaded, encoded, max_new_tokens=size.new_tokens)
    texts = [loaded.decode(output) for output in outputs]
    parts = [judge_open_answers(judge, questions, texts[: len(questions)])]
    if size.judge:
        if responses is None:
            ids = [i.id for i in instructions]
            responses = pd.DataFrame({"item": ids, "prompt": prompts, "text": texts[len(questions) :]})
        parts.append(judge_coherence(judge, responses))
    return _joined(parts)


def no_verdicts() -> pd.DataFrame:
    """The columns of verdicts, without rows."""
    return pd.DataFrame({column: pd.Series(dtype=bool if column == "cached" else str) for column in VERDICT_COLUMNS})


def judge_open_answers(judge: Judge, questions: Sequence[Question], answers: Sequence[str]) -> Judged:
    """``open_correct`` of one answer a question, graded against the reference and its other accepted forms."""
    asked = {}
    for q, answer in zip(questions, answers, strict=True):
        reference = " / ".join((q.answer, *q.aliases))
        # In sets of their own: not every question of "concept" is asked openly.
        asked[f"{q.set}_open", q.id] = {"question": q.question, "reference": reference, "answer": answer.strip()}
    return _judged(judge, "open", asked, {"open_correct": "correct"})


def judge_coherence(judge: Judge, responses: pd.DataFrame) -> Judged:
    """``judge_instruction`` and ``judge_fluency`` of responses (columns item, prompt, text), 0-2 each."""
    asked = {
        ("generation", str(row.item)): {"instruction": row.prompt, "response": row.text.strip()}
        for row in responses.itertuples()
    }
    metrics = {"judge_instruction": "instruction", "judge_fluency": "fluency"}
    return _judged(judge, "coherence", asked, metrics)


def judge_features(judge: Judge, concept: str, features: ConceptFeatures, candidates: Sequence[int]) -> Judged:
    """Which candidate features are centrally and distinctively about a concept (paper, section 3).

    For each, the judge describes its 20 most activating tokens, then says whether the description is about the concept.
    ``items`` holds, in the set ``feature`` and with the feature's number as item, ``about`` (0 or 1), ``confidence``
    (0-1) and ``accepted`` (about, with a confidence of at least 0.85); NaN where a reply could not be read. The
    threshold is a hard one: look at confidences near it before relying on a verdict.
    """
    asked = {("feature", str(k)): {"tokens": "\n".join(map(repr, top_tokens(features, k)))} for k in candidates}
    described = _judged(judge, "describe", asked, {})
    values = map(json.loads, described.verdicts["values"])
    descriptions = {key: value and {**value, "concept": concept} for key, value in zip(asked, values, strict=True)}
    metrics = {name: name for name in ("about", "confidence", "accepted")}
    return _joined([described, _judged(judge, "about", descriptions, metrics)])


def accepted_features(judged: Judged) -> list[int]:
    """The features that the judge accepts, in the order of the candidates; for the setting ``features`` of EMBER."""
    rows = judged.items[(judged.items.metric == "accepted") & (judged.items.value == 1)]
    return [int(item) for item in rows.item]


def feature_verdicts(judged: Judged) -> pd.DataFrame:
    """Columns feature, judge_about, judge_confidence and judge_accepted of what ``judge_features`` says."""
    wide = judged.items.pivot(index="item", columns="metric", values="value")[["about", "confidence", "accepted"]]
    wide = wide.add_prefix("judge_").rename_axis(index="feature", columns=None).reset_index()
    return wide.astype({"feature": int})


def top_tokens(features: ConceptFeatures, feature: int, count: int = 20) -> list[str]:
    """The tokens of V' on which a feature is most active, by |G|; none on which it is silent."""
    activation = features.factorization.G[:, feature].abs()
    order = activation.argsort(descending=True, stable=True)[:count]
    return [str(features.table.token.iloc[i]) for i in order.tolist() if activation[i] > 0]


def _judged(
    judge: Judge, kind: str, asked: Mapping[tuple[str, str], Mapping[str, str]], metrics: Mapping[str, str]
) -> Judged:
    """Verdicts of a kind by set and item ``asked``; the metrics are named values. NaN where there is nothing to ask."""
    prompts = {key: PROMPTS[kind].format(**texts) for key, texts in asked.items() if texts}
    verdicts = dict(zip(prompts, judge.ask_all(list(prompts.values()), partial(read_reply, kind)), strict=True))
    settings = dict(judge.settings)
    given = (settings.pop("endpoint"), settings.pop("model"), json.dumps(settings, sort_keys=True))
    rows = [
        (*key, kind, json.dumps(dict(v.values)), v.reason, prompts[key], v.reply, *given, v.served_by, v.cached)
        for key, v in verdicts.items()
    ]
    nothing = Verdict({}, "")
    scores = [(*key, m, verdicts.get(key, nothing).value(name)) for key in asked for m, name in metrics.items()]
    items = pd.DataFrame(scores, columns=["set", "item", "metric", "value"]).astype({"value": float})
    return Judged(items, pd.DataFrame(rows, columns=list(VERDICT_COLUMNS)))


def _joined(parts: Sequence[Judged]) -> Judged:
    return Judged(*(pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True)))
