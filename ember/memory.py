"""How much memory a profile's run takes, told from the model's shape before any weights are loaded.

Plain sums of what is held at the worst moment of each stage, in GB of 10⁹ bytes; within a factor of two of what was
measured. "host" is the machine's memory, "device" where the model is; on the CPU they are one and the same.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ember.planning import ERASE, FACTORIZE, LOCALIZE, RELEARN, arms, plan
from ember.profiles import Profile
from ember.specs import Shape, find_spec

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
PROCESS = 0.6e9  # Python, PyTorch and the libraries; about as much for CUDA on the device
FIT_TOKENS = 8000  # unique tokens of the sentences of a fit
SCORED_TOKENS = 2048  # of a batch whose distributions are compared (``ember.scoring``), and as many are held
SENTENCE, PARAGRAPH = 64, 256  # tokens
SAE_WIDTHS = {"trained": 1536, "gemma-scope": 16_384, "llama-scope": 32_768}
KEPT_EDITS = 2e9  # bytes of edits that the grid of notebook 03 keeps
# Per parameter that is trained: weights, float32 masters, and AdamW's two moments.
TRAINING = {"fp32": (4, 0, 8), "bf16": (2, 0, 4), "bf16_master": (2, 4, 8)}


@dataclass(frozen=True)
class Need:
    """GB that a stage takes: on the ``device`` and the ``host`` where the model is on a GPU, or all on the ``cpu``."""

    stage: str
    device: float
    host: float
    cpu: float


def model_shape(name: str) -> Shape | None:
    """The shape of a model in ``MODELS`` or in a folder; None where that would take the network."""
    spec = find_spec(name)
    if spec.shape or spec.origin != "folder":
        return spec.shape
    config = json.loads((Path(spec.location) / "config.json").read_text(encoding="utf-8"))
    try:
        heads, d_model = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            config["vocab_size"], d_model, config["num_hidden_layers"], config["intermediate_size"], heads,
            config.get("num_key_value_heads") or heads, config.get("head_dim") or d_model // heads,
        )  # fmt: skip
    except KeyError:
        return None


def needs(profile: Profile, shape: Shape) -> list[Need]:
    """The needs of every stage that a profile's plan has, in order."""
    dtype = profile.dtype or find_spec(profile.model).dtype
    planned = {job.notebook for job in plan(profile)}
    found = [loading(shape, dtype)]
    if FACTORIZE in planned:
        found.append(factorizing(shape, dtype, int(profile.fit["rank"])))
    if planned & {FACTORIZE, ERASE, LOCALIZE}:
        found.append(evaluating(shape, dtype))
    if ERASE in planned:
        methods = dict.fromkeys(method for method, _ in arms(profile))
        found += [erasing(shape, dtype, method, profile.cells(method).values()) for method in methods]
    if RELEARN in planned:
        precisions = dict.fromkeys(p for sweep in profile.relearn["sweeps"] for p in sweep["precisions"])
        found += [relearning(shape, dtype, precision, profile.relearn["settings"]) for precision in precisions]
    return found


def loading(shape: Shape, dtype: str) -> Need:
    """The weights, with an output matrix of their own; they pass through the host."""
    weights = shape.parameters * BYTES[dtype]
    return _need("loading the model", weights, weights, cpu=weights)


def factorizing(shape: Shape, dtype: str, rank: int) -> Need:
    """X twice and G six times in float64, on the host."""
    weights = shape.parameters * BYTES[dtype]
    return _need("factorizing", weights, 8 * FIT_TOKENS * (2 * shape.d_model + 6 * rank))


def evaluating(shape: Shape, dtype: str) -> Need:
    """Next-token distributions in float32: one set that is held, and those of a batch with their difference."""
    return _need("evaluating", shape.parameters * BYTES[dtype] + _distributions(shape), 0)


def erasing(shape: Shape, dtype: str, method: str, cells: Iterable[Mapping[str, Any]]) -> Need:
    """What evaluating takes, or at the end a copy of the weights, or what the method itself needs, if that is more.

    ``cells`` are the settings of the grid; defaults are those of the method. Edits that are kept lie on the host.
    """
    from ember.methods import METHODS  # brings torch

    b, weights = BYTES[dtype], shape.parameters * BYTES[dtype]
    own = {"rmu": _rmu, "crisp": _crisp, "pisces": _pisces, "snmf": _snmf}.get(method)
    device, host = 0.0, 0.0
    if own:
        found = [own(shape, b, METHODS[method].config(**cell)) for cell in cells]
        device, host = (max(parts) for parts in zip(*found, strict=True))
        host += min(KEPT_EDITS, sum(edit for _, edit in found))
    return _need(f"erasing with {method}", weights + max(_distributions(shape), weights, device), host)


def _rmu(shape: Shape, b: int, config: Any) -> tuple[float, float]:
    """The trained matrices five times (old, gradient, moments, new), states that are to stay, one pass's activations.

    An edit has new and old values of what it changes, on the host.
    """
    trained = config.n_trained * shape.d_model * shape.d_mlp * b
    tokens = config.batch_size * SENTENCE
    states = config.steps * tokens * shape.d_model * 4
    return 5 * trained + states + _activations(shape, b, 2 * tokens, config.layer + 1), 2 * trained


def _crisp(shape: Shape, b: int, config: Any) -> tuple[float, float]:
    band = (max(config.layers) - config.first_layer + 1) * shape.layer_parameters * b
    tokens = config.batch_size * SENTENCE
    states = config.steps * (2 * tokens * len(config.layers) + SENTENCE) * shape.d_model * 4
    activations = _activations(shape, b, 2 * tokens + SENTENCE, shape.layers)
    return 2 * band + states + activations + _autoencoders(shape, config), 2 * band


def _pisces(shape: Shape, b: int, config: Any) -> tuple[float, float]:
    coefficients = 3 * shape.d_mlp * SAE_WIDTHS[config.sae] * 4
    changed = len(config.layers) * shape.d_model * shape.d_mlp
    return _autoencoders(shape, config) + coefficients + 4 * changed, 2 * changed * b


def _snmf(shape: Shape, b: int, config: Any) -> tuple[float, float]:
    """Activations of a third of the layers on the host in float32, one of them twice more; the edit of both sides."""
    layers = -(-shape.layers // 3)
    sampled = 2 * config.tokens * shape.d_mlp * 4
    changed = 2 * layers * shape.d_model * shape.d_mlp
    return 4.0 * changed, (layers + 2) * sampled + 2 * changed * b


def relearning(shape: Shape, dtype: str, precision: str, settings: Mapping[str, Any]) -> Need:
    """Training all parameters, or scoring a float32 copy of them between steps, whichever is more.

    Gradients come and go one by one. The weights as they were and as training started lie on the host.
    """
    P, (weights, masters, moments) = shape.parameters, TRAINING[precision]
    if settings.get("optimizer", "adamw") != "adamw":
        moments = 2
    tokens = settings.get("batch_size", 1) * settings.get("max_tokens", PARAGRAPH)
    kept = settings.get("gradient_checkpointing", False)
    passing = _activations(shape, weights, tokens, 1 if kept else shape.layers)
    passing += kept * shape.layers * tokens * shape.d_model * weights + 3 * tokens * shape.vocab * 4
    # One gradient at a time, the largest that of an embedding matrix.
    gradient = shape.vocab * shape.d_model * (weights + masters)
    training = P * (weights + masters + moments) + gradient + passing
    scoring = P * (masters + moments + 4) + 4 * SENTENCE * SENTENCE * shape.vocab
    optimizer = settings.get("optimizer", "adamw")
    return _need(f"relearning in {precision} with {optimizer}", max(training, scoring), P * (BYTES[dtype] + weights))


def _distributions(shape: Shape) -> float:
    return 5.0 * SCORED_TOKENS * shape.vocab * 4


def _activations(shape: Shape, b: int, tokens: int, layers: int) -> float:
    """What a pass keeps for the way back: in each layer about 12 vectors of the stream and 4 of the MLP."""
    return float(layers * tokens * (12 * shape.d_model + 4 * shape.d_mlp) * b)


def _autoencoders(shape: Shape, config: Any) -> float:
    return len(config.layers) * 2.0 * shape.d_model * SAE_WIDTHS[config.sae] * 4


def _need(stage: str, device: float, host: float, *, cpu: float | None = None) -> Need:
    """In GB, with the libraries once in each place."""
    together = device + host if cpu is None else cpu
    return Need(stage, *(round((part + PROCESS) / 1e9, 1) for part in (device, host, together)))


def host_memory() -> tuple[float, float]:
    """GB that this machine, or our control group if that is smaller, has in all and has free."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
    except OSError:
        limit, used = "max", 0
    if limit.isdigit():
        total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    return total / 1e9, free / 1e9


def device_memory(index: int | None = None) -> tuple[float, float]:
    """GB that a GPU has in all and has free."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return total / 1e9, free / 1e9
