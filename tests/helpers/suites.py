"""Suites for the tiny models."""

from dataclasses import replace

import pandas as pd
import torch

from ember.data.types import Instruction, SharedData
from ember.editing import Edit, Provenance
from ember.evaluation.evaluate import Evaluation
from ember.evaluation.suite import Sizes, Suite, load_suite
from ember.models.loading import LoadedModel
from helpers.tiny import NEUTRAL, SENTENCES, make_concept


def shared_data() -> SharedData:
    general = [replace(q, set="general", id=f"general-{q.id}") for q in make_concept().questions if q.set == "concept"]
    answer = "Yes, the Romans carried bread."
    instructions = [
        Instruction(f"i-{split}-{k}", split, f"The Romans marched {k} times along the {split}.", answer)
        for split in ("train", "test") for k in range(3)
    ]  # fmt: skip
    neutral = {"train": (*NEUTRAL, SENTENCES[0]), "test": NEUTRAL[1:]}
    return SharedData(tuple(general), neutral, tuple(instructions), NEUTRAL)


def suite_of(**sizes) -> Suite:
    """Two paragraphs a split: a comparison needs at least two items of each set."""
    concept = replace(make_concept(), paragraphs=SENTENCES * 4)
    sizes = {split: Sizes(**{"new_tokens": 4} | sizes) for split in ("train", "test")}
    return load_suite(concept, sizes, shared=shared_data())


def blank(loaded: LoadedModel, *words: str) -> Edit:
    """An edit that empties the input rows of one-token words."""
    rows = torch.tensor([loaded.encode(word, bos=False) for word in words]).flatten()
    values = {loaded.embedding_name: (rows, torch.zeros(len(rows), loaded.embedding.shape[1]))}
    return Edit.from_values(loaded, values, Provenance(loaded.name, loaded.weights_hash, "blank", {}, 0))


def values_of(evaluation: Evaluation, set_: str, metric: str) -> pd.Series:
    items = evaluation.items
    return items[(items.set == set_) & (items.metric == metric)].set_index("item").value


def talkative(loaded: LoadedModel) -> LoadedModel:
    """The tied head of a random model repeats its last token; another head does not."""
    with torch.no_grad():
        loaded.model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return LoadedModel(loaded.model, loaded.tokenizer, loaded.spec, loaded.architecture)
