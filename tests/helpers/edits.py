"""Edits and parameters to compare."""

from dataclasses import replace

import torch

from ember.editing import Edit, Provenance
from ember.models.loading import LoadedModel

SETTINGS = {"rank": 8, "sparsity": 0.1, "max_iter": 60, "patience": 20, "features": (0, 1)}
FILES = ["README.md", "edit.json", "edit.safetensors"]
EMBED, HEAD, UP, NORM = (
    "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight",
)  # fmt: skip


def provenance_of(loaded: LoadedModel, method: str = "noise", **changes) -> Provenance:
    made = Provenance(loaded.name, loaded.weights_hash, method, {"scale": 0.5}, 7, "Tiny Rome", versions={"torch": "x"})
    return replace(made, **changes)


def noise_edit(loaded: LoadedModel, rows: dict[str, list[int]], *, seed: int = 0, **provenance) -> Edit:
    """New random values for the named rows of the model as it is now."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, chosen in rows.items():
        old = loaded.model.get_parameter(name).detach()[chosen]
        values[name] = (torch.tensor(chosen), old + torch.randn(old.shape, generator=generator).to(old.dtype))
    return Edit.from_values(loaded, values, provenance_of(loaded, **provenance))


def later_edit(loaded: LoadedModel, first: Edit, rows: dict[str, list[int]], **provenance) -> Edit:
    with first.applied(loaded):
        return noise_edit(loaded, rows, seed=1, **provenance)


def snapshot(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in loaded.model.state_dict().items()}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[tuple[str, int]]:
    """Every row of every parameter that is not the same to the bit."""
    integers = {2: torch.int16, 4: torch.int32}
    found = set()
    for name, old in before.items():
        kind = integers[old.element_size()]
        rows = (old.view(kind) != after[name].view(kind)).reshape(len(old), -1).any(1)
        found |= {(name, int(row)) for row in rows.nonzero()}
    return found


def state_with(edit: Edit, loaded: LoadedModel) -> dict[str, torch.Tensor]:
    with edit.applied(loaded):
        return snapshot(loaded)


def listed(edit: Edit) -> set[tuple[str, int]]:
    return set(edit.changed().itertuples(index=False, name=None))


def assert_same_edit(one: Edit, other: Edit) -> None:
    assert one.provenance == other.provenance
    assert one.tensors.keys() == other.tensors.keys()
    for name, change in one.tensors.items():
        for part in ("rows", "values", "before"):
            a, b = getattr(change, part), getattr(other.tensors[name], part)
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
