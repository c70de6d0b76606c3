"""Question sets and texts → one tidy frame of per-item scores.

Options are scored by likelihood, and by generated letters only where asked for: small models answer "A" to every
letter question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from ember.data.types import SPLITS, Question
from ember.editing import Edit, applying
from ember.evaluation.letters import letter_scores
from ember.evaluation.suite import TEXT_SETS, Suite
from ember.models.loading import LoadedModel
from ember.models.scoring import TokenScores, generate_greedy, option_logprobs, sequence_scores

PROMPT = "Question: {question}\nAnswer:"
_COLUMNS = ["item", "metric", "value"]
_Scored = tuple[list[str], list[list[int]], list[int]]  # names of texts, their token ids, the first token scored


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
    size, sequences = suite.sizes[split], _sequences(loaded, suite, split)
    questions = [q for chosen in suite.questions.values() for q in chosen[split]]
    prompts = suite.instructions[split][: size.generations]
    asked = [loaded.encode_chat(i.instruction) for i in prompts]
    # Applied once for everything that needs the edited model alone: an edit of whole matrices is not cheap to apply.
    with applying(loaded, edit):
        frames = [question_scores(loaded, questions)]
        if size.letters:
            frames.append(letter_scores(loaded, questions))
        frames = [f.assign(set=np.repeat([q.set for q in questions], len(f) // len(questions))) for f in frames]
        if not size.divergence:
            for name, (names, ids, starts) in sequences.items():
                losses = sequence_scores(loaded, ids, starts, batch_size=16)
                frames.append(_token_means(names, losses, "loss").assign(set=name))
        outputs = generate_greedy(loaded, asked, max_new_tokens=size.new_tokens)
    if size.divergence:
        frames += [_divergence_rows(loaded, texts, edit).assign(set=name) for name, texts in sequences.items()]
    samples = pd.DataFrame({"item": [i.id for i in prompts], "prompt": [i.instruction for i in prompts]})
    samples["text"] = [loaded.decode(output) for output in outputs]
    frames.append(_generation_rows(loaded, samples, asked, outputs).assign(set="generation"))
    items = pd.concat([f for f in frames if len(f)], ignore_index=True)[["set", *_COLUMNS]]
    return Evaluation(items, samples)


def _sequences(loaded: LoadedModel, suite: Suite, split: str) -> dict[str, _Scored]:
    """What is scored token by token, by set."""
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
        return _question_rows(questions, option_logprobs(loaded, prompts, options))


def _question_rows(questions: Sequence[Question], totals: Sequence[np.ndarray]) -> pd.DataFrame:
    """Scores of the right options from the log-likelihoods of each question's four [4], summed over tokens."""
    rows = []
    for question, total in zip(questions, totals, strict=True):
        lengths, gold = np.array([len(option) for option in question.options]), question.gold
        per_char = total / lengths
        scaled = per_char * lengths.mean()
        weights = np.exp(scaled - scaled.max())
        rows.append((question.id, "correct", float(per_char.argmax() == gold)))
        rows.append((question.id, "gold_prob", float(weights[gold] / weights.sum())))
        rows.append((question.id, "gold_logprob", float(per_char[gold])))
    return pd.DataFrame(rows, columns=_COLUMNS)


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
    names, ids = [str(i) for i in range(len(texts))], [loaded.encode(text) for text in texts]
    return _divergence_rows(loaded, (names, ids, [1] * len(texts)), edit)


def _divergence_rows(loaded: LoadedModel, texts: _Scored, edit: Edit | None) -> pd.DataFrame:
    names, ids, starts = texts
    scores = sequence_scores(loaded, ids, starts, partial(edit.applied, loaded) if edit else None)
    return _token_means(names, scores, "loss", "kl")


def _token_means(names: Sequence[str], scores: Sequence[TokenScores], *metrics: str) -> pd.DataFrame:
    pairs = list(zip(names, scores, strict=True))
    rows = [(name, metric, float(getattr(score, metric).mean())) for metric in metrics for name, score in pairs]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _generation_rows(
    loaded: LoadedModel, samples: pd.DataFrame, prompts: list[list[int]], outputs: list[list[int]]
) -> pd.DataFrame:
    """Scores of generated token ids under the model as it is now; an empty text has no loss."""
    filled = [k for k, output in enumerate(outputs) if output]
    texts, starts = [[*prompts[k], *outputs[k]] for k in filled], [len(prompts[k]) for k in filled]
    scores = sequence_scores(loaded, texts, starts, batch_size=16)
    losses = {k: float(score.loss.mean()) for k, score in zip(filled, scores, strict=True)}
    rows: list[tuple[str, str, float]] = []
    for k, sample in enumerate(samples.itertuples()):
        rows.append((sample.item, "gen_loss", losses.get(k, float("nan"))))
        rows.append((sample.item, "distinct", _distinct_trigrams(sample.text)))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _distinct_trigrams(text: str) -> float:
    """Share of word trigrams that are not repeats; 1 for one or two words, 0 for an empty text."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(grams)) / len(grams) if grams else float(bool(words))


def generate_samples(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], edit: Edit | None = None, *, max_new_tokens: int = 40
) -> list[list[int]]:
    """Greedy continuations (token ids) of tokenized prompts, with ``edit`` applied if given."""
    with applying(loaded, edit):
        return generate_greedy(loaded, prompts, max_new_tokens=max_new_tokens)


def edited_token_counts(loaded: LoadedModel, edit: Edit, texts: Sequence[str]) -> np.ndarray:
    """How many tokens of each text [n_texts] have an edited embedding row."""
    edited = edit.rows_of(loaded.embedding_name)
    return np.array([sum(i in edited for i in loaded.encode(text)) for text in texts])
