"""Edits: new values for named tensors of a model, applied, undone, composed and saved."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ember.errors import DamagedFileError, EmberError, WrongWeightsError
from ember.models.hashes import tensor_hash
from ember.models.loading import LoadedModel, weights_hash
from ember.store.files import digest, read_sealed, sealed_dir

FORMAT = 2
MANIFEST = "edit.json"


@dataclass(frozen=True)
class TensorEdit:
    """New values of one parameter.

    ``rows`` [r] are indices along its first dimension, ``values`` [r, …] the new rows, and ``before`` [r] int64
    fingerprints of the rows they replace.
    """

    rows: torch.Tensor
    values: torch.Tensor
    before: torch.Tensor


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
        tensors = {}
        for name, (rows, new) in values.items():
            parameter = _parameter(loaded.model, name).detach()
            where = torch.arange(len(parameter)) if rows is None else rows.detach().cpu().clone()
            if where.dtype != torch.int64:
                raise ValueError(f"{name}: rows must be int64 indices, got {where.dtype}")
            if len(where) and not 0 <= int(where.min()) <= int(where.max()) < len(parameter):
                raise ValueError(f"{name}: rows must be 0..{len(parameter) - 1}")
            old = parameter[where.to(parameter.device)]
            if old.shape != new.shape:
                raise ValueError(f"{name}: new values have shape {tuple(new.shape)}, the rows {tuple(old.shape)}")
            if len(where.unique()) != len(where):
                raise ValueError(f"{name}: a row occurs twice")
            tensors[name] = TensorEdit(where, new.detach().to("cpu", old.dtype).clone(), _fingerprint(old))
        return cls(tensors, provenance)

    @contextmanager
    def applied(self, model: LoadedModel | nn.Module) -> Iterator[None]:
        """Apply on entry; restore every touched parameter bit for bit on exit, also after an exception."""
        module = self._checked(model)
        saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        try:
            for name, change in self.tensors.items():
                data = module.get_parameter(name).detach()
                rows = change.rows.to(data.device)
                saved.append((data, rows, data[rows].clone()))
                _write(data, rows, change.values)
            with self._tracked(model):
                yield
        finally:
            for data, rows, old in reversed(saved):
                _write(data, rows, old)

    @contextmanager
    def _tracked(self, model: LoadedModel | nn.Module) -> Iterator[None]:
        """Keep a loaded model's hashes true while the edit is applied, so that no cache mistakes it for the base."""
        if not isinstance(model, LoadedModel):
            yield
            return
        before = model.parameter_hashes
        model.parameter_hashes = before | self._edited_hashes(model.model)
        try:
            yield
        finally:
            model.parameter_hashes = before

    def _edited_hashes(self, module: nn.Module) -> dict[str, str]:
        """Hashes of the touched parameters with the edit in place; always the same, as the base is."""
        if not self._edited:
            self._edited.update({name: tensor_hash(module.get_parameter(name)) for name in self.tensors})
        return self._edited

    def apply(self, model: LoadedModel | nn.Module) -> None:
        """Apply for good. The whole model is hashed first, so a model that differs anywhere is refused."""
        module = self._checked(model)
        found = weights_hash(module)
        if found != self.provenance.base_hash:
            raise WrongWeightsError(self._refusal(f"its weights hash to {found[:12]}"))
        for name, change in self.tensors.items():
            data = module.get_parameter(name).detach()
            _write(data, change.rows.to(data.device), change.values)
        if isinstance(model, LoadedModel):
            model.parameter_hashes = model.parameter_hashes | self._edited_hashes(module)

    def then(self, later: "Edit") -> "Edit":
        """The edit that equals this one followed by ``later``, which was made with this one applied.

        Raises
        ------
        WrongWeightsError
            If ``later`` expects other values in a row that this edit sets.
        """
        tensors = dict(self.tensors)
        for name, change in later.tensors.items():
            tensors[name] = _compose(name, tensors[name], change) if name in tensors else change
        first, second = self.provenance, later.provenance
        provenance = replace(
            first,
            method=f"{first.method}+{second.method}",
            config={"steps": [*self.steps, *later.steps]},
            side=_joint_side(first.side, second.side),
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

    def changed(self) -> pd.DataFrame:
        """What is replaced: one line for each row (index along the first dimension) of each parameter, by name."""
        frames = [
            pd.DataFrame({"parameter": name, "row": self.tensors[name].rows.numpy()}) for name in sorted(self.tensors)
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["parameter", "row"])

    def save(self, folder: str | Path) -> Path:
        """Write ``edit.safetensors``, ``edit.json`` and a model card; whole or not at all."""
        arrays = {
            f"{name}::{part}": getattr(change, part).contiguous()
            for name, change in self.tensors.items()
            for part in ("rows", "values", "before")
        }
        about = {"format": FORMAT, "provenance": vars(self.provenance), "tensors": sorted(self.tensors)}
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
        try:
            arrays = load_file(Path(folder) / "edit.safetensors")
            if {key.split("::")[0] for key in arrays} != set(about["tensors"]):
                raise DamagedFileError(f"{folder} is damaged: edit.json and edit.safetensors name different tensors")
            tensors = {
                name: TensorEdit(*(arrays[f"{name}::{part}"] for part in ("rows", "values", "before")))
                for name in about["tensors"]
            }
            return cls(tensors, Provenance(**about["provenance"]))
        except (OSError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{folder} does not hold a whole edit: {error!r}") from error

    def _checked(self, model: LoadedModel | nn.Module) -> nn.Module:
        module = model.model if isinstance(model, LoadedModel) else model
        if isinstance(model, LoadedModel) and model.weights_hash != self.provenance.base_hash:
            raise WrongWeightsError(self._refusal(f"its weights hash to {model.weights_hash[:12]}"))
        owners = _owners(module, {_parameter(module, name).data_ptr() for name in self.tensors})
        for name, change in self.tensors.items():
            parameter = _parameter(module, name)
            shared = owners[parameter.data_ptr()]
            if len(shared) > 1:
                raise EmberError(
                    f"{' and '.join(shared)} share storage; untie them before an edit (ember.models.loading.untie)"
                )
            old = parameter.detach()[change.rows.to(parameter.device)]
            same_kind = old.shape == change.values.shape and old.dtype == change.values.dtype
            if not same_kind or not torch.equal(_fingerprint(old), change.before):
                raise WrongWeightsError(self._refusal(f"{name} holds other values than when the edit was made"))
        return module

    def _refusal(self, found: str) -> str:
        made = self.provenance
        return f"this {made.method} edit was made for {made.base_model} ({made.base_hash[:12]}); {found}"


def applying(loaded: LoadedModel, edit: Edit | None) -> AbstractContextManager[None]:
    """``edit.applied(loaded)``, or with None nothing at all."""
    return nullcontext() if edit is None else edit.applied(loaded)


def _joint_side(first: str, second: str) -> str:
    """Which embedding matrices two edits touch between them."""
    touched = {first, second} - {"none"}
    return touched.pop() if len(touched) == 1 else "both" if touched else "none"


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    try:
        return module.get_parameter(name)
    except AttributeError as error:
        raise WrongWeightsError(f"the model has no parameter {name!r}") from error


def _owners(module: nn.Module, storages: set[int]) -> dict[int, list[str]]:
    """The names under which a module holds the storages, by their addresses.

    Every edit asks, however small, so this looks into the modules directly: ``named_parameters`` takes longer than an
    edit of a few rows.
    """
    found: dict[int, list[str]] = {}
    pending = [("", module)]
    while pending:
        prefix, part = pending.pop()
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.data_ptr() in storages:
                found.setdefault(parameter.data_ptr(), []).append(prefix + name)
        pending += [(f"{prefix}{name}.", child) for name, child in part._modules.items() if child is not None]
    return {address: sorted(names) for address, names in found.items()}


def _write(data: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    with torch.no_grad():
        data[rows] = values.to(data)


def _fingerprint(values: torch.Tensor) -> torch.Tensor:
    """One int64 for each row, from its bytes; catches accidents, not forgery (that is ``weights_hash``'s work)."""
    flat = values.detach().cpu().reshape(len(values), -1).contiguous()
    words = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).long()
    limit = 2**62
    weights = torch.randint(-limit, limit, (words.shape[1],), generator=torch.Generator().manual_seed(0))
    return (words * weights).sum(1)


def _compose(name: str, first: TensorEdit, later: TensorEdit) -> TensorEdit:
    """Rows of both; values of the later one where they meet, fingerprints of the earlier one."""
    left = dict(zip(first.rows.tolist(), _fingerprint(first.values).tolist(), strict=True))
    for row, expected in zip(later.rows.tolist(), later.before.tolist(), strict=True):
        if left.get(row, expected) != expected:
            raise WrongWeightsError(f"{name}, row {row}: the later edit was not made with the earlier one applied")
    values = {int(r): v for change in (first, later) for r, v in zip(change.rows, change.values, strict=True)}
    before = {int(r): b for change in (later, first) for r, b in zip(change.rows, change.before, strict=True)}
    rows = sorted(values)
    return TensorEdit(
        torch.tensor(rows), torch.stack([values[r] for r in rows]), torch.stack([before[r] for r in rows])
    )


def _model_card(edit: Edit) -> str:
    made, rows = edit.provenance, edit.changed()
    touched = "\n".join(f"- `{name}`: {len(group)} rows" for name, group in rows.groupby("parameter"))
    return (
        f"---\nbase_model: {made.base_model}\nlibrary_name: ember\ntags: [concept-erasure, model-editing]\n---\n\n"
        f"# {made.method} edit: {made.concept or 'no concept named'}\n\n"
        f"New parameter values for {made.base_model} (weights {made.base_hash}), seed {made.seed}.\n\n{touched}\n\n"
        "Apply with `Edit.load(folder).apply(load_model(name))`; other weights are refused. It contains no base\n"
        "weights beyond the rows it changes and is subject to the base model's licence.\n"
    )
