"""What an edit of embedding rows takes from the concept and what it costs other text: edits of one strength, measured.

``trade_curves`` puts the strengths together.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ember.data.types import Question
from ember.editing import Edit
from ember.errors import UnknownNameError
from ember.evaluation.evaluate import PROMPT, question_scores, text_scores
from ember.evaluation.localization import expected_per_thousand
from ember.evaluation.suite import Suite
from ember.models.loading import LoadedModel

RARE = "EMBER, rare tokens"
# Name → method and settings beside its strength.
EDITS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "EMBER": ("ember", {}),
    RARE: ("ember", {"max_zipf": 4.0}),  # from zipf 4 on, words are ordinary (ember.tokens)
    "EMBER, output side": ("ember", {"side": "output"}),
    "EMBER, both sides": ("ember", {"side": "both"}),
    "random direction": ("random_direction", {}),
    "mean rows": ("mean_rows", {}),
    "matched rows": ("matched_rows", {}),
    "zero rows": ("zero_rows", {}),
    "LEACE": ("leace", {}),
    "random rows": ("random_rows", {}),
}


def known_edits(names: Sequence[str]) -> dict[str, tuple[str, Mapping[str, object]]]:
    """The chosen entries of ``EDITS``; ``UnknownNameError`` if there is no such edit."""
    for name in names:
        if name not in EDITS:
            raise UnknownNameError("edit", name, EDITS)
    return {name: EDITS[name] for name in names}


@dataclass(frozen=True)
class Probe:
    """The questions (by set) and texts (by set) on which edits are compared, with the unedited model's scores."""

    questions: Mapping[str, Sequence[Question]]
    texts: Mapping[str, Sequence[str]]
    base: pd.DataFrame


def make_probe(loaded: LoadedModel, suite: Suite, split: str = "test") -> Probe:
    """The suite's questions on concept and neighbour and its texts, scored by the unedited model.

    Sets without texts are left out: released concepts have none in another sense.
    """
    questions = {name: suite.questions[name][split] for name in ("concept", "simdom")}
    texts = {name: suite.texts[name][split] for name in ("other_sense", "neutral")}
    texts = {name: chosen for name, chosen in texts.items() if chosen}
    frames = [question_scores(loaded, chosen).assign(set=name) for name, chosen in questions.items()]
    frames += [text_scores(loaded, chosen).assign(set=name) for name, chosen in texts.items()]
    return Probe(questions, texts, pd.concat(frames, ignore_index=True))


def probe_edit(loaded: LoadedModel, probe: Probe, edit: Edit) -> pd.DataFrame:
    """Scores with the edit applied: set, item, metric, base, edited.

    An edit of input embeddings alone changes nothing, to the bit, where none of its tokens occurs: such items are
    not scored again. Of such an edit other-sense texts also have ``kl_sum`` (nats over the whole text) and
    ``occurrences`` (its tokens in the text), and ``general English`` how many of its tokens a thousand words bring
    (``per_thousand``, an upper bound: ember.evaluation.localization.expected_per_thousand).
    """
    inputs = set(edit.tensors) == {loaded.embedding_name}
    marked = edit.rows_of(loaded.embedding_name) if inputs else None

    def touched(*texts: str) -> bool:
        return marked is None or any(i in marked for text in texts for i in loaded.encode(text))

    keys, frames = ["set", "item", "metric"], [probe.base.head(0)]
    for name, questions in probe.questions.items():
        asked = {q: [f"{PROMPT.format(question=q.question)} {option}" for option in q.options] for q in questions}
        if again := [q for q, texts in asked.items() if touched(*texts)]:
            frames.append(question_scores(loaded, again, edit).assign(set=name))
    for name, texts in probe.texts.items():
        if places := [i for i, text in enumerate(texts) if touched(text)]:
            scores = text_scores(loaded, [texts[i] for i in places], edit)
            frames.append(scores.assign(set=name, item=[str(places[int(k)]) for k in scores["item"]]))
    edited = pd.concat(frames, ignore_index=True).rename(columns={"value": "edited"})
    items = probe.base.rename(columns={"value": "base"}).merge(edited, on=keys, how="left")
    items = items.assign(edited=items.edited.fillna(items.base))[[*keys, "base", "edited"]]
    if marked is None:
        return items
    return pd.concat([items, _occurrences(loaded, probe, items, marked)], ignore_index=True)


def _occurrences(loaded: LoadedModel, probe: Probe, items: pd.DataFrame, marked: Collection[int]) -> pd.DataFrame:
    kl = items[(items.set == "other_sense") & (items.metric == "kl")].set_index("item").edited
    rows = []
    for i, text in enumerate(probe.texts.get("other_sense", ())):
        ids = loaded.encode(text)[:-1]  # nothing is predicted after the last token
        rows.append(("other_sense", str(i), "kl_sum", 0.0, kl[str(i)] * len(ids)))
        rows.append(("other_sense", str(i), "occurrences", 0.0, float(sum(token in marked for token in ids))))
    rows.append(("general English", "", "per_thousand", 0.0, expected_per_thousand(loaded, marked)))
    return pd.DataFrame(rows, columns=["set", "item", "metric", "base", "edited"])
