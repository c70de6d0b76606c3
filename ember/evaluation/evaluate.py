"""Question sets and texts → one tidy frame of per-item scores.

Options are scored by likelihood, and by generated letters only where asked for: small models answer "A" to every
letter question.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from ember.data.ours import load_shared
from ember.data.types import QUESTION_SETS, SPLITS, Concept, Instruction, Question
from ember.editing import Edit, applying
from ember.evaluation.letters import letter_scores
from ember.models.loading import LoadedModel
from ember.models.scoring import generate_greedy, option_logprobs, sequence_losses, sequence_scores

PROMPT = "Question: {question}\nAnswer:"
TEXT_SETS = ("neutral", "other_sense", "paragraph")


@dataclass(frozen=True)
class Sizes:
    """How many items of each kind an evaluation uses; None means all there are.

    ``texts`` counts neutral texts, ``other_texts`` those in another sense and (a quarter as many) paragraphs. With
    ``generations`` or ``other_texts`` 0 these are left out, and with ``divergence`` False the divergence from the base
    model is: a grid needs none of them. With ``letters`` questions are also answered by letter. ``open_answers``
    questions of the concept and of the similar domain each, answered in the model's own words, and with ``judge`` the
    generations are for a judge (``ember.judging.grading``); ``evaluate`` leaves both alone.
    """

    questions: int | None = None
    texts: int | None = 60
    other_texts: int | None = 60
    instructions: int | None = 24
    generations: int | None = 12
    new_tokens: int = 40
    divergence: bool = True
    letters: bool = False
    judge: bool = False
    open_answers: int | None = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("divergence", "letters", "judge"):
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be true or false, got {value!r}")
                continue
            least = 0 if name in ("other_texts", "generations", "open_answers") else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.judge and self.generations == 0:
            raise ValueError("judge grades generations, of which there are 0")
        if self.other_texts is not None and 0 < self.other_texts < 5:
            raise ValueError(f"other_texts must be 0 or at least 5 (two paragraphs), got {self.other_texts}")

    @property
    def judged(self) -> bool:
        """Whether anything is left to a judge."""
        return self.judge or self.open_answers != 0


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


def load_suite(concept: Concept, sizes: Mapping[str, Sizes] | None = None, *, source: str = "ours") -> Suite:
    """Collect a concept's questions and texts with the shared ones; ``sizes`` maps a split to its limits.

    ``source`` says whose shared questions and instructions these are (``load_shared``). Released concepts have no
    texts in another sense: that set is empty then, and nothing is scored on it.

    Texts of the concept are split by turns: even positions are train, odd ones test.
    """
    shared = load_shared(source)
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
    limits = {"neutral": "texts", "other_sense": "other_texts", "paragraph": "other_texts"}
    texts = {
        name: {split: pools[name][split][: getattr(sizes[split], limits[name])] for split in SPLITS}
        for name in TEXT_SETS
    }
    # Paragraphs are four times as long as sentences.
    texts["paragraph"] = {split: chosen[: -(-len(chosen) // 4)] for split, chosen in texts["paragraph"].items()}
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
    ``gold_prob`` and ``gold_logprob`` (see ``question_scores``), and where the sizes ask for letters ``letter_correct``
    and ``letter_valid``. Per text: ``loss`` (nats per token) and ``kl`` from the model as loaded (nats per token). Per
    generation: ``gen_loss``, the text's loss under the model as loaded, and ``distinct``, the
    share of its word trigrams that are not repeats. The model is left as it was.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    size = suite.sizes[split]
    sequences = _sequences(loaded, suite, split)
    prompts = suite.instructions[split][: size.generations]
    asked = [loaded.encode_chat(i.instruction) for i in prompts]
    # Applied once for everything that needs the edited model alone: an edit of whole matrices is not cheap to apply.
    with applying(loaded, edit):
        questions = [q for chosen in suite.questions.values() for q in chosen[split]]
        scored = question_scores(loaded, questions, progress=progress)
        frames = [scored.assign(set=np.repeat([q.set for q in questions], len(scored) // len(questions)))]
        if size.letters:
            lettered = letter_scores(loaded, questions, progress=progress)
            frames.append(lettered.assign(set=np.repeat([q.set for q in questions], 2)))
        if not size.divergence:
            frames += [
                _loss_rows(names, sequence_losses(loaded, texts, starts, progress=progress)).assign(set=name)
                for name, (names, texts, starts) in sequences.items()
            ]
        outputs = generate_greedy(loaded, asked, max_new_tokens=size.new_tokens, progress=progress)
    if size.divergence:
        for name, (names, texts, starts) in sequences.items():
            scores = sequence_scores(loaded, texts, starts, _entering(loaded, edit), progress=progress)
            rows = _loss_rows(names, [score.loss for score in scores], [score.kl for score in scores])
            frames.append(rows.assign(set=name))
    generated, samples = _generation_scores(loaded, prompts, asked, outputs, progress)
    frames.append(generated.assign(set="generation"))
    items = pd.concat([f for f in frames if len(f)], ignore_index=True)[["set", "item", "metric", "value"]]
    return Evaluation(items, samples)


Sequences = tuple[list[str], list[list[int]], list[int]]


def _sequences(loaded: LoadedModel, suite: Suite, split: str) -> dict[str, Sequences]:
    """What is scored token by token, by set: names, token ids, and from which token on."""
    found: dict[str, Sequences] = {}
    for name in TEXT_SETS:
        texts = suite.texts[name][split]
        if texts:
            found[name] = ([str(i) for i in range(len(texts))], [loaded.encode(t) for t in texts], [1] * len(texts))
    instructions = suite.instructions[split][: suite.sizes[split].instructions]
    prompts = [loaded.encode_chat(i.instruction) for i in instructions]
    whole = [[*p, *loaded.encode(i.response, bos=False)] for p, i in zip(prompts, instructions, strict=True)]
    found["instruction"] = ([i.id for i in instructions], whole, [len(p) for p in prompts])
    return found


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
    with applying(loaded, edit):
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


def _entering(loaded: LoadedModel, edit: Edit | None) -> partial[AbstractContextManager[None]] | None:
    return partial(edit.applied, loaded) if edit else None


def text_scores(
    loaded: LoadedModel, texts: Sequence[str], edit: Edit | None = None, *, progress: bool = False
) -> pd.DataFrame:
    """``loss`` and ``kl`` (nats per token, the first token is not scored) of raw texts; items are their positions."""
    sequences = [loaded.encode(text) for text in texts]
    scores = sequence_scores(loaded, sequences, [1] * len(texts), _entering(loaded, edit), progress=progress)
    names = [str(i) for i in range(len(texts))]
    return _loss_rows(names, [score.loss for score in scores], [score.kl for score in scores])


def _loss_rows(
    names: Sequence[str], losses: Sequence[np.ndarray], divergences: Sequence[np.ndarray] = ()
) -> pd.DataFrame:
    rows = [(name, "loss", float(loss.mean())) for name, loss in zip(names, losses, strict=True)]
    rows += [(name, "kl", float(kl.mean())) for name, kl in zip(names, divergences, strict=False)]
    return pd.DataFrame(rows, columns=["item", "metric", "value"])


def _generation_scores(
    loaded: LoadedModel,
    instructions: Sequence[Instruction],
    prompts: list[list[int]],
    outputs: list[list[int]],
    progress: bool,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of generated token ids under the model as it is now, and the texts."""
    filled = [k for k, output in enumerate(outputs) if output]
    scores = sequence_losses(
        loaded, [[*prompts[k], *outputs[k]] for k in filled], [len(prompts[k]) for k in filled], progress=progress
    )
    losses = dict(zip(filled, (float(loss.mean()) for loss in scores), strict=True))
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
    with applying(loaded, edit):
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
    edited = edit.rows_of(loaded.embedding_name)
    return np.array([sum(i in edited for i in loaded.encode(text)) for text in texts])
