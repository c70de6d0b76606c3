"""What a profile needs that is not there, found before any work starts and told all at once."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec as find_module
from pathlib import Path

from ember.batch.planning import arms
from ember.batch.profiles import Profile
from ember.errors import EmberError
from ember.models.specs import ModelSpec, find_spec
from ember.store.devices import asked_device, choose_device


@dataclass(frozen=True)
class Finding:
    """Something worth knowing before a run, what to do about it, and whether the run would fail without that."""

    what: str
    advice: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        return f"{'!' if self.fatal else '-'} {self.what}" + (f". {self.advice}" if self.advice else "")


def preflight(profile: Profile) -> list[Finding]:
    """What the profile says that it needs, and what a run would miss here: the model, a GPU, packages, a judge's key.

    Only a Hub model that is not in the cache takes the network: its page is asked whether we may have it.
    """
    spec = find_spec(profile.model)
    device, problems = find_device(spec)
    told = [Finding(profile.needs, fatal=False)] if profile.needs else []
    return [*told, *model_access(spec), *problems, *packages(profile, device), *judge_key(profile)]


def require_ready(profile: Profile) -> list[Finding]:
    """The findings of ``preflight``; obstacles are an ``EmberError`` with a line for each and what to do about it."""
    found = preflight(profile)
    obstacles = [f"\n  {finding}" for finding in found if finding.fatal]
    if obstacles:
        raise EmberError(f"profile {profile.name} cannot run here: {len(obstacles)} missing{''.join(obstacles)}")
    return found


def model_access(spec: ModelSpec) -> Iterator[Finding]:
    """Whether a Hub model is in the cache, or may be fetched: a token, and the licence accepted."""
    if spec.origin != "hub" or _cached(spec):
        return
    import httpx
    from huggingface_hub import auth_check, constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    away = f"{spec.location} is not in the Hub's cache, and"
    page = spec.licence or f"https://huggingface.co/{spec.location}"
    licence = f"Accept the licence at {page} with the account of your token"
    login = "set HF_TOKEN to a token of https://huggingface.co/settings/tokens, or run: hf auth login"
    if constants.HF_HUB_OFFLINE:
        advice = f"Fetch it where there is a network (python -m ember fetch-model {spec.name}), or unset HF_HUB_OFFLINE"
        yield Finding(f"{away} HF_HUB_OFFLINE forbids to fetch it", advice)
    elif spec.licence and get_token() is None:
        yield Finding(f"{away} fetching it takes a token", f"{licence}; {login}")
    else:
        try:
            auth_check(spec.location)
        except HfHubHTTPError as error:
            gated, code = isinstance(error, GatedRepoError), error.response.status_code
            what = "is gated, and your token has no access" if gated else f"is refused by the Hub (HTTP {code})"
            advice = f"{licence}; check the name, and {login}" if 400 <= code < 500 else "Try again later"
            yield Finding(f"{spec.location} {what}", advice)
        except (OSError, httpx.HTTPError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(f"{away} the Hub does not answer ({reason})", "Connect once to fetch it")


def _cached(spec: ModelSpec) -> bool:
    """Whether the Hub's cache holds the model's config and its weights, all files that their index names."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(spec.location, "config.json", revision=spec.revision)
    if not isinstance(config, str):
        return False
    index = Path(config).with_name("model.safetensors.index.json")
    parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else ()
    return all(index.with_name(name).exists() for name in parts or ["model.safetensors"])


def find_device(spec: ModelSpec) -> tuple[str, list[Finding]]:
    """Kind of device that the model would go to. A large Hub model wants a GPU, unless the CPU is asked for by name."""
    try:
        device = choose_device().type
    except EmberError as error:
        return "cpu", [Finding(str(error).rstrip("."))]
    if device == "cpu" and asked_device() != "cpu" and spec.origin == "hub" and spec.dtype == "bfloat16":
        advice = "Run it on a machine with one, or set EMBER_DEVICE=cpu to do without (slow)"
        return device, [Finding(f"{spec.name} wants a GPU, and PyTorch finds none", advice)]
    return device, []


def packages(profile: Profile, device: str) -> Iterator[Finding]:
    """Packages outside the ordinary installation: released autoencoders, eight-bit moments."""
    cells = [cell for arm in arms(profile) for cell in profile.cells(arm.method).values()]
    released = sorted({cell.get("sae", "trained") for cell in cells} - {"trained"})
    if released and find_module("sae_lens") is None:
        yield Finding(f"{', '.join(released)} autoencoders need sae-lens", "pip install -e '.[sae]'")
    optimizer = profile.relearn.settings.get("optimizer", "adamw")
    if optimizer == "adamw" or not profile.relearn.sweeps:
        return
    if device != "cuda":
        yield Finding(f"optimizer {optimizer} needs a CUDA GPU", "Or choose optimizer: adamw in the relearn settings")
    if find_module("bitsandbytes") is None:
        yield Finding(f"optimizer {optimizer} needs bitsandbytes", "pip install bitsandbytes")


def judge_key(profile: Profile) -> Iterator[Finding]:
    """Whether the key of a judge that the profile names is there. A profile without a judge has no judged scores."""
    variable = profile.judge.get("key_variable")
    if variable and not os.environ.get(variable):
        advice = f"Set {variable}, or clear the profile's judge (judge: {{}}) to run without judged scores"
        yield Finding(f"the judge {profile.judge['model']} needs a key in {variable}", advice)
