"""The tokens of the concept and neutral sentences (V'): roles, background frequency, keyness, preview of an edit."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ember.models.loading import LoadedModel

ORDINARY_ZIPF = 4.0  # at least ten occurrences in a million words
KEY_G2 = 15.13  # log-likelihood ratio at p < 0.0001 (Rayson & Garside 2000)
_BACKGROUND_FLOOR = 1e-9  # the rarest words of the list are this frequent


def token_table(
    loaded: LoadedModel, concept: Sequence[str], neutral: Sequence[str], further: Sequence[str] = ()
) -> pd.DataFrame:
    """V', the unique tokens of the concept and neutral sentences without special tokens, one row each.

    ``further`` neutral sentences add no tokens to V', but a concept token that occurs in one of them counts as
    ``shared``: a few hundred sentences are too few to call an ordinary word concept-only.

    Columns
    -------
    token_id, token
        Id and text (a leading space is part of it).
    role
        ``concept`` (only in concept sentences), ``neutral`` (only in neutral ones) or ``shared`` (paper, section 3).
    concept_count, neutral_count
        Occurrences; those in ``further`` sentences count as neutral.
    zipf
        Background frequency, log10 per 10⁹ words of general English (``wordfreq``); an upper bound, because the
        list ignores case. NaN for tokens without letters.
    expected
        Occurrences expected in the concept sentences at the background frequency.
    keyness
        log2 of observed over expected occurrences in the concept sentences, both plus one half; 0 without letters.
    key
        Whether the surplus is significant (log-likelihood ratio ≥ 15.13, p < 0.0001).
    ordinary
        Whether the token is frequent in general English (zipf ≥ 4) and not key.

    A list of sentences that is empty or holds an empty one is a ``ValueError``.
    """
    counts = {}
    for name, sentences in (("concept", concept), ("neutral", neutral)):
        if not sentences or any(not sentence.strip() for sentence in sentences):
            raise ValueError(f"the {name} sentences are empty or hold an empty sentence")
        counts[name] = Counter(i for sentence in sentences for i in loaded.encode(sentence, bos=False))
    counts["further"] = Counter(i for sentence in further for i in loaded.encode(sentence, bos=False))
    ids = sorted((counts["concept"].keys() | counts["neutral"].keys()) - loaded.special_ids)
    table = pd.DataFrame({"token_id": ids, "token": [loaded.tokenizer.decode([i]) for i in ids]})
    table["concept_count"] = [counts["concept"][i] for i in ids]
    table["neutral_count"] = [counts["neutral"][i] + counts["further"][i] for i in ids]
    table["role"] = np.select([table.neutral_count == 0, table.concept_count == 0], ["concept", "neutral"], "shared")
    words = sum(len(sentence.split()) for sentence in concept)
    return _add_keyness(table, background_frequency(loaded), words)


def _add_keyness(table: pd.DataFrame, background: dict[int, float], words: int) -> pd.DataFrame:
    lettered = table.token.str.strip().str.replace(r"['’\-]", "", regex=True).str.isalpha()
    frequency = table.token_id.map(background).fillna(0.0).clip(lower=_BACKGROUND_FLOOR)
    observed, expected = table.concept_count, frequency * words
    table["zipf"] = np.where(lettered, np.log10(frequency) + 9, np.nan)
    table["expected"] = np.where(lettered, expected, np.nan)
    table["keyness"] = np.where(lettered, np.log2((observed + 0.5) / (expected + 0.5)), 0.0)
    g2 = 2 * (observed * np.log(observed.clip(lower=1) / expected) - (observed - expected))
    table["key"] = lettered & (observed > expected) & (g2 >= KEY_G2)
    table["ordinary"] = (table.zipf >= ORDINARY_ZIPF) & ~table.key
    return table


_BACKGROUNDS: dict[str, dict[int, float]] = {}


def background_frequency(loaded: LoadedModel) -> dict[int, float]:
    """Expected occurrences of each token id per word of general English.

    Every word of the ``wordfreq`` list is tokenized as it stands after a space in lower case, capitalized after a
    space, and capitalized at the start of a text; each form gets the word's whole frequency, since the list does not
    tell them apart. So a token's value is an upper bound, and keyness is never overstated.
    """
    from wordfreq import get_frequency_dict

    key = loaded.tokenizer.name_or_path
    if key not in _BACKGROUNDS:
        words = get_frequency_dict("en", wordlist="small")
        totals: defaultdict[int, float] = defaultdict(float)
        for form in (lambda w: " " + w, lambda w: " " + w.capitalize(), str.capitalize):
            encoded = loaded.tokenizer([form(word) for word in words], add_special_tokens=False)["input_ids"]
            for ids, frequency in zip(encoded, words.values(), strict=True):
                for i in ids:
                    totals[i] += frequency
        _BACKGROUNDS[key] = dict(totals)
    return _BACKGROUNDS[key]


def preview_rows(loaded: LoadedModel, table: pd.DataFrame, change: dict[int, torch.Tensor]) -> pd.DataFrame:
    """What an edit would touch: one row for each token whose embedding changes.

    ``change`` maps token ids to the vector [d_model] that is added to their row of E. The columns of
    ``token_table`` are joined by ``norm`` (ℓ2 norm of the row) and ``change`` (ℓ2 norm of what is added), and
    sorted by ``change``.
    """
    ids = list(change)
    rows = table.set_index("token_id").loc[ids].reset_index()
    rows["norm"] = loaded.embedding.detach()[ids].norm(dim=1).tolist()
    rows["change"] = [float(change[i].norm()) for i in ids]
    columns = ["token_id", "token", "role", "norm", "change", "concept_count", "neutral_count", "zipf", "ordinary"]
    return rows[columns].sort_values("change", ascending=False, ignore_index=True)
