"""Activations against plain hooks, features' evidence against a slow loop, and the cache of derived tensors."""

import math
from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers.tiny import NEUTRAL, SENTENCES, make_concept, make_loaded

from ember.errors import DamagedFileError, EmberError
from ember.methods.selection import contrast_table, keyness_bits, require_some, strongest
from ember.models.activations import Site, activations, collect, layer_name, n_layers, tapped, text_batch
from ember.models.loading import LoadedModel
from ember.store.files import cached_tensors
from ember.tokens import token_table

TEXTS = (*SENTENCES, "Rome.", *NEUTRAL, "The train")
SITES = [Site(kind, layer) for layer in (1, 0) for kind in ("mlp_out", "residual", "neurons")]


def hooks(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@torch.no_grad()
def reference(loaded: LoadedModel, text: str) -> dict[Site, torch.Tensor]:
    """All positions [time, d] of one text: each MLP's parts recomputed from its input, the stream from the layers."""
    seen: dict[Site, torch.Tensor] = {}

    def mlp(k: int, module: torch.nn.Module, x: torch.Tensor) -> None:
        seen[Site("neurons", k)] = module.act_fn(x @ module.gate_proj.weight.T) * (x @ module.up_proj.weight.T)
        seen[Site("mlp_out", k)] = seen[Site("neurons", k)] @ module.down_proj.weight.T

    def stream(k: int, output) -> None:
        seen[Site("residual", k)] = (output[0] if isinstance(output, tuple) else output)[0]

    with ExitStack() as stack:
        for k, layer in enumerate(loaded.model.model.layers):
            taps = (
                layer.mlp.register_forward_pre_hook(lambda m, args, k=k: mlp(k, m, args[0][0])),
                layer.register_forward_hook(lambda _, __, output, k=k: stream(k, output)),
            )
            for tap in taps:
                stack.enter_context(tap)
        loaded.model(torch.tensor([loaded.encode(text)]))
    return seen


def test_every_site_equals_what_plain_hooks_see(tiny):
    """The stream is the model's hidden state, but for the last layer, after which transformers puts the final norm."""
    batch = text_batch(tiny, SENTENCES[:1])
    found, expected = activations(tiny, batch.ids, batch.mask, SITES), reference(tiny, SENTENCES[0])
    assert found.keys() == expected.keys()
    for site, value in found.items():
        torch.testing.assert_close(value[0], expected[site], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        hidden = tiny.model(batch.ids, output_hidden_states=True).hidden_states
    assert torch.equal(found[Site("residual", 0)], hidden[1])


def test_a_pass_ends_after_the_deepest_site_and_gradients_reach_the_weights_before_it(tiny):
    calls, batch = [], text_batch(tiny, SENTENCES)
    handle = tiny.model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    activations(tiny, batch.ids, batch.mask, [Site("mlp_out", 0)])
    assert calls == []
    activations(tiny, batch.ids, batch.mask, [Site("mlp_out", 0), Site("neurons", 1)])
    assert calls == [1]
    handle.remove()
    site = Site("residual", 0)
    activations(tiny, batch.ids, batch.mask, [site])[site].sum().backward()
    assert tiny.model.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert tiny.model.model.layers[1].mlp.down_proj.weight.grad is None


def test_no_hook_is_left(tiny):
    batch = text_batch(tiny, SENTENCES)
    before = hooks(tiny.model)
    activations(tiny, batch.ids, batch.mask, SITES)
    assert hooks(tiny.model) == before
    with tapped(tiny, SITES):
        assert hooks(tiny.model) == before + len(SITES)
    with pytest.raises(KeyboardInterrupt), tapped(tiny, SITES):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"layer must be 0\.\.1, got 2"), tapped(tiny, [*SITES, Site("residual", 2)]):
        pass
    with pytest.raises(IndexError):
        activations(tiny, batch.ids + 512, batch.mask, SITES)
    assert hooks(tiny.model) == before


@pytest.mark.parametrize("site", SITES, ids=str)
def test_replaced_activations_are_what_the_rest_reads(tiny, site):
    """Those of another text in their place: the pass goes on as if they were its own; neurons are written out."""
    one, other = (text_batch(tiny, [text], max_tokens=10) for text in SENTENCES[:2])
    with torch.no_grad():
        theirs = activations(tiny, other.ids, other.mask, [site])[site]
        own, full = (tiny.model(batch.ids).logits for batch in (one, other))
        with tapped(tiny, [site], lambda *_: theirs) as kept:
            mixed = tiny.model(one.ids).logits
            written = activations(tiny, one.ids, one.mask, [out := Site("mlp_out", site.layer)])[out]
        with tapped(tiny, [site], lambda *_: None):
            assert torch.equal(tiny.model(one.ids).logits, own)
        assert torch.equal(kept[site], activations(tiny, one.ids, one.mask, [site])[site])
    assert not torch.equal(mixed, own)
    # Later layers see nothing but the stream.
    assert torch.equal(mixed, full) == (site.kind == "residual")
    if site.kind == "neurons":
        expected = theirs @ tiny.model.model.layers[site.layer].mlp.down_proj.weight.T
        torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bos", [True, False])
def test_padding_and_the_first_position_are_not_scored_and_long_texts_are_cut(bos):
    loaded = make_loaded(bos=bos)
    batch, rows = text_batch(loaded, TEXTS), [loaded.encode(text) for text in TEXTS]
    longest = max(map(len, rows))
    assert len({len(row) for row in rows}) > 3
    for k, row in enumerate(rows):
        padding = longest - len(row)
        assert batch.ids[k, : len(row)].tolist() == row
        assert batch.mask[k].tolist() == [1] * len(row) + [0] * padding
        assert batch.scored[k].tolist() == [False] + [True] * (len(row) - 1) + [False] * padding
    assert (batch.ids[:, 0] == 1).all() == bos
    assert text_batch(loaded, SENTENCES, max_tokens=5).ids.tolist() == [loaded.encode(text)[:5] for text in SENTENCES]
    assert len(collect(loaded, SENTENCES, [Site("neurons", 0)], max_tokens=5)[1]) == 4 * len(SENTENCES)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_collected_are_all_tokens_but_each_texts_first(tiny, batch_size):
    """In float32, whatever the model's type."""
    states, ids = collect(tiny, TEXTS, SITES, batch_size=batch_size)
    order = sorted(TEXTS, key=len)
    assert ids.tolist() == [i for text in order for i in tiny.encode(text)[1:]]
    alone = [reference(tiny, text) for text in order]
    for site in SITES:
        expected = torch.cat([seen[site][1:] for seen in alone])
        torch.testing.assert_close(states[site], expected, atol=2e-5, rtol=1e-4)
    half, _ = collect(make_loaded(dtype=torch.bfloat16), SENTENCES, SITES, batch_size=batch_size)
    assert {(value.dtype, value.requires_grad) for value in half.values()} == {(torch.float32, False)}


def test_other_sites_and_unknown_layers_are_refused(tiny):
    with pytest.raises(ValueError, match="residual, neurons, mlp_out, got 'attention'"):
        Site("attention", 0)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer must be 0..1, got {layer}"):
            layer_name(tiny, layer)
    tiny.architecture = replace(tiny.architecture, layers="", mlp_up="", mlp_down="")
    for use in (n_layers, lambda loaded: collect(loaded, SENTENCES, SITES)):
        with pytest.raises(EmberError, match=r"tiny-\w+: only edits of embeddings are known"):
            use(tiny)
    assert hooks(tiny.model) == 0


def contrasted(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Sparse activations of six features on tokens of the tiny vocabulary; feature 4 never fires on retain text."""
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (torch.rand(n, 6, generator=generator) for n in (40, 70))
    forget, retain = (x * (torch.rand(x.shape, generator=generator) < 0.3) for x in (forget, retain))
    retain[:, 4] = 0
    forget[:, 5] = retain[:, 5] = 0
    ids = [torch.randint(3, 40, (len(x),), generator=generator) for x in (forget, retain)]
    return [forget, retain], ids, torch.rand(512, generator=generator) * 3


def test_contrast_equals_a_slow_loop():
    loaded, (states, ids, keyness) = make_loaded(), contrasted()
    table = contrast_table(loaded, states, ids, keyness, top=3)
    assert table.feature.tolist() == list(range(6))
    for k, row in table.iterrows():
        pairs = [*zip(torch.cat(states)[:, k].tolist(), torch.cat(ids).tolist(), strict=True)]
        mass = sum(value for value, _ in pairs)
        means = [float(sum(x[:, k])) / len(x) for x in states]
        assert (row.forget, row.retain) == pytest.approx(means)
        bits = sum(value * float(keyness[i]) for value, i in pairs)
        assert row.keyness == pytest.approx(bits / mass if mass else 0, rel=1e-5)
        ranked = [loaded.tokenizer.decode([i]).strip() for value, i in sorted(pairs, reverse=True) if value > 0]
        assert row.top_tokens == " ".join([*dict.fromkeys(ranked)][:3])
        assert k > 3 or row.ratio == pytest.approx(means[0] / means[1], rel=1e-5)
    assert table.ratio[4] == math.inf and math.isnan(table.ratio[5])


def test_the_strongest_differ_most_among_those_above_the_ratio():
    table = pd.DataFrame({"feature": range(5), "forget": [9.0, 8, 1, 4, 0], "retain": [6.0, 2, 0, 1, 0]})
    table["ratio"] = table.forget / table.retain
    for count, ratio, expected in ((9, 3, [1, 3, 2]), (9, 4, [1, 3, 2]), (2, 0, [1, 0])):
        found = strongest(table, count, min_ratio=ratio)
        assert found.feature.tolist() == expected and list(found) == list(table)
    with pytest.raises(EmberError, match="no SAE feature is much more active on 'Tiny Rome'"):
        require_some([strongest(table, 2, min_ratio=99).head(0)], make_concept(), "SAE")


def test_only_significant_concept_tokens_have_keyness():
    loaded, concept = make_loaded(), make_concept()
    table = token_table(loaded, SENTENCES, NEUTRAL).set_index("token_id")
    bits, expected = keyness_bits(loaded, concept), table.query("key and role == 'concept'")
    assert set(bits.nonzero().flatten().tolist()) == set(expected.index)
    assert set(expected.token) == {" Rome", " Roman", " Romans"}
    assert bits[[*expected.index]].tolist() == pytest.approx(expected.keyness.tolist())
    assert not keyness_bits(loaded, replace(concept, further_neutral=SENTENCES)).any()


def test_derived_tensors_are_computed_once_and_a_damaged_entry_is_named(cache):
    def stored(key: str = "k", value: float = 1.5) -> tuple[dict[str, torch.Tensor], dict]:
        return cached_tensors("kind", key, lambda: ({"a": torch.full((2, 3), value).T}, {"value": value}))

    for _, value in (stored(), stored(value=99.0)):
        assert value == {"value": 1.5}
    assert torch.equal(stored()[0]["a"], torch.full((3, 2), 1.5))
    assert stored("other", 99.0)[1] == {"value": 99.0}
    (cache / "kind" / "k" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"kind/k.* damaged.*Delete it"):
        stored()
