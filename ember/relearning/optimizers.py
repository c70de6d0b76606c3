"""AdamW for relearning: PyTorch's, or with moments of eight bits, which a large model needs on one GPU."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module

import torch

from ember.errors import EmberError

# Name → class of bitsandbytes.optim; adamw is PyTorch's. Paged moments move to the host where the GPU runs full.
EIGHT_BIT = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
OPTIMIZERS = ("adamw", *EIGHT_BIT)


def require_optimizer(name: str, device: torch.device) -> None:
    """An ``EmberError`` if the optimizer needs a GPU and the model is on none, or bitsandbytes and that is missing."""
    if name == "adamw":
        return
    advice = "or choose optimizer: adamw in the profile's relearn settings"
    if device.type != "cuda":
        raise EmberError(f"optimizer {name} needs a CUDA GPU, the model is on {device.type}: run it on one, {advice}")
    try:
        import_module("bitsandbytes")
    except ImportError as error:
        raise EmberError(f"optimizer {name} needs bitsandbytes: pip install bitsandbytes, {advice}") from error


def make_optimizer(
    name: str, tensors: Iterable[torch.Tensor], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer ``name`` of ``OPTIMIZERS`` over tensors; check ``require_optimizer`` first."""
    settings = {"lr": lr, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(tensors, fused=True, **settings)  # type: ignore[arg-type]
    return getattr(import_module("bitsandbytes").optim, EIGHT_BIT[name])(tensors, **settings)


@contextmanager
def stepping_backward(steps: Mapping[torch.nn.Parameter, Callable[[], None]]) -> Iterator[None]:
    """Take each parameter's step in the backward pass, once its gradient is there, and drop that, to save memory.

    Nothing that the pass still needs is changed: by then it has passed every use of that parameter.
    """

    def take(parameter: torch.Tensor) -> None:
        steps[parameter]()  # type: ignore[index]
        parameter.grad = None

    with ExitStack() as hooks:
        for parameter in steps:
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(take))
        yield
