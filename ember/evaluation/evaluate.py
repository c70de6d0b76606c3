"""Question sets and texts → one tidy frame of per-item scores.

Options are scored by likelihood, and by generated letters only where asked for: small models answer "A" to every
letter question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from ember.data.types import SPLITS, Instruction, Question
from ember.editing import Edit, applying
from ember.evaluation.letters import letter_scores
from ember.evaluation.suite import TEXT_SETS, Suite
from ember.models.loading import LoadedModel
from ember.models.scoring import generate_greedy, option_logprobs, sequence_losses, sequence_scores

PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Evaluation:
    """``items``: set, item, metric, value (one row a score). ``samples``: item, prompt, text (generations)."""

    items: pd.DataFrame
    samples: pd.DataFrame


def evaluate(loaded: LoadedModel, suite: Suite, split: str, edit: Edit | None = None) -> Evaluation:
    """Score the model, with ``edit`` applied if given, on one split of the suite.

    Per item of a question set: ``correct`` (the right option has the highest log-likelihood per character),
    ``gold_prob`` and ``gold_logprob`` (see ``question_scores``), and where the sizes ask for letters ``letter_correct``
    and ``letter_valid``. Per text: ``loss`` (nats per token) and ``kl`` from the model as loaded (nats per token). Per
    generation: ``gen_loss``, the text's loss under the model as loaded, and ``distinct``, the share of its word
    trigrams that are not repeats. The model is left as it was.
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
        scored = question_scores(loaded, questions)
        frames = [scored.assign(set=np.repeat([q.set for q in questions], len(scored) // len(questions)))]
        if size.letters:
            lettered = letter_scores(loaded, questions)
            frames.append(lettered.assign(set=np.repeat([q.set for q in questions], 2)))
        if not size.divergence:
            frames += [
                _loss_rows(names, sequence_losses(loaded, texts, starts)).assign(set=name)
                for name, (names, texts, starts) in sequences.items()
            ]
        outputs = generate_greedy(loaded, asked, max_new_tokens=size.new_tokens)
    if size.divergence:
        for name, (names, texts, starts) in sequences.items():
            frames.append(_divergence_rows(loaded, names, texts, starts, edit).assign(set=name))
    generated, samples = _generation_scores(loaded, prompts, asked, outputs)
    frames.append(generated.assign(set="generation"))
    items = pd.concat([f for f in frames if len(f)], ignore_index=True)[["set", "item", "metric", "value"]]
    return Evaluation(items, samples)


def _sequences(
    loaded: LoadedModel, suite: Suite, split: str
) -> dict[str, tuple[list[str], list[list[int]], list[int]]]:
    """What is scored token by token, by set: names, token ids, and from which token on."""
    texts = {name: [loaded.encode(text) for text in suite.texts[name][split]] for name in TEXT_SETS}
    sets = {name: ([str(i) for i in range(len(ids))], ids, [1] * len(ids)) for name, ids in texts.items() if ids}
    instructions = suite.instructions[split][: suite.sizes[split].instructions]
    prompts = [loaded.encode_chat(i.instruction) for i in instructions]
    whole = [[*p, *loaded.encode(i.response, bos=False)] for p, i in zip(prompts, instructions, strict=True)]
    return sets | {"instruction": ([i.id for i in instructions], whole, [len(p) for p in prompts])}


def question_scores(
    loaded: LoadedModel, questions: Sequence[Question], edit: Edit | None = None, *, prompt: str = PROMPT
) -> pd.DataFrame:
    """Item scores of multiple-choice questions: item, metric, value.

    ``gold_logprob`` is the right option's log-likelihood per character (nats). ``gold_prob`` is its probability
    among the four options, each option's log-likelihood per character taken times the mean length of the options:
    the soft counterpart of ``correct``, free of length bias.
    """
    prompts = [prompt.format(question=q.question) for q in questions]
    options = [[f" {option}" for option in q.options] for q in questions]
    with applying(loaded, edit):
        totals = option_logprobs(loaded, prompts, options)
    return _question_rows(questions, totals)


def _question_rows(questions: Sequence[Question], totals: Sequence[np.ndarray]) -> pd.DataFrame:
    """Scores of the right options from the log-likelihoods of each question's four [4], summed over tokens."""
    rows = []
    for question, total in zip(questions, totals, strict=True):
        lengths = np.array([len(option) for option in question.options])
        per_char = total / lengths
        scaled = per_char * lengths.mean()
        weights = np.exp(scaled - scaled.max())
        rows += [
            (question.id, "correct", float(per_char.argmax() == question.gold)),
            (question.id, "gold_prob", float(weights[question.gold] / weights.sum())),
            (question.id, "gold_logprob", float(per_char[question.gold])),
        ]
    return pd.DataFrame(rows, columns=["item", "metric", "value"])


def blind_scores(loaded: LoadedModel, questions: Sequence[Question], *, prompt: str = PROMPT) -> pd.DataFrame:
    """As ``question_scores``, but after an empty question: what the options alone give away."""
    asked = "\n".join(line.rstrip() for line in prompt.format(question="").split("\n"))
    options = sorted({option for q in questions for option in q.options})
    groups = [[f" {option}" for option in options[k : k + 64]] for k in range(0, len(options), 64)]
    totals = option_logprobs(loaded, [asked] * len(groups), groups, batch_size=1)
    known = dict(zip(options, np.concatenate(totals), strict=True)) if groups else {}
    return _question_rows(questions, [np.array([known[option] for option in q.options]) for q in questions])


def text_scores(loaded: LoadedModel, texts: Sequence[str], edit: Edit | None = None) -> pd.DataFrame:
    """``loss`` and ``kl`` (nats per token, the first token is not scored) of raw texts; items are their positions."""
    names, sequences = [str(i) for i in range(len(texts))], [loaded.encode(text) for text in texts]
    return _divergence_rows(loaded, names, sequences, [1] * len(texts), edit)


def _divergence_rows(
    loaded: LoadedModel,
    names: Sequence[str],
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    edit: Edit | None,
) -> pd.DataFrame:
    edited = partial(edit.applied, loaded) if edit else None
    scores = sequence_scores(loaded, sequences, starts, edited)
    return _loss_rows(names, [score.loss for score in scores], [score.kl for score in scores])


def _loss_rows(
    names: Sequence[str], losses: Sequence[np.ndarray], divergences: Sequence[np.ndarray] = ()
) -> pd.DataFrame:
    rows = [(name, "loss", float(loss.mean())) for name, loss in zip(names, losses, strict=True)]
    rows += [(name, "kl", float(kl.mean())) for name, kl in zip(names, divergences, strict=False)]
    return pd.DataFrame(rows, columns=["item", "metric", "value"])


def _generation_scores(
    loaded: LoadedModel, instructions: Sequence[Instruction], prompts: list[list[int]], outputs: list[list[int]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of generated token ids under the model as it is now, and the texts."""
    filled = [k for k, output in enumerate(outputs) if output]
    scores = sequence_losses(loaded, [[*prompts[k], *outputs[k]] for k in filled], [len(prompts[k]) for k in filled])
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
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], edit: Edit | None = None, *, max_new_tokens: int = 40
) -> list[list[int]]:
    """Greedy continuations (token ids) of tokenized prompts, with ``edit`` applied if given."""
    with applying(loaded, edit):
        return generate_greedy(loaded, prompts, max_new_tokens=max_new_tokens)


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
