"""``make bench``: how fast the companion is beside a plain version of the same work, in paired ratios of one run.

Times drift on shared machines, so both sides of a row are timed in turns and the ratio of the medians is what counts.
Each row also checks that both sides computed the same thing.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import LogLocator

from benchmarks import reference
from ember import METHODS, load_concept, load_model, load_suite
from ember.data.types import Question
from ember.evaluation.evaluate import PROMPT, question_scores
from ember.evaluation.letters import read_letter
from ember.evaluation.suite import Sizes
from ember.factorization import Factorization, semi_nmf, sparse_mf
from ember.models.activations import Site, collect
from ember.models.loading import LoadedModel, weights_hash
from ember.models.scoring import option_logprobs
from ember.relearning.attacks import ATTACKS
from ember.relearning.train import RelearnConfig, relearn, training_plan
from ember.reporting.plots import PALETTE, use_theme
from ember.store.files import write_text
from ember.store.paths import results_root
from ember.store.progress import bar

# Precision → its name in the table, and how far its loss of a step (3 to 4 nats per token) may lie from float32's.
LEARNING = {"fp32": ("float32", 0.005), "bf16_master": ("bf16, float32 copies", 0.15)}
COLUMNS = ["work", "compared_with", "ours", "theirs", "unit", "ratio", "target", "met", "repeats", "check"]


def timed(*sides: Callable[[], Any], repeats: int) -> tuple[list[list[float]], list[Any]]:
    """Seconds of each side, run in turns, and what each returned last."""
    seconds: list[list[float]] = [[] for _ in sides]
    results: list[Any] = [None] * len(sides)
    for _ in range(repeats):
        for k, side in enumerate(sides):
            started = time.perf_counter()
            results[k] = side()
            seconds[k].append(time.perf_counter() - started)
    return seconds, results


def row(work: str, beside: str, seconds: list[list[float]], target: float, check: str) -> dict[str, Any]:
    ours, theirs = map(median, seconds)
    ratio = theirs / ours
    return dict(zip(COLUMNS, (work, beside, ours, theirs, "s", ratio, target, ratio >= target, len(seconds[0]), check),
                    strict=True))  # fmt: skip


def embedding_like(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """X [n, d] in float32 with the token embeddings' own structure: rows of the embedded model's E, turned into d
    dimensions by a random map, and noise of a tenth of their size."""
    E = load_model("smollm2-135m").embedding.detach().float()
    generator = torch.Generator().manual_seed(seed)
    rows = E[torch.randperm(len(E), generator=generator)[:n]]
    turned = rows @ torch.randn(E.shape[1], d, generator=generator) / d**0.5
    return turned + 0.1 * turned.std() * torch.randn(n, d, generator=generator)


def factorizations(repeats: int) -> Iterator[dict[str, Any]]:
    for name, d, rank in (("Gemma's", 2304, 100), ("Llama's", 4096, 200)):
        X = embedding_like(5500, d)
        yield _factorized(f"sparse_mf, X of {name} shape (5,500 × {d:,}, rank {rank})", sparse_mf, X, rank, repeats)


def semi_factorization(repeats: int) -> Iterator[dict[str, Any]]:
    loaded, about = load_model("smollm2-135m"), load_concept("Ancient Rome")
    site = Site("neurons", 15)
    states, _ = collect(loaded, (*about.sentences, *about.neutral, *about.paragraphs), [site])
    X = states[site].float()[:12_000]
    yield _factorized(f"semi_nmf, MLP activations ({len(X):,} × {X.shape[1]:,}, rank 100)", semi_nmf, X, 100, repeats)


def _factorized(
    work: str, ours: Callable[..., Factorization], X: torch.Tensor, rank: int, repeats: int
) -> dict[str, Any]:
    plain = getattr(reference, ours.__name__)
    seconds, (found, (_, _, curve)) = timed(lambda: ours(X, rank), lambda: plain(X, rank), repeats=repeats)
    loss = float((X.double() - found.G.double() @ found.F.double().T).square().sum())
    assert loss <= min(curve) * 1.001, f"{work}: loss {loss}, the reference's {min(curve)}"
    iterations = f"{len(found.loss_curve)} iterations beside {len(curve)}"
    check = f"loss ÷ reference's: {loss / min(curve):.5f} ({iterations})"
    return row(work, "the plain iteration with its stopping rule", seconds, 5, check)


def questions_of_rome() -> Sequence[Question]:
    return load_suite(load_concept("Ancient Rome"), {"test": Sizes(questions=100)}).questions["concept"]["test"]


def scoring(loaded: LoadedModel, repeats: int) -> Iterator[dict[str, Any]]:
    questions = questions_of_rome()
    prompts = [PROMPT.format(question=q.question) for q in questions]
    options = [[f" {option}" for option in q.options] for q in questions]
    seconds, (scores, totals, letters, apart) = timed(
        lambda: question_scores(loaded, questions),
        lambda: option_logprobs(loaded, prompts, options),
        lambda: reference.generated_letters(loaded, questions),
        lambda: reference.separate_sequences(loaded, PROMPT, questions),
        repeats=repeats,
    )
    assert len(scores) == 3 * len(questions) == 3 * len(letters)
    answered = np.mean([read_letter(text) != "" for text in letters])
    work = f"scoring {len(questions)} four-option questions"
    yield row(work, "one generate call a question, four new tokens", [seconds[0], seconds[2]], 8,
              f"both answer all {len(questions)}; {answered:.0%} of the texts give a letter")  # fmt: skip
    gap = max(float(np.abs(a - np.array(b)).max()) for a, b in zip(totals, apart, strict=True))
    assert gap < 1e-4, f"log-likelihoods differ by {gap}"
    yield row(work, "four separate full sequences a question", [seconds[1], seconds[3]], 2,
              f"log-likelihoods agree to {gap:.1e} nats")  # fmt: skip


def relearning(loaded: LoadedModel, repeats: int) -> Iterator[dict[str, Any]]:
    """Training as notebook 04 does it beside one padded paragraph a step: the same paragraphs in the same order."""
    texts = load_concept("Ancient Rome").paragraphs[:24]
    budget = sum(len(loaded.encode(text)) for text in texts)
    configs = [RelearnConfig((budget,), precision=precision) for precision in ("fp32", "bf16_master")]
    sequences = [ids for step in training_plan(loaded, texts, configs[0], seed=0) for ids in step]
    nothing = pd.DataFrame({"set": [], "item": [], "metric": [], "value": []})
    times: list[list[float]] = [[] for _ in (*configs, "reference")]
    for _ in range(repeats):
        runs = [relearn(loaded, None, texts, ATTACKS["all"], one, lambda tokens: nothing, seed=0) for one in configs]
        model = copy.deepcopy(loaded.model).requires_grad_(True)
        started = time.perf_counter()
        losses = reference.train_padded(model, sequences, loaded.pad_id, lr=configs[0].lr)
        for taken, seconds in zip(times, (*(run.seconds for run in runs), time.perf_counter() - started), strict=True):
            taken.append(seconds)
    for config, found, taken in zip(configs, runs, times, strict=False):
        name, limit = LEARNING[config.precision]
        gap = max(abs(step["loss"] - loss) for step, loss in zip(found.steps, losses, strict=True))
        assert gap < limit, f"the losses of a step differ by {gap} in {config.precision}"
        speed = found.tokens / median(taken)
        check = f"losses of {len(losses)} steps agree to {gap:.1e} nats; {speed:.0f} tokens per second"
        work, beside = f"relearning, {found.tokens:,} tokens, {name}", "one paragraph a step, padded to 256, float32"
        yield row(work, beside, [taken, times[-1]], 3, check)


def editing(loaded: LoadedModel, repeats: int) -> dict[str, Any]:
    edit = METHODS["ember"].run(loaded, load_concept("Ancient Rome"), METHODS["ember"].config())
    before = loaded.weights_hash

    def applied() -> None:
        with edit.applied(loaded):
            pass

    def copied() -> None:
        kept = loaded.embedding.detach().clone()
        loaded.embedding.detach().copy_(kept)

    applied()
    seconds, _ = timed(applied, copied, repeats=20 * repeats)
    assert weights_hash(loaded.model) == before
    rows = len(edit.changed())
    kept = sum(change.values.numel() * change.values.element_size() for change in edit.tensors.values())
    share = kept / (loaded.embedding.numel() * loaded.embedding.element_size())
    check = f"restored to the bit; it holds {rows} rows, {share:.2%} of the matrix"
    return row("applying and undoing an EMBER edit", "copying the embedding matrix there and back", seconds, 20, check)


def memory() -> dict[str, Any]:
    """Peak memory of notebook 03 in a process of its own."""
    code = (
        "import resource\n"
        "from ember.batch.runner import run_notebook\n"
        "common = {'profile': 'laptop', 'model': 'smollm2-135m', 'concept_name': 'Ancient Rome', 'seed': 42}\n"
        "print(run_notebook('03_erase_concept', common | {'method': 'ember', 'ember': False}))\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"EMBER_RESULTS": scratch},
                             capture_output=True, text=True, check=True)  # fmt: skip
        *_, manifest, kilobytes = run.stdout.strip().splitlines()
        about = json.loads(Path(manifest).read_text(encoding="utf-8"))
    peak = int(kilobytes) / 1024**2
    values = ("peak memory of 03_erase_concept, EMBER alone", "–", peak, np.nan, "GB", np.nan, 3, peak <= 3, 1,
              f"whole grid of EMBER, {about['wall_seconds']:.0f} s")  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def growth(loaded: LoadedModel) -> pd.DataFrame:
    """Seconds against size, one size varied at a time: work, varied, size, seconds."""
    rows, settings = [], {"max_iter": 20}
    base = {"n": 4000, "d": 1024, "rank": 100}
    for varied, sizes in (
        ("n", (1000, 2000, 4000, 8000)),
        ("d", (256, 512, 1024, 2048, 4096)),
        ("rank", (25, 50, 100, 200, 400)),
    ):
        for size in sizes:
            shape = base | {varied: size}
            X = torch.randn(shape["n"], shape["d"], generator=torch.Generator().manual_seed(0))
            seconds, _ = timed(lambda X=X, shape=shape: sparse_mf(X, shape["rank"], **settings), repeats=3)
            rows.append(("sparse_mf, 20 iterations", varied, size, median(seconds[0])))
    questions = questions_of_rome()
    for count in (10, 20, 40, 80):
        seconds, _ = timed(lambda count=count: question_scores(loaded, questions[:count]), repeats=2)
        rows.append(("scoring questions", "questions", count, median(seconds[0])))
    for words in (50, 100, 200, 400):
        prompt = "word " * words + PROMPT
        seconds, _ = timed(lambda prompt=prompt: question_scores(loaded, questions[:10], prompt=prompt), repeats=2)
        rows.append(("scoring questions", "tokens before the question", words, median(seconds[0])))
    return with_exponents(pd.DataFrame(rows, columns=["work", "varied", "size", "seconds"]))


def with_exponents(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` and the exponent p of seconds ∝ sizeᵖ, least squares on logarithms, of each work and varied size."""
    table = table.assign(exponent=np.nan)
    for _, part in table.groupby(["work", "varied"]):
        table.loc[part.index, "exponent"] = np.polyfit(np.log(part["size"]), np.log(part.seconds), 1)[0]
    return table


def growth_figure(table: pd.DataFrame) -> plt.Figure:
    use_theme()
    groups = list(table.groupby(["work", "varied"], sort=False))
    figure, axes = plt.subplots(1, len(groups), figsize=(3.0 * len(groups), 3.2), layout="constrained")
    for ax, ((work, varied), part) in zip(axes, groups, strict=True):
        ax.loglog(part["size"], part.seconds, "o-", color=PALETTE["concept"])
        ax.set(xlabel=varied, ylabel="seconds", title=f"{work}\nexponent {part.exponent.iloc[0]:.2f}")
        ax.title.set_fontsize(9)
        ax.set_xticks(part["size"], part["size"].astype(str))
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    return figure


# Name → what gives its rows. A factorization takes minutes and is timed once less.
PARTS: dict[str, Callable[[LoadedModel, int], Iterable[dict[str, Any]]]] = {
    "editing": lambda loaded, repeats: [editing(loaded, repeats)],
    "scoring": scoring,
    "memory": lambda loaded, repeats: [memory()],
    "relearning": relearning,
    "sparse_mf": lambda loaded, repeats: factorizations(max(1, repeats - 1)),
    "semi_nmf": lambda loaded, repeats: semi_factorization(max(1, repeats - 1)),
}


def renewed(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``table`` with rows of the same work and comparison replaced in their places, and the others added."""
    keys = ["work", "compared_with"]
    if table.empty:
        return rows
    both = pd.concat([table, rows], ignore_index=True)
    last = both.drop_duplicates(keys, keep="last").set_index(keys)
    order = both.drop_duplicates(keys, keep="first")[keys]
    return last.loc[list(order.itertuples(index=False, name=None))].reset_index()[list(table.columns)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side (default 3)")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "growth"], help="renew these rows and leave the others")
    arguments = parser.parse_args()
    path = results_root() / "benchmarks.csv"
    only = arguments.only or [*PARTS, "growth"]
    table = pd.read_csv(path) if arguments.only and path.exists() else pd.DataFrame(columns=COLUMNS)
    with threads(os.cpu_count() or 1):
        loaded = load_model("smollm2-135m")
        for name in bar([name for name in PARTS if name in only], desc="benchmarks"):
            table = renewed(table, pd.DataFrame(PARTS[name](loaded, arguments.repeats), columns=COLUMNS))
        if "growth" in only:
            grown = growth(loaded)
            write_text(results_root() / "benchmark_growth.csv", grown.to_csv(index=False, float_format="%.4g"))
            growth_figure(grown).savefig(results_root() / "benchmark_growth.png", dpi=120)
    write_text(path, table.to_csv(index=False, float_format="%.4g"))
    print(table.to_string(index=False, max_colwidth=70, float_format="%.3g"))
    missed = table[~table.met.astype(bool)]
    if len(missed):
        print(f"missed: {', '.join(missed.work)}")


if __name__ == "__main__":
    main()
