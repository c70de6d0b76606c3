"""Edits: new values for named tensors of a model, applied, undone, composed and saved."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ember.errors import DamagedFileError, EmberError, WrongWeightsError
from ember.models.loading import LoadedModel, weights_hash
from ember.models.weights import tensor_hash
from ember.rows import TensorEdit, write
from ember.store.files import digest, read_sealed, sealed_dir

if TYPE_CHECKING:  # an edit is made, applied and saved without it
    import pandas as pd

FORMAT = 2
MANIFEST = "edit.json"


@dataclass(frozen=True)
class Provenance:
    """What an edit was made from. ``side`` tells which embedding matrices it may touch (or ``none``)."""

    base_model: str
    base_hash: str
    method: str
    config: Mapping[str, Any]
    seed: int
    concept: str = ""
    side: str = "input"
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # As JSON will give it back: lists for tuples.
        object.__setattr__(self, "config", json.loads(json.dumps(self.config)))


@dataclass(frozen=True)
class Edit:
    """A change of a model's parameters that can be applied, undone to the bit, composed and saved.

    ``tensors`` maps parameter names to their new values. Applying an edit to weights other than those it was made
    for raises ``WrongWeightsError``.
    """

    tensors: Mapping[str, TensorEdit]
    provenance: Provenance
    _edited: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_values(
        cls, loaded: LoadedModel, values: Mapping[str, tuple[torch.Tensor | None, torch.Tensor]], provenance: Provenance
    ) -> "Edit":
        """Build an edit of the model's present parameters from ``{name: (rows or None for all, new values)}``."""
        tensors = {
            name: TensorEdit.of(name, _parameter(loaded.model, name).detach(), rows, new)
            for name, (rows, new) in values.items()
        }
        return cls(tensors, provenance)

    @contextmanager
    def applied(self, model: LoadedModel | nn.Module) -> Iterator[None]:
        """Apply on entry; restore every touched parameter bit for bit on exit, also after an exception.

        A loaded model's hashes stay true meanwhile, so that no cache mistakes it for the base.
        """
        module, saved = self._checked(model), []
        hashes = model.parameter_hashes if isinstance(model, LoadedModel) else {}
        try:
            for data, change in self._targets(module):
                saved.append((data, change.rows, data[change.rows.to(data.device)].clone()))
                write(data, change.rows, change.values)
            self._tell(model, module)
            yield
        finally:
            for data, rows, old in reversed(saved):
                write(data, rows, old)
            if isinstance(model, LoadedModel):
                model.parameter_hashes = hashes

    def apply(self, model: LoadedModel | nn.Module) -> None:
        """Apply for good. The whole model is hashed first, so a model that differs anywhere is refused."""
        module = self._checked(model)
        if (hashed := weights_hash(module)) != self.provenance.base_hash:
            raise self._refusal(f"its weights hash to {hashed[:12]}")
        for data, change in self._targets(module):
            write(data, change.rows, change.values)
        self._tell(model, module)

    def _targets(self, module: nn.Module) -> list[tuple[torch.Tensor, TensorEdit]]:
        return [(_parameter(module, name).detach(), change) for name, change in self.tensors.items()]

    def _tell(self, model: LoadedModel | nn.Module, module: nn.Module) -> None:
        """Give a loaded model the hashes of the edited parameters; always the same, as the base is."""
        if isinstance(model, LoadedModel):
            if not self._edited:
                self._edited.update({name: tensor_hash(module.get_parameter(name)) for name in self.tensors})
            model.parameter_hashes = model.parameter_hashes | self._edited

    def then(self, later: "Edit") -> "Edit":
        """The edit that equals this one followed by ``later``, which was made with this one applied.

        If ``later`` expects other values in a row that this edit sets, that is a ``WrongWeightsError``.
        """
        tensors = dict(self.tensors)
        for name, change in later.tensors.items():
            tensors[name] = tensors[name].then(change, name) if name in tensors else change
        first, second = self.provenance, later.provenance
        sides = sorted({first.side, second.side} - {"none"}) or ["none"]
        provenance = replace(
            first,
            method=f"{first.method}+{second.method}",
            config={"steps": [*self.steps, *later.steps]},
            side=sides[0] if len(sides) == 1 else "both",
        )
        return Edit(tensors, provenance)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The single edits that this one is composed of, in order: method, config, seed, concept."""
        made = self.provenance
        if "+" in made.method:  # a composition; a training method's setting called steps is a number
            return list(made.config["steps"])
        return [{"method": made.method, "config": made.config, "seed": made.seed, "concept": made.concept}]

    @property
    def identity(self) -> str:
        """Short hash of what the edit sets and the weights it is for; for cache keys."""
        parts = [(name, c.rows.numpy().tobytes(), tensor_hash(c.values)) for name, c in sorted(self.tensors.items())]
        return digest(self.provenance.base_hash, *parts)

    @property
    def nbytes(self) -> int:
        """Size in memory of its new values."""
        return sum(change.values.nbytes for change in self.tensors.values())

    def rows_of(self, name: str) -> frozenset[int]:
        """Indices of the rows it sets in one parameter; none where it leaves that alone."""
        return frozenset(self.tensors[name].rows.tolist()) if name in self.tensors else frozenset()

    def changed(self) -> "pd.DataFrame":
        """What is replaced: one line for each row (index along the first dimension) of each parameter, by name."""
        import pandas as pd

        pairs = [(name, row) for name in sorted(self.tensors) for row in self.tensors[name].rows.tolist()]
        return pd.DataFrame(pairs, columns=["parameter", "row"])

    def save(self, folder: str | Path) -> Path:
        """Write ``edit.safetensors``, ``edit.json`` and a model card; whole or not at all."""
        arrays = {
            f"{name}::{part}": tensor.contiguous()
            for name, change in self.tensors.items()
            for part, tensor in vars(change).items()
        }
        about = {"format": FORMAT, "provenance": vars(self.provenance)}
        with sealed_dir(Path(folder), about, manifest=MANIFEST) as target:
            save_file(arrays, target / "edit.safetensors")
            (target / "README.md").write_text(_model_card(self), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Edit":
        """Read an edit written by ``save``; a missing, foreign or damaged file is an error that names it."""
        about = read_sealed(Path(folder), manifest=MANIFEST)
        if about.get("format") != FORMAT:
            raise DamagedFileError(f"{folder} has edit format {about.get('format')}, this version reads {FORMAT}")
        parts: dict[str, dict[str, torch.Tensor]] = {}
        try:
            for key, tensor in load_file(Path(folder) / "edit.safetensors").items():
                name, _, part = key.partition("::")
                parts.setdefault(name, {})[part] = tensor
            tensors = {name: TensorEdit(**parts[name]) for name in sorted(parts)}
            return cls(tensors, Provenance(**about["provenance"]))
        except (OSError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{folder} does not hold a whole edit: {error!r}") from error

    def _checked(self, model: LoadedModel | nn.Module) -> nn.Module:
        module = model.model if isinstance(model, LoadedModel) else model
        if isinstance(model, LoadedModel) and model.weights_hash != self.provenance.base_hash:
            raise self._refusal(f"its weights hash to {model.weights_hash[:12]}")
        targets = self._targets(module)
        names = _names_by_address(module, {data.data_ptr() for data, _ in targets})
        for name, (data, change) in zip(self.tensors, targets, strict=True):
            if len(shared := names[data.data_ptr()]) > 1:
                advice = "untie them before an edit (ember.models.loading.untie)"
                raise EmberError(f"{' and '.join(shared)} share storage; {advice}")
            if not change.fits(data):
                raise self._refusal(f"{name} holds other values than when the edit was made")
        return module

    def _refusal(self, reason: str) -> WrongWeightsError:
        made = self.provenance
        made_for = f"this {made.method} edit was made for {made.base_model} ({made.base_hash[:12]})"
        return WrongWeightsError(f"{made_for}; {reason}")


def applying(loaded: LoadedModel, edit: Edit | None) -> AbstractContextManager[None]:
    """``edit.applied(loaded)``, or with None nothing at all."""
    return nullcontext() if edit is None else edit.applied(loaded)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    try:
        return module.get_parameter(name)
    except AttributeError as error:
        raise WrongWeightsError(f"the model has no parameter {name!r}") from error


def _names_by_address(module: nn.Module, addresses: set[int]) -> dict[int, list[str]]:
    """The names under which a module holds the storages at these addresses.

    Every edit asks, however small, so this looks into the modules directly: ``named_parameters`` takes longer than an
    edit of a few rows.
    """
    names: dict[int, list[str]] = {address: [] for address in addresses}
    pending = [("", module)]
    while pending:
        prefix, part = pending.pop()
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.data_ptr() in names:
                names[parameter.data_ptr()].append(prefix + name)
        pending += [(f"{prefix}{name}.", child) for name, child in part._modules.items() if child is not None]
    return {address: sorted(held) for address, held in names.items()}


def _model_card(edit: Edit) -> str:
    made = edit.provenance
    touched = "\n".join(f"- `{name}`: {len(edit.rows_of(name))} rows" for name in sorted(edit.tensors))
    return (
        f"---\nbase_model: {made.base_model}\nlibrary_name: ember\ntags: [concept-erasure, model-editing]\n---\n\n"
        f"# {made.method} edit: {made.concept or 'no concept named'}\n\n"
        f"New parameter values for {made.base_model} (weights {made.base_hash}), seed {made.seed}.\n\n{touched}\n\n"
        "Apply with `Edit.load(folder).apply(load_model(name))`; other weights are refused. It contains no base\n"
        "weights beyond the rows it changes and is subject to the base model's licence.\n"
    )
