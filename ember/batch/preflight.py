"""What a profile needs that is not there, found before any work starts and told all at once."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec as find_module
from pathlib import Path

from ember.batch.memory import Need, device_memory, host_memory, model_shape, needs
from ember.batch.planning import arms
from ember.batch.profiles import Profile
from ember.errors import EmberError
from ember.judging.settings import JudgeConfig
from ember.models.specs import ModelSpec, find_spec
from ember.store.devices import asked_device, choose_device

# Where the system shows a GPU of NVIDIA's; without one PyTorch need not be asked, which takes seconds.
_GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


@dataclass(frozen=True)
class Finding:
    """Something worth knowing before a run, what to do about it, and whether the run would fail without that."""

    what: str
    advice: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        return f"{'!' if self.fatal else '-'} {self.what}" + (f". {self.advice}" if self.advice else "")


def preflight(profile: Profile) -> list[Finding]:
    """Everything that a profile's run would miss here: access to the model, a GPU, memory, packages, a judge's key.

    Only a Hub model that is not in the cache takes the network: its page is asked whether we may have it.
    """
    spec = find_spec(profile.model)
    found = [*model_access(spec)]
    device, problems = find_device(spec)
    found += [*problems, *memory(profile, device), *packages(profile, device), *judge_key(profile)]
    return found


def require_ready(profile: Profile) -> list[Finding]:
    """The findings of ``preflight`` that are no obstacle.

    Raises
    ------
    EmberError
        If anything is; the message has a line for each obstacle, with what to do about it.
    """
    found = preflight(profile)
    obstacles = [finding for finding in found if finding.fatal]
    if obstacles:
        count = f"{len(obstacles)} thing{'s' if len(obstacles) > 1 else ''}"
        listing = "\n".join(f"  {finding}" for finding in obstacles)
        raise EmberError(f"profile {profile.name} cannot run here: {count} missing\n{listing}")
    return found


def model_access(spec: ModelSpec) -> Iterator[Finding]:
    """Whether a Hub model is in the cache, or may be fetched: a token, and the licence accepted."""
    if spec.origin != "hub" or _cached(spec):
        return
    import httpx
    from huggingface_hub import auth_check, constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    page = spec.licence or f"https://huggingface.co/{spec.location}"
    what = f"{spec.location} is not in the Hub's cache"
    login = "set HF_TOKEN to a token of https://huggingface.co/settings/tokens, or run: hf auth login"
    if constants.HF_HUB_OFFLINE:
        advice = f"Fetch it where there is a network (python -m ember fetch-model {spec.name}), or unset HF_HUB_OFFLINE"
        yield Finding(f"{what}, and HF_HUB_OFFLINE forbids to fetch it", advice)
        return
    if spec.licence and get_token() is None:
        yield Finding(f"{what}, and fetching it takes a token", f"Accept the licence at {page}; then {login}")
        return
    try:
        auth_check(spec.location)
    except GatedRepoError:
        advice = f"Accept the licence at {page} with the account of your token"
        yield Finding(f"{spec.location} is gated, and your token has no access", advice)
    except RepositoryNotFoundError:
        yield Finding(f"the Hub shows no {spec.location} to you", f"Check the name at {page}, and the token: {login}")
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        refused = code in (401, 403)
        advice = f"Accept the licence at {page}, and check the token: {login}" if refused else "Try again later"
        yield Finding(f"the Hub refuses {spec.location} (HTTP {code})", advice)
    except (OSError, httpx.HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield Finding(f"{what}, and the Hub does not answer ({reason})", "Connect once to fetch it")


def _cached(spec: ModelSpec) -> bool:
    """Whether the Hub's cache holds the model's config and its weights, all files that their index names."""
    from huggingface_hub import try_to_load_from_cache

    def cached(file: str) -> str | None:
        path = try_to_load_from_cache(spec.location, file, revision=spec.revision)
        return path if isinstance(path, str) else None

    index = cached("model.safetensors.index.json")
    files = ["model.safetensors"]
    if index:
        files = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return all(map(cached, ("config.json", *files)))


@dataclass(frozen=True)
class Device:
    """``cpu`` or ``cuda``, and which GPU (None: the current one)."""

    kind: str = "cpu"
    index: int | None = None


def find_device(spec: ModelSpec) -> tuple[Device, list[Finding]]:
    """Where the model would go. A large Hub model wants a GPU, unless the CPU is asked for by name."""
    asked = asked_device()
    if asked == "cpu" or (asked == "auto" and not any(Path(node).exists() for node in _GPU_NODES)):
        chosen = Device()
    else:
        try:
            device = choose_device()
        except EmberError as error:
            return Device(), [Finding(str(error).rstrip("."))]
        chosen = Device(device.type, device.index)
    if chosen.kind == "cpu" and asked != "cpu" and spec.origin == "hub" and spec.dtype == "bfloat16":
        advice = "Run it on a machine with one, or set EMBER_DEVICE=cpu to do without (slow)"
        return chosen, [Finding(f"{spec.name} wants a GPU, and PyTorch finds none", advice)]
    return chosen, []


def memory(profile: Profile, device: Device) -> Iterator[Finding]:
    """Whether the largest stage fits; where others use the memory now, a statement."""
    shape = model_shape(profile.model)
    if shape is None:
        yield Finding(f"the size of {profile.model} is not known here, so memory is not checked", fatal=False)
        return
    planned = needs(profile, shape)
    places = [("cpu", "memory", host_memory)]
    if device.kind == "cuda":
        places = [("device", "GPU memory", lambda: device_memory(device.index)), ("host", "memory", host_memory)]
    for place, name, measured in places:
        worst: Need = max(planned, key=lambda need: float(getattr(need, place)))
        needed, (total, free) = float(getattr(worst, place)), measured()
        what = f"{worst.stage} needs about {needed:.0f} GB of {name}"
        if needed > total:
            yield Finding(f"{what}, found {total:.0f} GB", _less(worst, place, profile))
        elif needed > free:
            yield Finding(f"{what}; {free:.0f} of {total:.0f} GB are free now", fatal=False)


def _less(worst: Need, place: str, profile: Profile) -> str:
    if worst.stage.startswith("relearning") and place != "host":
        settings = "optimizer: paged_adamw_8bit and gradient_checkpointing: true" if place == "device" else ""
        known = profile.relearn["settings"].get("optimizer", "adamw") != "adamw"
        if settings and not known:
            return f"Take a larger GPU, or {settings} in the profile's relearn settings, or fewer precisions"
    return "Take a larger machine, or a smaller model"


def packages(profile: Profile, device: Device) -> Iterator[Finding]:
    """Packages outside the ordinary installation: released autoencoders, eight-bit moments."""
    methods = {method for method, _ in arms(profile)}
    released = sorted({
        str(cell["sae"]) for method in methods for cell in profile.cells(method).values()
        if cell.get("sae", "trained") != "trained"
    })  # fmt: skip
    if released and find_module("sae_lens") is None:
        yield Finding(f"{', '.join(released)} autoencoders need sae-lens", "pip install -e '.[sae]'")
    optimizer = profile.relearn["settings"].get("optimizer", "adamw")
    if optimizer == "adamw" or not profile.relearn["sweeps"]:
        return
    if device.kind != "cuda":
        yield Finding(f"optimizer {optimizer} needs a CUDA GPU", "Or choose optimizer: adamw in the relearn settings")
    if find_module("bitsandbytes") is None:
        yield Finding(f"optimizer {optimizer} needs bitsandbytes", "pip install bitsandbytes")


def judge_key(profile: Profile) -> Iterator[Finding]:
    """Whether the key of a judge that the profile names is there. A profile without a judge has no judged scores."""
    if not profile.judge:
        return
    variable = JudgeConfig(**profile.judge).key_variable
    if variable and not os.environ.get(variable):
        what = f"the judge {profile.judge['model']} needs a key in {variable}"
        yield Finding(what, f"Set {variable}, or clear the profile's judge (judge: {{}}) to run without judged scores")
