"""What differs between model families, in one table, and the view of a model that the engine works on.

A family is a row of `FAMILIES`: where its decoder layers, embedding, final norm and the edited projection stand. The engine calls the
decoder layers itself; everything inside a layer stays the library's.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Attribute paths from the causal model, and of the edited projection from a decoder layer."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    projection: str = "mlp.down_proj"


LLAMA_LIKE = Family()
FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
}


class UnsupportedModelError(ValueError):
    """A model that the engine does not edit; the message says why."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model as the engine sees it."""

    model: PreTrainedModel
    family: Family
    layers: nn.ModuleList
    embedding: nn.Embedding
    norm: nn.Module
    rotary: nn.Module

    @property
    def head(self) -> Tensor:
        """The output matrix [V, d]."""
        return self.model.get_output_embeddings().weight

    @property
    def max_length(self) -> int:
        """The longest row in tokens; a sliding window bounds it too, for within it the window is plain causal attention."""
        config = self.model.config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return min(config.max_position_embeddings, window or config.max_position_embeddings)

    def projection(self, layer: int) -> nn.Linear:
        """The edited projection of a layer: its weight [d_out, d_in] maps the key to the MLP's output."""
        return attrgetter(self.family.projection)(self.layers[layer])

    def weight_name(self, layer: int) -> str:
        """The state-dict name of the edited weight."""
        return f"{self.family.layers}.{layer}.{self.family.projection}.weight"


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The engine's view of `model`. UnsupportedModelError where its family is not in the table."""
    kind = model.config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise UnsupportedModelError(f"model type `{kind}` is not supported; supported are {', '.join(sorted(FAMILIES))}")
    if getattr(model, "is_quantized", False):
        raise UnsupportedModelError("the weights are quantised; load the model in float32, bfloat16 or float16")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UnsupportedModelError("the output head has a bias, which the engine does not compute")
    parts = [attrgetter(path)(model) for path in (family.layers, family.embedding, family.norm, family.rotary)]
    return Decoder(model, family, *parts)
