"""What a notebook run is expected to take: measured where it was measured, a formula for models that need a GPU.

Of GPUs nothing here was measured. A run's work is counted in floating-point operations and in bytes that have to be
moved, and divided by what a kind of GPU is assumed to sustain:

    seconds = start-up + iterations · 2 n d K / operations a second of the host
              + (2 N · scored tokens + 6 N · trained tokens) / operations a second
              + (weights · decoding steps + moved by the optimizer) / bytes a second + waiting for a judge

N is the number of weights that a token meets (the input embeddings are only looked up): 2 N operations a token forward,
another 4 N backward. Attention between tokens is left out, as texts are short.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd

from ember.errors import EmberError, UnknownNameError
from ember.judge_config import JudgeConfig
from ember.paths import REPOSITORY, results_dir
from ember.planning import CONTROL, ERASE, FACTORIZE, LOCALIZE, RELEARN, STABILITY, TEACH, Job, plan
from ember.profiles import Profile, list_profiles, load_profile
from ember.specs import Shape, find_spec


@dataclass(frozen=True)
class Gpu:
    """Peak operations a second of dense bfloat16 and of float32, peak bytes a second (data sheet); dollars an hour.

    The price is an assumption about rented machines and no offer.
    """

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    dollars: float


GPUS = {
    "a100": Gpu("NVIDIA A100 80 GB", 312e12, 19.5e12, 2.0e12, 2.0),
    "h100": Gpu("NVIDIA H100 80 GB", 989e12, 67e12, 3.35e12, 3.0),
}
DEFAULT_GPU = "a100"
# Shares of the peaks that are assumed to be sustained, with the small batches used here.
SUSTAINED, SUSTAINED_BANDWIDTH = 0.25, 0.5

# Tokens, in round numbers: a question with its options, a sentence, a paragraph, an instruction with its response.
QUESTION, SENTENCE, PARAGRAPH, INSTRUCTION = 80, 40, 128, 100
LETTERS = 80  # the question again, with lettered options
# Questions the released sets have; a profile's sizes ask for at most so many.
AVAILABLE = {"train": (50, 50, 50), "test": (50, 50, 1000)}
FIT_SENTENCES, FIT_TOKENS = 600, 5000
DECODED_TOGETHER = 8
HOST = 5e10  # operations a second in float64 of the host's cores
START_SECONDS = 60.0  # interpreter, kernel, libraries
READ, HASHED = 1e9, 0.5e9  # bytes a second of reading weights and of hashing them, which a run does three times
JUDGE_SECONDS = 2.0  # a reply
# Bytes that a step of AdamW moves for each weight that it trains: weight, gradient and two moments, read and written.
STEP_BYTES: Mapping[str, float] = {"bf16": 16, "bf16_master": 32, "fp32": 32}
# What a cluster is asked for beyond what is expected.
TIME_MARGIN, MEMORY_MARGIN = 3.0, 1.5
LEAST_MINUTES, UNKNOWN_MINUTES, UNKNOWN_MEMORY = 15, 120, 8000
HOST_MEMORY = 8000  # megabytes beside the weights, which pass through the host's memory twice


@dataclass(frozen=True)
class Work:
    """Tokens scored (forward only) in bfloat16 and in float32, tokens trained, and the rest of a run's work."""

    scored: float = 0.0
    scored_fp32: float = 0.0
    trained: float = 0.0
    decoding_steps: float = 0.0
    moved_bytes: float = 0.0
    iterations: float = 0.0
    replies: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * value for value in vars(self).values()))


@dataclass(frozen=True)
class Request:
    """What a cluster job reserves: GPUs, megabytes of host memory, minutes."""

    gpu: int
    mem_mb: int
    runtime: int


def expected_seconds(profile: Profile, job: Job, gpu: str = DEFAULT_GPU) -> tuple[float, str]:
    """Seconds that a run takes, and where the number is from: ``measured``, ``like`` (the longest run of this notebook
    with the same model in another profile), ``formula``, or ``unknown`` (with NaN).

    Raises
    ------
    UnknownNameError
        If the kind of GPU is unknown.
    """
    if gpu not in GPUS:
        raise UnknownNameError("kind of GPU", gpu, GPUS)
    own = _measured(profile.name)
    if job.name in own.index:
        return float(own.wall_seconds[job.name]), "measured"
    if _shape(profile):
        return formula_seconds(profile, job, GPUS[gpu]), "formula"
    alike = _alike(profile.model)
    if job.notebook in alike.index:
        return float(alike.wall_seconds[job.notebook]), "like"
    return math.nan, "unknown"


def expected_table(profile: Profile, gpu: str = DEFAULT_GPU) -> pd.DataFrame:
    """One row a notebook of a profile: runs, hours of the longest and of all, and where the hours are from."""
    rows = []
    for job in plan(profile):
        seconds, source = expected_seconds(profile, job, gpu)
        rows.append({"notebook": job.notebook, "hours": seconds / 3600, "from": source})
    groups = pd.DataFrame(rows).groupby("notebook")
    table = groups.agg(runs=("hours", "size"), longest=("hours", "max"), hours=("hours", lambda h: h.sum(min_count=1)))
    return table.assign(source=groups["from"].agg(lambda kinds: ", ".join(dict.fromkeys(kinds)))).reset_index()


def describe_expected(profile: Profile, gpu: str = DEFAULT_GPU) -> str:
    """A profile's runs with their expected time and what each reserves, then the sums."""
    lines = []
    for job in plan(profile):
        seconds, source = expected_seconds(profile, job, gpu)
        asked = request(profile, job)
        time = "not known" if math.isnan(seconds) else f"{seconds / 3600:.2f} h"
        lines.append(
            f"{time:>9} ({source})  {asked.gpu} GPU, {asked.mem_mb / 1000:.0f} GB, {asked.runtime} min  {job.name}"
        )
    table = expected_table(profile, gpu)
    hours = float(table.hours.sum())
    lines += ["", table.round(2).to_string(index=False), "", f"{table.runs.sum()} runs, {hours:.1f} hours one by one"]
    if "formula" in set(table.source):
        kind = GPUS[gpu]
        lines[-1] += f" on {kind.name} (a formula, not measured); {hours * kind.dollars:.0f} dollars at"
        lines[-1] += f" {kind.dollars:g} an hour"
    return "\n".join(lines)


def request(profile: Profile, job: Job, *, attempt: int = 1) -> Request:
    """What to reserve for a run: a margin over what is expected, and more at every further attempt.

    A model that ships in a package runs without a GPU; all others get one, except for the report.
    """
    spec = find_spec(profile.model)
    loads = "model" in job.parameters
    seconds, _ = expected_seconds(profile, job)
    minutes = UNKNOWN_MINUTES if math.isnan(seconds) else max(LEAST_MINUTES, math.ceil(TIME_MARGIN * seconds / 60))
    alike = _alike(profile.model)
    if _shape(profile) and loads:
        memory = 2 * _bytes(profile) / 1e6 + HOST_MEMORY
    else:
        known = job.notebook in alike.index
        memory = MEMORY_MARGIN * float(alike.peak_memory_mb[job.notebook]) if known else UNKNOWN_MEMORY
    return Request(int(loads and spec.origin != "wheel"), math.ceil(memory * attempt), minutes * attempt)


def formula_seconds(profile: Profile, job: Job, gpu: Gpu) -> float:
    """The formula of this module for one run; the model must be one of a known shape."""
    if "model" not in job.parameters:
        return START_SECONDS
    shape, done = _known_shape(profile), work(profile, job)
    bf16, fp32 = SUSTAINED * gpu.bf16, SUSTAINED * gpu.fp32
    met = shape.parameters - shape.vocab * shape.d_model
    seconds = met * (2 * done.scored / bf16 + 2 * done.scored_fp32 / fp32 + 6 * done.trained / bf16)
    seconds += (_bytes(profile) * done.decoding_steps + done.moved_bytes) / (SUSTAINED_BANDWIDTH * gpu.bandwidth)
    # The one product of full size in an iteration, X times a matrix [d, K]; the fit runs on the host in float64.
    seconds += done.iterations * 2 * FIT_TOKENS * shape.d_model * float(profile.fit["rank"]) / HOST
    judge = JudgeConfig(**profile.judge) if profile.judge else None
    seconds += done.replies * JUDGE_SECONDS / judge.concurrency if judge else 0.0
    return START_SECONDS + _bytes(profile) * (1 / READ + 3 / HASHED) + seconds


def work(profile: Profile, job: Job) -> Work:
    """What a run has to do. What the unedited model scores counts in notebook 01, whose cache the others read."""
    test, train = (evaluation_work(profile.sizes[split], split) for split in ("test", "train"))
    fit = Work(iterations=float(profile.fit.get("max_iter", 20000)), scored=FIT_SENTENCES * SENTENCE)
    shape = _known_shape(profile)
    if job.notebook == FACTORIZE:
        return fit + test + train
    if job.notebook == ERASE:
        cells = [making_work(cell) + train for cell in profile.cells(job.parameters["method"]).values()]
        return sum(cells, test)
    if job.notebook == RELEARN:
        settings = profile.relearn["settings"]
        points, length = settings["points"], min(PARAGRAPH, settings.get("max_tokens", 256))
        tokens = job.parameters["budget"] * points[-1]
        steps = tokens / length / settings.get("batch_size", 1)
        asked = min(AVAILABLE["test"][0], profile.sizes["test"].get("questions") or AVAILABLE["test"][0])
        moved = steps * shape.parameters * STEP_BYTES[job.parameters["precision"]]
        scored = (len(points) + 1) * asked * QUESTION
        return Work(trained=tokens, moved_bytes=moved, scored_fp32=scored)
    if job.notebook == LOCALIZE:
        return Work(scored=profile.localize["texts"] * (4 * SENTENCE + PARAGRAPH))
    if job.notebook == CONTROL:
        trade = profile.trade
        each = Work(scored=trade["questions"] * 3 * QUESTION + trade["texts"] * 3 * SENTENCE)
        return each * (len(trade["edits"]) * len(trade["strengths"]))
    if job.notebook == STABILITY:
        part = profile.stability
        fits = len(part["ranks"]) * len(part["sparsities"]) * len(part["seeds"]) + 2 * len(part["precisions"])
        return (fit + Work(scored=part["questions"] * QUESTION)) * fits
    if job.notebook == TEACH:
        arms = [name.split("+")[-1] for name in profile.teach["arms"]]
        cells = [making_work(cell) + train for arm in arms for cell in profile.cells(arm).values()]
        return sum(cells, Work(trained=2 * profile.teach["tokens"]))
    return Work()


def evaluation_work(sizes: Mapping[str, Any], split: str) -> Work:
    """What the evaluation of one model on one split takes (``ember.evaluation.Sizes``)."""
    limit = sizes.get("questions")
    questions = sum(count if limit is None else min(count, limit) for count in AVAILABLE[split])
    texts, others, asked, generated = (
        sizes.get(name) or 0 for name in ("texts", "other_texts", "instructions", "generations")
    )
    forward = questions * (QUESTION + LETTERS * bool(sizes.get("letters")))
    forward += asked * INSTRUCTION + (texts + others) * SENTENCE + others / 4 * PARAGRAPH
    # The divergence scores the texts with and without the edit, together with the loss three times.
    forward += 2 * bool(sizes.get("divergence", True)) * (texts + others) * SENTENCE
    answers = 2 * min(AVAILABLE[split][0], sizes.get("open_answers") or 0)
    together = math.ceil(generated / DECODED_TOGETHER) + math.ceil(answers / DECODED_TOGETHER)
    replies = answers + generated * bool(sizes.get("judge"))
    return Work(
        scored=forward + (generated + answers) * SENTENCE,
        decoding_steps=together * sizes.get("new_tokens", 40),
        replies=replies,
    )


def making_work(cell: Mapping[str, Any]) -> Work:
    """What making one edit takes: its steps on as much concept as neutral text, or one pass over the fit sentences."""
    tokens = 2 * cell.get("steps", 0) * cell.get("batch_size", 4) * SENTENCE
    # The unedited states that the training keeps to.
    return Work(trained=tokens, scored=tokens / 2) if tokens else Work(scored=FIT_SENTENCES * SENTENCE)


def _shape(profile: Profile) -> Shape | None:
    """The model's shape, if it is known and the model wants a GPU."""
    spec = find_spec(profile.model)
    return None if spec.origin == "wheel" else spec.shape


def _known_shape(profile: Profile) -> Shape:
    shape = _shape(profile)
    if shape is None:
        raise EmberError(f"the formula is for models that need a GPU and whose shape is known, not {profile.model}")
    return shape


def _bytes(profile: Profile) -> float:
    """Bytes of the weights."""
    dtype = profile.dtype or find_spec(profile.model).dtype
    return _known_shape(profile).parameters * (4 if dtype == "float32" else 2)


def measured_times(profile: str) -> pd.DataFrame:
    """A profile's ``run_times.csv``: its own, or the committed one; empty if there is neither."""
    paths = (root / "tables" / "run_times.csv" for root in (results_dir(profile), REPOSITORY / "results" / profile))
    path = next((path for path in paths if path.exists()), None)
    columns = ["run", "notebook", "start", "wall_seconds", "peak_memory_mb"]
    return pd.read_csv(path) if path else pd.DataFrame({column: [] for column in columns})


@cache
def _measured(profile: str) -> pd.DataFrame:
    return measured_times(profile).set_index("run")


@cache
def _alike(model: str) -> pd.DataFrame:
    """The longest run and the largest memory of each notebook in any profile with this model, by notebook."""
    found = [_measured(name) for name in list_profiles() if load_profile(name).model == model]
    found = [frame for frame in found if len(frame)]
    if not found:
        return pd.DataFrame(columns=["wall_seconds", "peak_memory_mb"])
    return pd.concat(found).groupby("notebook")[["wall_seconds", "peak_memory_mb"]].max()
