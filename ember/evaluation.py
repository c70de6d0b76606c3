"""Question sets and texts → one tidy frame of per-item scores.

Options are scored by likelihood, not by generated letters: small models answer "A" to every letter question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ember.data import QUESTION_SETS, SPLITS, Concept, Instruction, Question, load_shared
from ember.editing import Edit
from ember.models import LoadedModel
from ember.scoring import generate_greedy, option_logprobs, sequence_scores

PROMPT = "Question: {question}\nAnswer:"
TEXT_SETS = ("neutral", "other_sense", "paragraph")


@dataclass(frozen=True)
class Sizes:
    """How many items of each kind an evaluation uses; None means all there are."""

    questions: int | None = None
    texts: int | None = 60
    instructions: int | None = 24
    generations: int | None = 12
    new_tokens: int = 40

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Suite:
    """What a concept's erasure is measured on, by split.

    ``questions[set][split]`` for the sets concept, simdom and general; ``texts[set][split]`` for neutral,
    other_sense and paragraph; ``instructions[split]``.
    """

    concept: Concept
    questions: Mapping[str, Mapping[str, tuple[Question, ...]]]
    texts: Mapping[str, Mapping[str, tuple[str, ...]]]
    instructions: Mapping[str, tuple[Instruction, ...]]
    sizes: Mapping[str, Sizes]


def load_suite(concept: Concept, sizes: Mapping[str, Sizes] | None = None) -> Suite:
    """Collect a concept's questions and texts with the shared ones; ``sizes`` maps a split to its limits.

    Texts of the concept are split by turns: even positions are train, odd ones test.
    """
    shared = load_shared()
    sizes = {split: (sizes or {}).get(split, Sizes()) for split in SPLITS}
    questions = {
        name: {
            split: tuple(q for q in (*concept.questions, *shared.questions) if (q.set, q.split) == (name, split))[
                : sizes[split].questions
            ]
            for split in SPLITS
        }
        for name in QUESTION_SETS
    }
    pools = {
        "neutral": shared.neutral,
        "other_sense": {split: concept.other_sense[i::2] for i, split in enumerate(SPLITS)},
        "paragraph": {split: concept.paragraphs[i::2] for i, split in enumerate(SPLITS)},
    }
    texts = {name: {split: pools[name][split][: sizes[split].texts] for split in SPLITS} for name in TEXT_SETS}
    # Paragraphs are four times as long as sentences.
    texts["paragraph"] = {split: chosen[: max(2, len(chosen) // 4)] for split, chosen in texts["paragraph"].items()}
    instructions = {split: tuple(i for i in shared.instructions if i.split == split) for split in SPLITS}
    return Suite(concept, questions, texts, instructions, sizes)


@dataclass(frozen=True)
class Evaluation:
    """``items``: set, item, metric, value (one row a score). ``samples``: item, prompt, text (generations)."""

    items: pd.DataFrame
    samples: pd.DataFrame


def evaluate(
    loaded: LoadedModel, suite: Suite, split: str, edit: Edit | None = None, *, progress: bool = False
) -> Evaluation:
    """Score the model, with ``edit`` applied if given, on one split of the suite.

    Per item of a question set: ``correct`` (the right option has the highest log-likelihood per character),
    ``gold_prob`` and ``gold_logprob`` (see ``question_scores``). Per text: ``loss`` (nats per token) and ``kl`` from
    the model as loaded (nats per token). Per generation: ``gen_loss``, the text's loss under the model as loaded,
    and ``distinct``, the share of its word trigrams that are not repeats. The model is left as it was.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    size = suite.sizes[split]
    frames = [
        question_scores(loaded, suite.questions[name][split], edit, progress=progress).assign(set=name)
        for name in QUESTION_SETS
    ]
    for name in TEXT_SETS:
        frames.append(text_scores(loaded, suite.texts[name][split], edit, progress=progress).assign(set=name))
    instructions = suite.instructions[split][: size.instructions]
    frames.append(_response_scores(loaded, instructions, edit, progress).assign(set="instruction"))
    prompts = suite.instructions[split][: size.generations]
    generated, samples = _generation_scores(loaded, prompts, edit, size.new_tokens, progress)
    frames.append(generated.assign(set="generation"))
    items = pd.concat(frames, ignore_index=True)[["set", "item", "metric", "value"]]
    return Evaluation(items, samples)


def question_scores(
    loaded: LoadedModel,
    questions: Sequence[Question],
    edit: Edit | None = None,
    *,
    prompt: str = PROMPT,
    progress: bool = False,
) -> pd.DataFrame:
    """Item scores of multiple-choice questions: item, metric, value.

    ``gold_logprob`` is the right option's log-likelihood per character (nats). ``gold_prob`` is its probability
    among the four options, each option's log-likelihood per character taken times the mean length of the options:
    the soft counterpart of ``correct``, free of length bias.
    """
    prompts = [prompt.format(question=q.question) for q in questions]
    options = [[f" {option}" for option in q.options] for q in questions]
    if edit is None:
        totals = option_logprobs(loaded, prompts, options, progress=progress)
    else:
        with edit.applied(loaded):
            totals = option_logprobs(loaded, prompts, options, progress=progress)
    rows = []
    for question, total in zip(questions, totals, strict=True):
        rows += [(question.id, metric, value) for metric, value in _gold_scores(question, total).items()]
    return pd.DataFrame(rows, columns=["item", "metric", "value"])


def _gold_scores(question: Question, total: np.ndarray) -> dict[str, float]:
    """Scores of the right option from the options' log-likelihoods [4], summed over tokens."""
    lengths = np.array([len(option) for option in question.options])
    per_char = total / lengths
    scaled = per_char * lengths.mean()
    weights = np.exp(scaled - scaled.max())
    return {
        "correct": float(per_char.argmax() == question.gold),
        "gold_prob": float(weights[question.gold] / weights.sum()),
        "gold_logprob": float(per_char[question.gold]),
    }


def blind_scores(loaded: LoadedModel, questions: Sequence[Question], *, prompt: str = PROMPT) -> pd.DataFrame:
    """As ``question_scores``, but after an empty question: what the options alone give away."""
    asked = "\n".join(line.rstrip() for line in prompt.format(question="").split("\n"))
    options = sorted({option for q in questions for option in q.options})
    groups = [[f" {option}" for option in options[k : k + 64]] for k in range(0, len(options), 64)]
    totals = option_logprobs(loaded, [asked] * len(groups), groups, batch_size=1)
    known = dict(zip(options, np.concatenate(totals), strict=True)) if groups else {}
    rows = []
    for q in questions:
        scores = _gold_scores(q, np.array([known[option] for option in q.options]))
        rows += [(q.id, metric, value) for metric, value in scores.items()]
    return pd.DataFrame(rows, columns=["item", "metric", "value"])


def text_scores(
    loaded: LoadedModel, texts: Sequence[str], edit: Edit | None = None, *, progress: bool = False
) -> pd.DataFrame:
    """``loss`` and ``kl`` (nats per token, the first token is not scored) of raw texts; items are their positions."""
    sequences = [loaded.encode(text) for text in texts]
    scores = sequence_scores(loaded, sequences, [1] * len(texts), edit, progress=progress)
    return _loss_rows([str(i) for i in range(len(texts))], scores)


def _loss_rows(names, scores) -> pd.DataFrame:  # type: ignore[no-untyped-def]
    rows = []
    for name, score in zip(names, scores, strict=True):
        rows += [(name, "loss", float(score.loss.mean())), (name, "kl", float(score.kl.mean()))]
    return pd.DataFrame(rows, columns=["item", "metric", "value"])


def _response_scores(
    loaded: LoadedModel, instructions: Sequence[Instruction], edit: Edit | None, progress: bool
) -> pd.DataFrame:
    prompts = [loaded.encode_chat(i.instruction) for i in instructions]
    answers = [loaded.encode(i.response, bos=False) for i in instructions]
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    scores = sequence_scores(loaded, sequences, [len(p) for p in prompts], edit, batch_size=4, progress=progress)
    return _loss_rows([i.id for i in instructions], scores)


def _generation_scores(
    loaded: LoadedModel, instructions: Sequence[Instruction], edit: Edit | None, new_tokens: int, progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    prompts = [loaded.encode_chat(i.instruction) for i in instructions]
    outputs = generate_samples(loaded, prompts, edit, max_new_tokens=new_tokens, progress=progress)
    filled = [k for k, output in enumerate(outputs) if output]
    scores = sequence_scores(
        loaded, [[*prompts[k], *outputs[k]] for k in filled], [len(prompts[k]) for k in filled], progress=progress
    )
    losses = dict(zip(filled, (float(score.loss.mean()) for score in scores), strict=True))
    texts = [loaded.decode(output) for output in outputs]
    rows = []
    for k, instruction in enumerate(instructions):
        rows += [
            (instruction.id, "gen_loss", losses.get(k, float("nan"))),
            (instruction.id, "distinct", distinct_trigrams(texts[k])),
        ]
    samples = pd.DataFrame(
        {"item": [i.id for i in instructions], "prompt": [i.instruction for i in instructions], "text": texts}
    )
    return pd.DataFrame(rows, columns=["item", "metric", "value"]), samples


def generate_samples(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    edit: Edit | None = None,
    *,
    max_new_tokens: int = 40,
    progress: bool = False,
) -> list[list[int]]:
    """Greedy continuations (token ids) of tokenized prompts, with ``edit`` applied if given."""
    if edit is None:
        return generate_greedy(loaded, prompts, max_new_tokens=max_new_tokens, progress=progress)
    with edit.applied(loaded):
        return generate_greedy(loaded, prompts, max_new_tokens=max_new_tokens, progress=progress)


def distinct_trigrams(text: str) -> float:
    """Share of word trigrams that are not repeats; 1 for one or two words, 0 for an empty text."""
    words = text.split()
    if not words:
        return 0.0
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def edited_token_counts(loaded: LoadedModel, edit: Edit, texts: Sequence[str]) -> np.ndarray:
    """How many tokens of each text [n_texts] have an edited embedding row."""
    change = edit.tensors.get(loaded.embedding_name)
    edited = set(change.rows.tolist()) if change is not None else set()
    return np.array([sum(i in edited for i in loaded.encode(text)) for text in texts])
