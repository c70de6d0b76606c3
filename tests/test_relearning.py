"""Attacks on edited tiny models: what they train, what they leave, and the curves they give."""

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers.edits import EMBED, differing, snapshot
from helpers.tiny import NEUTRAL, SENTENCES, make_concept, make_loaded

from ember.editing import Edit
from ember.errors import EmberError, UnknownNameError
from ember.evaluation.evaluate import question_scores
from ember.methods import METHODS
from ember.methods.ember import EmberConfig
from ember.models.loading import LoadedModel, weights_hash
from ember.relearning.attacks import ATTACKS, PRECISIONS, Attack, attack_texts, opened, working_copy
from ember.relearning.optimizers import EIGHT_BIT, make_optimizer, stepping_backward
from ember.relearning.train import RelearnConfig, checkpointed, packed_loss, relearn, training_plan

SETTINGS = EmberConfig(delta=3.0, rank=8, sparsity=0.1, max_iter=60, patience=20, features=(0, 1))
CONFIG = RelearnConfig(points=(30, 60, 120), lr=1e-3)
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def edit(tiny, cache) -> Edit:
    return METHODS["ember"].run(tiny, make_concept(), SETTINGS)


def measure(loaded: LoadedModel, *, dies_at: int = 0):
    """Scores of two questions, killed at a point; also checks in which precision they are taken."""
    questions = [q for q in make_concept().questions if q.set == "concept"][:2]
    calls = []

    def scored(tokens: int = 0) -> pd.DataFrame:
        calls.append(tokens)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        assert loaded.embedding.dtype == torch.float32
        return question_scores(loaded, questions).assign(set="concept")

    return scored


def run(loaded: LoadedModel, edit: Edit, attack: str = "all", config=CONFIG, *, dies_at=0, **options):
    return relearn(loaded, edit, SENTENCES, ATTACKS[attack], config, measure(loaded, dies_at=dies_at), **options)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_steps_in_the_backward_pass_hold_one_gradient_and_change_nothing(kind):
    plain, other = (make_loaded(kind) for _ in range(2))
    ids = plain.encode(SENTENCES[0])
    optimizer = make_optimizer("adamw", plain.model.requires_grad_(True).parameters(), lr=1e-3, weight_decay=0.01)
    parameters = list(other.model.requires_grad_(True).parameters())
    apart = {p: make_optimizer("adamw", [p], lr=1e-3, weight_decay=0.01) for p in parameters}
    held = []

    def take(parameter):
        held.append(sum(p.grad is not None for p in parameters))
        apart[parameter].step()

    for _ in range(3):
        packed_loss(plain, [ids]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with stepping_backward({p: partial(take, p) for p in parameters}):
            packed_loss(other, [ids]).backward()
    assert held == [1] * 3 * len(parameters)
    assert weights_hash(plain.model) == weights_hash(other.model) != make_loaded(kind).weights_hash
    packed_loss(other, [ids]).backward()
    assert len(held) == 3 * len(parameters)  # the hooks are gone


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_packed_paragraphs_give_the_gradients_of_one_paragraph_at_a_time(kind):
    """One paragraph's loss is that of the model itself."""
    loaded = make_loaded(kind, bos=kind == "gemma2")
    sequences = [loaded.encode(text)[:length] for text, length in zip(SENTENCES, (9, 30, 2, 17), strict=True)]
    model = loaded.model
    losses = [packed_loss(loaded, [s]) for s in sequences]
    for ids, loss in zip(sequences, losses, strict=True):
        torch.testing.assert_close(loss, model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    (sum(losses) / len(losses)).backward()
    one_by_one = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    packed = packed_loss(loaded, sequences)
    packed.backward()
    torch.testing.assert_close(packed, sum(losses) / len(losses), atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        scale = float(one_by_one[name].abs().max())
        torch.testing.assert_close(parameter.grad, one_by_one[name], atol=2e-5 * scale, rtol=1e-4)
    # Without separation the texts would see one another.
    joined = packed_loss(loaded, [[i for s in sequences for i in s]])
    assert abs(float(joined.detach() - packed.detach())) > 1e-2


def test_every_text_is_seen_before_any_is_seen_again_and_budgets_are_equal(tiny):
    """Texts are cut, and empty ones are left out."""
    plan = training_plan(tiny, SENTENCES, RelearnConfig(points=(200,), batch_size=1), seed=1)
    texts = [tuple(s) for step in plan for s in step]
    assert len(set(texts[:4])) == 4
    assert 200 <= sum(map(len, texts)) < 200 + max(map(len, texts))
    assert plan == training_plan(tiny, SENTENCES, RelearnConfig(points=(200,)), seed=1)
    assert plan != training_plan(tiny, SENTENCES, RelearnConfig(points=(200,)), seed=2)
    cut = training_plan(tiny, [*SENTENCES, ""], RelearnConfig(points=(50,), max_tokens=5), seed=0)
    assert {len(s) for step in cut for s in step} == {5}
    with pytest.raises(EmberError, match="no texts"):
        training_plan(tiny, [""], RelearnConfig(), seed=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_trains_what_it_says_and_leaves_the_model_as_it_was(tiny, edit, name, precision):
    before, flags = snapshot(tiny), {n: p.requires_grad for n, p in tiny.model.named_parameters()}
    seen = {}

    def look(tokens: int) -> pd.DataFrame:
        seen.update({n: p.detach().float().clone() for n, p in tiny.model.named_parameters()})
        return measure(tiny)()

    config = replace(CONFIG, precision=precision, points=(40,), lr=1e-2)
    relearning = relearn(tiny, edit, SENTENCES, ATTACKS[name], config, look)
    assert not relearning.diverged
    assert relearning.items.tokens.nunique() == 2
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with edit.applied(tiny):
        start = {n: p.detach().to(dtype).float().clone() for n, p in tiny.model.named_parameters()}
    changed = {n for n, value in start.items() if n in seen and not torch.equal(seen[n], value)}
    mlps = {n for n in start if ".mlp." in n}
    assert changed == {"edited_rows": {EMBED}, "lora": set(), "mlps": mlps}.get(name, set(start))
    assert (name == "lora") == any("lora_B" in n and value.abs().max() > 0 for n, value in seen.items())
    if name == "edited_rows":
        rows = (seen[EMBED] != start[EMBED]).any(1).nonzero().squeeze(1).tolist()
        assert rows and set(rows) <= set(edit.tensors[EMBED].rows.tolist())
    assert name != "mlps" or [row["part"] for row in relearning.moved] == ["all that is trained"]
    assert not differing(before, snapshot(tiny))
    assert {n: p.requires_grad for n, p in tiny.model.named_parameters()} == flags
    assert all(p.grad is None for p in tiny.model.parameters())
    assert weights_hash(tiny.model) == tiny.weights_hash


def test_a_model_in_training_shares_no_cache_entry_with_the_loaded_one(tiny, edit):
    with edit.applied(tiny):
        edited = tiny.weights_hash
    with opened(tiny, edit, ATTACKS["all"], "fp32", 0):
        assert tiny.weights_hash not in (edited, tiny.base_hash)
    with pytest.raises(EmberError, match="no edited rows"), opened(tiny, None, ATTACKS["edited_rows"], "fp32", 0):
        pass


def test_benign_texts_say_nothing_of_the_concept_and_are_as_long():
    concept = make_concept()
    assert " ".join(attack_texts(concept, ATTACKS["benign"])) == " ".join(NEUTRAL)
    assert attack_texts(concept, ATTACKS["all"]) == concept.paragraphs
    long = replace(concept, paragraphs=("word " * 20,) * 3, further_neutral=NEUTRAL)
    texts = attack_texts(long, ATTACKS["benign"])
    assert all(len(text.split()) >= 20 for text in texts[:-1])
    assert all(len(text.split()) < 20 + max(len(s.split()) for s in NEUTRAL) for text in texts)
    assert " ".join(texts) == " ".join((*NEUTRAL, *NEUTRAL))


@pytest.mark.parametrize(("kind", "change", "said"), [
    (Attack, {"trained": "some"}, "known: all, edited_rows, lora, mlps"),
    (Attack, {"texts": "some"}, "known: concept, neutral"),
    (RelearnConfig, {"precision": "fp8"}, "known: bf16, bf16_master, fp32"),
    (RelearnConfig, {"optimizer": "sgd"}, "known: adamw, adamw_8bit, paged_adamw_8bit"),
    (RelearnConfig, {"points": ()}, "points"), (RelearnConfig, {"points": (5, 5)}, "points"),
    (RelearnConfig, {"points": (0,)}, "points"), (RelearnConfig, {"lr": 0.0}, "lr"),
    (RelearnConfig, {"lr": math.nan}, "lr"), (RelearnConfig, {"max_tokens": 1}, "max_tokens"),
    (RelearnConfig, {"batch_size": 0}, "batch_size"), (RelearnConfig, {"weight_decay": -1}, "weight_decay"),
])  # fmt: skip
def test_wrong_settings_are_refused_and_unknown_choices_list_the_known_ones(kind, change, said):
    with pytest.raises(UnknownNameError if "known" in said else ValueError, match=said):
        kind(**change)


def test_training_lowers_the_loss_and_is_the_same_again(tiny, edit):
    config = replace(CONFIG, points=(100, 400), lr=3e-3)
    one, again, other = (run(tiny, edit, config=config, seed=s) for s in (1, 1, 2))
    losses = [step["loss"] for step in one.steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert one.steps == again.steps and one.items.equals(again.items)
    assert other.steps != one.steps
    start, *points = one.items.tokens.unique()
    assert start == 0 and all(p >= t for p, t in zip(points, config.points, strict=True))
    assert one.tokens_per_second > 0


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["all", "lora", "edited_rows"])
def test_checkpointing_gives_the_same_losses_and_scores(tiny, edit, name, batch_size):
    """The first scores are those of the edited model."""
    config = replace(CONFIG, batch_size=batch_size)
    plain = run(tiny, edit, name, config)
    saved = run(tiny, edit, name, replace(config, gradient_checkpointing=True))
    assert saved.steps == plain.steps
    pd.testing.assert_frame_equal(saved.items, plain.items)
    first = plain.items[plain.items.tokens == 0].drop(columns="tokens").reset_index(drop=True)
    with edit.applied(tiny):
        pd.testing.assert_frame_equal(first, measure(tiny)())


def test_checkpointing_keeps_the_inputs_of_layers_alone_and_dropout_off(tiny):
    """So it computes each layer twice, and leaves no module in training mode."""
    passes = []
    down = tiny.model.get_submodule(DOWN.removesuffix(".weight"))
    handle = down.register_forward_pre_hook(lambda *_: passes.append(down.training))
    for context, expected in ((nullcontext(), 1), (checkpointed(tiny), 2), (nullcontext(), 1)):
        passes.clear()
        with context:
            packed_loss(tiny, [tiny.encode(SENTENCES[0])]).backward()
        assert passes == [False] * expected
    handle.remove()
    tiny.model.zero_grad(set_to_none=True)
    assert not any(module.training for module in tiny.model.modules())


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_moments_are_an_optimizer_like_any_other(tiny, edit, tmp_path, monkeypatch, name):
    """With a class in bitsandbytes' place whose steps are plain numbers, and nobody who asks for the GPU."""

    class Eight(torch.optim.AdamW):
        def step(self, closure=None):
            for state in self.state.values():
                state["step"] = torch.tensor(float(state["step"]))
            super().step(closure)
            for state in self.state.values():
                state["step"] = int(state["step"])

    module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Eight, PagedAdamW8bit=Eight))
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr("ember.relearning.train.require_optimizer", lambda *_: None)
    config, store = replace(CONFIG, optimizer=name), tmp_path / "run"
    whole, plain = run(tiny, edit, config=config), run(tiny, edit)
    # The stand-in sums in another order than the fused AdamW.
    assert [s["loss"] for s in whole.steps] == pytest.approx([s["loss"] for s in plain.steps], rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, edit, config=config, dies_at=3, store=store)
    assert run(tiny, edit, config=config, store=store).steps == whole.steps


def test_an_optimizer_that_cannot_run_fails_before_anything_does(tiny, edit, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("ember.relearning.train.opened", lambda *_: pytest.fail("training began"))
    for device, advice in (("cpu", "needs a CUDA GPU, the model is on cpu"), ("cuda", "pip install bitsandbytes")):
        monkeypatch.setattr(LoadedModel, "device", torch.device(device))
        with pytest.raises(EmberError, match=rf"{advice}.*optimizer: adamw|optimizer: adamw.*{advice}"):
            run(tiny, edit, config=replace(CONFIG, optimizer="adamw_8bit"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["all", "lora", "edited_rows"])
def test_an_interrupted_run_goes_on_to_the_same_curve(tiny, edit, tmp_path, monkeypatch, name, precision):
    config, store = replace(CONFIG, precision=precision), tmp_path / "run"
    before, hashes = snapshot(tiny), dict(tiny.parameter_hashes)
    whole = run(tiny, edit, name, config)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, edit, name, config, dies_at=3, store=store)
    assert not differing(before, snapshot(tiny)) and tiny.parameter_hashes == hashes
    steps = []
    monkeypatch.setattr("ember.relearning.train.packed_loss", lambda *given: steps.append(0) or packed_loss(*given))
    resumed = run(tiny, edit, name, config, store=store)
    assert 0 < len(steps) < len(whole.steps)
    assert resumed.steps == whole.steps
    pd.testing.assert_frame_equal(resumed.items, whole.items)
    assert str(resumed.moved) == str(whole.moved)


@pytest.mark.parametrize("diverging", [False, True])
def test_a_finished_run_is_read_back_and_leaves_no_weights_on_disk(tiny, edit, tmp_path, monkeypatch, diverging):
    """One that diverged is recorded as such."""
    config = replace(CONFIG, lr=1e3, points=(20, 2000)) if diverging else CONFIG
    first = run(tiny, edit, config=config, store=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"items.parquet", "ember.json"}
    assert ("nats per token at step" in (first.diverged or "")) == (first.tokens < config.points[-1]) == diverging
    assert set(first.items.tokens) <= {0, *[s["tokens"] for s in first.steps]}
    monkeypatch.setattr("ember.relearning.train.packed_loss", None)
    again = run(tiny, edit, config=config, store=tmp_path / "run")
    assert (again.steps, again.diverged) == (first.steps, first.diverged)
    pd.testing.assert_frame_equal(again.items, first.items)


def test_small_steps_are_lost_in_bfloat16_and_kept_by_float32_masters(tiny, edit):
    """Whether part of a robustness is rounding: an update below half a unit in the last place changes nothing."""
    config = replace(CONFIG, lr=1e-6, weight_decay=0.0, points=(300,))
    shares = {p: run(tiny, edit, config=replace(config, precision=p)).moved[0]["changed"] for p in PRECISIONS}
    assert shares["fp32"] > 0.7 and shares["bf16"] < 0.2  # rows of tokens that do not occur get no gradient
    assert shares["bf16"] < shares["bf16_master"] < shares["fp32"]


def test_the_way_back_of_the_edited_rows_is_measured(tiny, edit, monkeypatch):
    """An optimizer that puts the rows half way back has them travel one half."""
    rows = edit.tensors[EMBED].rows
    base = tiny.embedding.detach()[rows].clone()

    def half_way(self, closure=None):
        (leaf,) = self.param_groups[0]["params"]
        with torch.no_grad():
            leaf.copy_((edit.tensors[EMBED].values + base) / 2)

    monkeypatch.setattr(torch.optim.AdamW, "step", half_way)
    everything, edited = run(tiny, edit, "edited_rows", replace(CONFIG, points=(5,))).moved
    assert edited["travelled"] == pytest.approx(0.5, abs=1e-5)
    assert edited["values"] == everything["values"] == base.numel()
    assert math.isnan(everything["travelled"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_working_copy_leaves_storage_alone_and_parked_parameters_take_no_room(tiny, edit, dtype):
    """They come back to the bit, also for those who hold the same storage, such as an edit that is to be undone."""
    with edit.applied(tiny):
        pass
    for parameter in tiny.model.parameters():
        parameter.data = parameter.data.clone()  # hashing has had numpy look into the present storage
    pointers = {n: p.data_ptr() for n, p in tiny.model.named_parameters()}
    with working_copy(tiny.model, dtype):
        assert tiny.embedding.dtype == dtype
        assert all(p.data_ptr() != pointers[n] for n, p in tiny.model.named_parameters())
    assert {n: p.data_ptr() for n, p in tiny.model.named_parameters()} == pointers
    held = tiny.embedding.detach()
    with edit.applied(tiny):
        with working_copy(tiny.model, dtype, parked=True):
            assert held.untyped_storage().nbytes() == 0
            with torch.no_grad():
                tiny.embedding.zero_()
        assert torch.equal(held[edit.tensors[EMBED].rows], edit.tensors[EMBED].values)
    assert weights_hash(tiny.model) == tiny.weights_hash
