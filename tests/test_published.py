"""Published pickles: what is read, what is refused without running, and what is imported."""

import collections
import copyreg
import io
import os
import pickle
import re
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import make_concept
from torch import nn

from ember.errors import DataError
from ember.factorization import sparse_mf
from ember.features import ConceptFeatures, concept_features
from ember.methods.ember import EmberConfig, edit_from_features
from ember.methods.published import CLASSES, import_published
from ember.store.pickles import unpickle
from ember.tokens import token_table


@pytest.fixture
def theirs(monkeypatch):
    """A factorizer like theirs, under its published name: factors as parameters, a transposed view, plain settings."""
    module = types.ModuleType("factorization.seminmf")

    def __init__(self, F: torch.Tensor, G: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.F_, self.G_ = nn.Parameter(F), nn.Parameter(G)
        self.rank, self.fitting_device, self.dtype = F.shape[1], torch.device("cuda", 1), torch.float16
        self.W, self.H = self.G_.detach().clone(), self.F_.T

    module.NMFSemiNMF = type("NMFSemiNMF", (nn.Module,), {"__module__": module.__name__, "__init__": __init__})
    monkeypatch.setitem(sys.modules, "factorization", types.ModuleType("factorization"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.NMFSemiNMF


def written(folder: Path, content, *, protocol: int = 4) -> Path:
    """A file with this content: bytes as they are, anything else pickled."""
    path = folder / "file.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        unpickle(path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def contents(*, numpy: bool = True) -> dict:
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "plain": matrix, "view": matrix[1:, 1:3], "turned": matrix.T, "parameter": nn.Parameter(matrix * 2),
        "half": matrix.to(torch.bfloat16), "whole": torch.tensor([[1, 2]]), "empty": torch.empty(0, 3),
    }  # fmt: skip
    arrays = {
        "numpy": np.arange(6, dtype="f8").reshape(2, 3), "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "foreign": np.arange(3, dtype=">i4"), "flags": np.array([True, False]), "number": np.float32(0.5),
    }  # fmt: skip
    return tensors | arrays if numpy else tensors


def assert_contents(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        assert found[name].dtype == value.dtype and torch.equal(found[name], value.detach()), name


def test_plain_pickles_and_archives_of_torch_save_give_the_same_tensors(tmp_path):
    """Each in memory of its own. Files from before the archives are refused."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert_contents(unpickle(written(tmp_path, contents(), protocol=protocol)), contents())
    torch.save(contents(numpy=False), tmp_path / "file.pt")
    found = unpickle(tmp_path / "file.pt")
    assert_contents(found, contents(numpy=False))
    assert [found[name].untyped_storage().nbytes() for name in ("plain", "view")] == [48, 16]
    torch.save(contents(), tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert "before version 1.6" in refusal(tmp_path / "file.pt")


def test_fields_are_named_by_their_path(tmp_path):
    content = {
        "ids": [3, 5], "pair": (1, "a"), "rows": {"Rome": 0}, "layers": [{"F": "x"}, collections.OrderedDict(F="y")],
        "bare": {}, "kinds": {"b"}, "dtype": torch.float16, 7: "seven", "device": torch.device("cuda", 1),
        "shape": torch.Size([2, 3]), "words": np.array(["Rome", "Tiber"]),
    }  # fmt: skip
    found = {"ids": [3, 5], "pair": (1, "a"), "rows.Rome": 0, "layers.0.F": "x", "layers.1.F": "y", "7": "seven"}
    got = unpickle(written(tmp_path, content, protocol=2))
    assert got.pop("words").tolist() == ["Rome", "Tiber"] and got == found


def test_an_object_of_a_named_class_is_its_attributes(tmp_path, theirs, monkeypatch):
    """Its class is not needed, and none of its code runs."""
    path = written(tmp_path, {"nmf": theirs(torch.ones(4, 2), torch.ones(3, 2)), "vprime_token_ids": [1, 2, 3]})
    for name in ("__setstate__", "__init__"):
        monkeypatch.setattr(theirs, name, lambda *_: pytest.fail("code of the class ran"))
    monkeypatch.delitem(sys.modules, "factorization.seminmf")
    found = unpickle(path, classes=CLASSES)
    assert torch.equal(found["nmf._parameters.F_"], torch.ones(4, 2)) and found["nmf.rank"] == 2
    assert found["nmf.H"].shape == (2, 4) and found["vprime_token_ids"] == [1, 2, 3]
    said = refusal(path)
    assert "'factorization.seminmf.NMFSemiNMF'" in said and "name it in classes" in said


class Calls:
    """Pickles as the call of a function with arguments."""

    def __init__(self, function, *arguments) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def attacks(marker: Path) -> dict:
    """Objects that call something as they are read, and so leave the marker."""
    call = Calls(os.system, f"touch {marker}")
    saved = io.BytesIO()
    torch.save(call, saved, _use_new_zipfile_serialization=False)
    hidden = np.empty(1, dtype=object)
    hidden[0] = call
    return {
        "function": {"F": [torch.ones(1), ({"x": call},)]}, "builtin": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "map": Calls(list, Calls(map, os.system, [f"touch {marker}"])), "array of objects": hidden,
        "a pickle within": Calls(pickle.loads, pickle.dumps(call)), "method": Calls(marker.touch),
        "the bytes of a storage": Calls(torch.storage._load_from_bytes, saved.getvalue()),
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_what_calls_anything_is_refused_and_runs_nothing(tmp_path, name):
    marker, content = tmp_path / "marker", attacks(tmp_path / "marker")[name]
    for protocol in (0, 2, 4, 5):
        refusal(written(tmp_path, content, protocol=protocol), classes=CLASSES)
    torch.save(content, tmp_path / "file.pt")
    refusal(tmp_path / "file.pt", classes=CLASSES)
    assert not marker.exists()
    pickle.loads(pickle.dumps(content))  # noqa: S301
    assert marker.exists(), "the control: an ordinary reader runs it"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name_of(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


ARRAY = name_of("numpy._core.multiarray", "_reconstruct") + name_of("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
DTYPE, THING, ORDERED = name_of("numpy", "dtype"), name_of("a", "Thing"), name_of("collections", "OrderedDict")
STATE = text("__class__") + text("x") + b"s"
RAW = {
    "GLOBAL": b"cos\nsystem\n(S'true'\ntR", "INST": b"(S'true'\nios\nsystem\n", "OBJ": b"(cos\nsystem\nS'true'\no",
    "STACK_GLOBAL, dotted": name_of("os", "path.join"),
    "STACK_GLOBAL, behind an admitted name": name_of("numpy", "dtype.__class__"),
    "REDUCE of a text": text("os.system") + b")R", "BUILD of a text": text("a") + b"}" + text("b") + text("c") + b"sb",
    "BUILD of an admitted function": DTYPE + b"N}" + text("name") + text("x") + b"s\x86b",
    "APPEND to an array": ARRAY + b"Na", "SETITEM of an array": ARRAY + b"NNs", "array without content": ARRAY,
    "array of objects": ARRAY + b"(K\x01K\x01\x85" + DTYPE + text("O8") + b"\x85R\x89]tb",
    "structured type": ARRAY + b"(K\x01K\x01\x85" + DTYPE + text("f4,O") + b"\x85R\x89B\x0c\0\0\0" + bytes(12) + b"tb",
    "storage of nothing": name_of("torch.storage", "_load_from_bytes") + b"C\x00\x85R",
    "another encoding": name_of("_codecs", "encode") + text("a") + text("zlib") + b"\x86R",
    "BINPERSID": text("key") + b"Q", "PUT": b"]p2000000000\n", "LONG_BINPUT": b"]r\xff\xff\xff\x7f",
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 1 << 50) + b"x", "FRAME": b"\x95" + struct.pack("<Q", 1 << 50) + b"K\x01",
    "NEXT_BUFFER": b"\x97", "no instruction": b"\xff",
}  # fmt: skip


def test_instructions_that_no_honest_file_holds_are_refused(tmp_path):
    """Nor is an extension that the interpreter knows of, and keeps, reached."""
    for name, body in RAW.items():
        assert refusal(written(tmp_path, b"\x80\x04" + body + b".")), name
    copyreg.add_extension("os", "system", 77)
    try:
        pickle.loads(b"\x80\x02\x82\x4d.")  # noqa: S301
        assert "EXT1" in refusal(written(tmp_path, b"\x80\x02\x82\x4d."))
    finally:
        copyreg.remove_extension("os", "system", 77)
        copyreg.clear_extension_cache()


def test_truncated_followed_by_something_or_an_array_of_another_size_than_its_bytes(tmp_path):
    whole, array = pickle.dumps(contents()), pickle.dumps(np.zeros((2, 3)), protocol=3)
    for content in (*(whole[:cut] for cut in (0, 1, 60, -1)), whole + b"K\x01."):
        refusal(written(tmp_path, content))
    assert "No such file" in refusal(tmp_path / "none.pkl")
    assert array.count(b"K\x02K\x03\x86") == 1
    for shape in (b"K\x02K\x04\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"J\xff\xff\xff\xffK\x06\x86",
                  b"K\x02N\x86", b"K\x02K\x02\x86"):  # fmt: skip
        refusal(written(tmp_path, array.replace(b"K\x02K\x03\x86", shape)))


def test_a_record_cannot_be_given_behaviour(tmp_path):
    """State reaches the object, not its class, and nothing that Python would call."""
    for body, found in (
        (THING + b")\x81N}" + STATE + b"\x86b", {"1.__class__": "x"}),
        (THING + b")\x81}" + STATE + b"b", {"__class__": "x"}),
        (ORDERED + b")R}" + STATE + b"b", {}), (ORDERED + b"}" + STATE + b"\x85R", {}),  # nothing is copied
    ):  # fmt: skip
        assert unpickle(written(tmp_path, b"\x80\x04" + body + b"."), classes=["a.Thing"]) == found
    for body in (THING + b")\x81Na", THING + b"}" + STATE + b"b", ORDERED + b"}" + STATE + b"b"):
        refusal(written(tmp_path, b"\x80\x04" + body + b"."), classes=["a.Thing"])


def test_a_tensor_that_reaches_beyond_its_storage(tmp_path):
    """A plain pickle holds a tensor as the bytes of a storage, offset, size and stride."""
    six, too_long = (torch.arange(6.0)._typed_storage() for _ in range(2))

    def file_of(storage, *view) -> Path:
        torch.save(storage, saved := io.BytesIO(), _use_new_zipfile_serialization=False)
        content = saved.getvalue().replace(b"K\x06", b"K\x60") if storage is too_long else saved.getvalue()
        call = Calls(torch.storage._load_from_bytes, content)
        return written(tmp_path, Calls(torch._utils._rebuild_tensor_v2, call, *view, False, None))

    for storage, offset, size, stride, said in (
        (six, 0, (2, 4), (4, 1), "out of bounds"), (six, 1, (2, 3), (3, 1), "out of bounds"),
        (six, 0, (2, 3), (4, 1), "out of bounds"), (six, 0, (2, 3), (3,), "mismatch"),
        (six, 0, (2_000_000_000, 2), (0, 0), "as large"), (too_long, 0, (6,), (1,), "byte size"),
        (torch.ones(6), 0, (6,), (1,), "_untyped_storage"),
    ):  # fmt: skip
        assert said in refusal(file_of(storage, offset, size, stride))
    assert unpickle(file_of(six, 1, (2, 2), (3, 1)))["value"].tolist() == [[1, 2], [4, 5]]


def rewritten(path: Path, pickled=(b"", b""), **entries: bytes | None) -> Path:
    """An archive of ``torch.arange(6.0).reshape(2, 3)`` with other entries, or with something else in its pickle."""
    torch.save(torch.arange(6.0).reshape(2, 3), path)
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert pickled[0] in content["file/data.pkl"]
    content["file/data.pkl"] = content["file/data.pkl"].replace(*pickled)
    content |= {f"file/{name.replace('__', '/')}": data for name, data in entries.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if "more" in entries else zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            if data is not None:
                archive.writestr(name, data)
    return path


def test_an_archive_that_claims_what_it_does_not_hold(tmp_path):
    assert unpickle(rewritten(tmp_path / "file.pt"))["value"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for changes in (
        {"pickled": (b"K\x06t", b"K\x07t")}, {"pickled": (b"K\x06t", b"J\xff\xff\xff\x7ft")},
        {"pickled": (b"K\x02K\x03\x86", b"K\x03K\x03\x86")}, {"pickled": (b"K\x03K\x01\x86", b"K\x04K\x01\x86")},
        {"pickled": (b"QK\x00", b"QK\x01")}, {"data__0": b""}, {"data__0": bytes(28)}, {"data__0": None},
        {"more": bytes(100_000)}, {"pickled": (b"FloatStorage", b"QUInt8Storage")},
    ):  # fmt: skip
        refusal(rewritten(tmp_path / "file.pt", **changes))


def test_many_arrays_of_the_same_bytes_and_nesting_take_no_memory_beyond_the_file(tmp_path):
    """A few bytes for each further copy; each list holds the one before twice, 2¹⁸ entries, or itself."""
    raw = b"B" + struct.pack("<I", 800_000) + bytes(800_000) + b"q\x01"
    dtype = DTYPE + text("f8") + b"\x85Rq\x00"
    array = ARRAY + b"(K\x01J" + struct.pack("<i", 100_000) + b"\x85h\x00\x89h\x01tb"
    few, many = (b"\x80\x04" + dtype + b"0" + raw + b"0(" + array * count + b"l." for count in (2, 40))
    assert len(unpickle(written(tmp_path, few))["1"]) == 100_000
    assert "as large" in refusal(written(tmp_path, many))
    own: list = [{}]
    own.append(own)
    assert unpickle(written(tmp_path, own)) == {}
    item = {"x": [1, "a"]}
    for _ in range(18):
        item = [item, item]
    assert unpickle(written(tmp_path, item)) == {".".join("0" * 18) + ".x": [1, "a"]}
    shared = THING + b")\x81h\x00b"  # objects of one state
    objects = b"}q\x00" + text("a") + b"]" + text("x") + b"as0(" + shared * 50 + b"l."
    assert unpickle(written(tmp_path, b"\x80\x04" + objects), classes=["a.Thing"]) == {"0.a": ["x"]}
    assert "deep" in refusal(written(tmp_path, b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b"."))


@pytest.fixture
def fit(tiny):
    """F, G, and the ids of G's rows, fitted to the scaled rows as the published files are."""
    ids = token_table(tiny, make_concept().sentences, make_concept().neutral).token_id.tolist()
    X = tiny.embedding.detach()[ids] * tiny.embedding_scale
    found = sparse_mf(X, 8, sparsity=0.1, max_iter=30, seed=0)
    return found.F, found.G, ids


def table(F, G, ids) -> dict:
    return {"nmf": {"_parameters": {"F_": F, "G_": G}}, "vprime_token_ids": ids}


def not_taken(path: Path, tiny, **options) -> str:
    with pytest.raises(DataError) as caught:
        import_published(path, tiny, make_concept(), **options)
    return str(caught.value)


def test_the_published_layout_becomes_features_of_ours(tmp_path, tiny, fit, theirs):
    """What the file gives is what fitting here would have given: factors, table and scores."""
    F, G, ids = fit
    path = written(tmp_path, {"nmf": theirs(F, G), "vprime_token_ids": ids})
    found = import_published(path, tiny, make_concept())
    assert torch.equal(found.factorization.F, F) and torch.equal(found.factorization.G, G)
    settings = {"rank": 8, "sparsity": 0.1, "max_iter": 30, "seed": 0, "precision": "float32"}
    own = concept_features(tiny, make_concept(), cache=False, **settings)
    assert found.table.equals(own.table[found.table.columns]) and found.scores.equals(own.scores)
    assert found.factorization.loss == pytest.approx(own.factorization.loss, rel=1e-4)
    about = found.settings["imported"]
    assert about["fields"] == {"F": "nmf._parameters.F_", "G": "nmf._parameters.G_", "tokens": "vprime_token_ids"}
    assert 0 < about["explained"] < 1 and about["unseen"] == [] and len(about["sha256"]) == 64
    assert (found.model, found.weights_hash, found.concept) == (tiny.name, tiny.weights_hash, "Tiny Rome")
    again = ConceptFeatures.load(found.save(tmp_path / "features"))
    assert again.settings == found.settings and torch.equal(again.factorization.F, F)
    config = EmberConfig(rank=8, features=tuple(found.scores[found.scores.rows > 0].feature[:2]))
    edits = [edit_from_features(tiny, features, config) for features in (found, again)]
    assert len(edits[0].changed()) > 0 and edits[0].changed().equals(edits[1].changed())


def test_rows_are_matched_by_id_not_by_place_and_the_caller_may_name_the_fields(tmp_path, tiny, fit):
    """Also of NumPy arrays."""
    F, G, ids = fit
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    shuffled = [ids[k] for k in order]
    whole = import_published(written(tmp_path, table(F, G, ids)), tiny, make_concept())
    mixed = import_published(
        written(tmp_path, table(F.numpy(), G[order].numpy(), np.array(shuffled))), tiny, make_concept()
    )
    assert mixed.table.token_id.tolist() == shuffled
    some = whole.scores[whole.scores.rows > 0].feature.tolist()[:3]
    one, other = whole.contributions(some), mixed.contributions(some)
    assert one.keys() == other.keys() and len(one) > 0
    assert all(torch.allclose(one[i], other[i]) for i in one)
    path = written(tmp_path, {"best": {"left": F, "right": G}, "which": ids})
    fields = {"F": "best.left", "G": "best.right", "tokens": "which"}
    assert torch.equal(import_published(path, tiny, make_concept(), fields=fields).factorization.F, F)
    said = not_taken(path, tiny)
    assert "'best.right'" in said and f"[{len(ids)}, 8] float32" in said and "'which'" in said
    assert "'nope'" in not_taken(path, tiny, fields=fields | {"F": "nope"})
    assert "'x'" in not_taken(path, tiny, fields={"x": "best.left"})
    assert "; 5 more" in not_taken(written(tmp_path, {f"k{k}": k for k in range(35)}), tiny)


@pytest.mark.parametrize(("change", "words"), [
    (lambda F, G, ids: (F, G, [ids[1], *ids[1:]]), "twice"), (lambda F, G, ids: (F, G, [10**6, *ids[1:]]), "1000000"),
    (lambda F, G, ids: (F, G, [-1, *ids[1:]]), "-1"), (lambda F, G, ids: (F, G, [1, *ids[1:]]), "content tokens"),
    (lambda F, G, ids: (F, G, ids[1:]), "G_'.* number of tokens"), (lambda F, G, ids: (F, G, 5), "G's rows, got int"),
    (lambda F, G, ids: (F, G, ["a", *ids[1:]]), "the token ids of G's rows"),
    (lambda F, G, ids: (F, G, []), "no field 'vprime_token_ids'"),
    (lambda F, G, ids: (F, G, [True, *ids[1:]]), "the token ids of G's rows"),
    (lambda F, G, ids: (F, G, torch.ones(len(ids))), "G's rows, got .* float32"),
    (lambda F, G, ids: (torch.cat([F, F]), G, ids), r"F_'.*\[64, 8\].*d_model is 32"),
    (lambda F, G, ids: (F.T, G, ids), r"F_'.*\[8, 32\]"),
    (lambda F, G, ids: (F[:, :7], G, ids), "F has 7 features.*G 8"),
    (lambda F, G, ids: (F[:, 0], G, ids), "F_'.*matrix"), (lambda F, G, ids: (F.long(), G, ids), "F_'.*int64"),
    (lambda F, G, ids: (F, G.log(), ids), "G_'.*finite"), (lambda F, G, ids: ([1.0, 2.0], G, ids), "F_'.*2 entries"),
    *((change, "no approximation") for change in (
        lambda F, G, ids: (F, G.roll(1, dims=0), ids), lambda F, G, ids: (F.flip(0), G, ids),
        lambda F, G, ids: (-F, G, ids), lambda F, G, ids: (F * 3, G, ids), lambda F, G, ids: (F / 3, G, ids),
        lambda F, G, ids: (F * 0, G, ids),
    )),
])  # fmt: skip
def test_what_does_not_fit_the_model_s_rows(tmp_path, tiny, fit, change, words):
    """The control is ``test_rows_are_matched_by_id…``, where the same factors are taken."""
    assert re.search(words, not_taken(written(tmp_path, table(*change(*fit))), tiny))


def test_tokens_of_other_texts_and_factors_of_unscaled_rows(tmp_path, tiny, fit):
    """A few count as neutral, which no edit touches; many mean that the texts are others."""
    F, G, ids = fit
    others = [i for i in range(3, tiny.tokenizer.vocab_size) if i not in ids]

    def with_others(count: int) -> Path:
        rows = torch.cat([G[count:], torch.zeros(count, 8)])
        return written(tmp_path, table(F, rows, [*ids[count:], *others[:count]]))

    found = import_published(with_others(1), tiny, make_concept())
    assert found.settings["imported"]["unseen"] == others[:1]
    assert found.table.role.iloc[-1] == "neutral" and not found.table.isna().all(axis=1).any()
    assert "occur nowhere in the texts of 'Tiny Rome'" in not_taken(with_others(len(ids) // 20 + 1), tiny)
    if tiny.embedding_scale != 1:  # Gemma's
        unscaled = sparse_mf(tiny.embedding.detach()[ids], 8, sparsity=0.1, max_iter=30, seed=0)
        said = not_taken(written(tmp_path, table(unscaled.F, unscaled.G, ids)), tiny)
        assert "not scaled" in said and f"{tiny.embedding_scale:.4g}" in said
