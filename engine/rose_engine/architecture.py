"""What differs between model families, in one table, and the view of a model that the engine works on.

A family is a row of `FAMILIES`: where its decoder layers, embedding, final norm and the edited projection stand. The engine calls the
decoder layers itself; everything inside a layer stays the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from operator import attrgetter

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rose_engine.branch import QUANTISERS, Branch, branch_beside
from rose_engine.sharding import Sharding, local, sharding_of


@dataclass(frozen=True)
class Family:
    """Attribute paths from the causal model, and from a decoder layer those of the edited projection and, where there is one, of the norm
    between it and the residual stream. rotary, positions: None where positions are not rotated, or not looked up in a table."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    rotary: str | None = "model.rotary_emb"
    positions: str | None = None
    projection: str = "mlp.down_proj"
    post_norm: str | None = None


# Of a layer the cosines and sines that its attention turns by, or None where positions are not rotated.
Rotary = Callable[[int], tuple[Tensor, Tensor] | None]

LLAMA_LIKE = Family()
POST_NORM = Family(post_norm="post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "arcee": LLAMA_LIKE,
    "gemma2": POST_NORM,
    "gemma3_text": POST_NORM,
    "gpt2": Family("transformer.h", "transformer.wte", "transformer.ln_f", None, "transformer.wpe", "mlp.c_proj"),
    "gpt_neox": Family(
        "gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "gpt_neox.rotary_emb", projection="mlp.dense_4h_to_h"
    ),
    "helium": LLAMA_LIKE,
    "llama": LLAMA_LIKE,
    "ministral": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "nemotron": LLAMA_LIKE,
    "olmo": LLAMA_LIKE,
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "phi3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "seed_oss": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "starcoder2": Family(projection="mlp.c_proj"),
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
    rotary: nn.Module | None
    positions: nn.Embedding | None

    @property
    def head(self) -> Tensor:
        """The output matrix [V, d]."""
        return self.model.get_output_embeddings().weight

    @property
    def softcap(self) -> float | None:
        """Logits x are softcap tanh(x / softcap); None: as they are."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    @property
    def max_length(self) -> int:
        """The longest row in tokens. A sliding window bounds it, for within it the window is plain causal attention; so does the length
        from which a rotary embedding depends on how long the text is."""
        config = self.model.config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        trained = getattr(config, "original_max_position_embeddings", None)
        return min(length for length in (config.max_position_embeddings, window, trained) if length)

    def embed(self, token: Tensor, position: Tensor) -> Tensor:
        """What the first layer is given, [N, d], of tokens [N] at positions [N]."""
        embedded = self.embedding(token)
        return embedded if self.positions is None else embedded + self.positions(position)

    def rotations(self, hidden: Tensor, position: Tensor) -> Rotary:
        """Of each layer the cosines and sines that its attention turns by; families with local and global layers have two pairs."""
        if self.rotary is None:
            return lambda layer: None
        kinds = self._rotary_kinds
        if not kinds:
            one = self.rotary(hidden, position)
            return lambda layer: one
        pairs = {kind: self.rotary(hidden, position, kind) for kind in set(kinds)}
        return lambda layer: pairs[kinds[layer]]

    @cached_property
    def _rotary_kinds(self) -> list[str] | None:
        """Of each layer the name of its rotary embedding; None where there is but one."""
        return getattr(self.model.config, "layer_types", None) if "layer_type" in signature(self.rotary.forward).parameters else None

    def before_norm(self, layer: int, key: Tensor, residual: Tensor) -> Tensor:
        """What the projection has to put out more, [n, d], so that the residual stream moves by `residual` [n, d] at keys [n, d_in].

        A norm g y / rms(y) between them turns y + residual rms(y) / g into the direction of what is wanted.
        """
        if self.family.post_norm is None:
            return residual
        norm = attrgetter(self.family.post_norm)(self.layers[layer])
        y = self.projection(layer)(key.to(self.head.dtype)).float()
        gain = norm(torch.ones_like(y[:1], dtype=self.head.dtype)).float()
        reached = gain.abs() > 1e-3 * gain.abs().max()  # a coordinate that the norm shuts off cannot be moved
        return residual * y.pow(2).mean(-1, keepdim=True).sqrt() * torch.where(reached, 1 / gain, 0.0)

    def projection(self, layer: int) -> nn.Module:
        """The edited projection of a layer, which maps the key to the MLP's output."""
        return attrgetter(self.family.projection)(self.layers[layer])

    @property
    def quantiser(self) -> str | None:
        """The method by which the weights are quantised; None where they are not."""
        return _quantiser(self.model)

    @cached_property
    def _branches(self) -> dict[int, Branch]:
        return {}

    def weight(self, layer: int) -> Tensor | Branch:
        """The edited weight [d_out, d_in], live: this rank's columns of it, the transpose of what is stored where the projection is a
        `Conv1D`, and the branch beside it where it is quantised."""
        projection = self.projection(layer)
        if self.quantiser:
            if layer not in self._branches:
                self._branches[layer] = branch_beside(projection)
            return self._branches[layer]
        weight = local(projection.weight.data)
        return weight.T if isinstance(projection, Conv1D) else weight

    @cached_property
    def sharding(self) -> Sharding | None:
        """How the edited weights are spread over ranks; None where each is whole."""
        if self.quantiser:
            return None
        found = sharding_of(self.projection(0).weight.data)
        if found is not None and isinstance(self.projection(0), Conv1D):
            raise ValueError(f"`{self.model.config.model_type}` stores its weights transposed and is not edited spread over ranks")
        return found

    def weight_name(self, layer: int) -> str:
        """The state-dict name of the edited weight."""
        return f"{self.family.layers}.{layer}.{self.family.projection}.weight"

    def layer_of(self) -> dict[str, int]:
        """The layer of every weight that may be edited, by its name."""
        return {self.weight_name(layer): layer for layer in range(len(self.layers))}

    def check_last_layer(self, layer: int) -> None:
        """ValueError where the last edited layer leaves none above it."""
        if layer >= len(self.layers) - 1:
            raise ValueError(f"layer {layer} cannot be edited: the model has {len(self.layers)} layers")


def check_supported(config: PretrainedConfig) -> None:
    """UnsupportedModelError, with the reason, where the family of a configuration is not in the table."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"model type `{kind}` is not supported{_why_not(config)}; supported are {', '.join(sorted(FAMILIES))}")


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The engine's view of `model`. UnsupportedModelError where its family is not in the table."""
    check_supported(model.config)
    family = FAMILIES[model.config.model_type]
    check_quantiser(_quantiser(model))
    head = model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise UnsupportedModelError("the output head is quantised; leave it in full precision, which is the quantisers' default")
    if getattr(head, "bias", None) is not None:
        raise UnsupportedModelError("the output head has a bias, which the engine does not compute")
    places = (family.layers, family.embedding, family.norm, family.rotary, family.positions)
    parts = [attrgetter(path)(model) if path else None for path in places]
    return Decoder(model, family, *parts)


def check_quantiser(method: str | None) -> None:
    """UnsupportedModelError where weights are quantised by a method that passes no gradient; None: they are not quantised."""
    if method is not None and method not in QUANTISERS:
        raise UnsupportedModelError(
            f"the weights are quantised by {method}, through which no gradient is known to pass; quantise with {' or '.join(QUANTISERS)},"
            " or edit the model in float32, bfloat16 or float16 and ship the edit as an adapter"
        )


def check_placed(model: PreTrainedModel) -> None:
    """UnsupportedModelError where the weights are not all in the memory of one device."""
    devices = sorted({str(p.device) for p in model.parameters()})
    if "meta" in devices:
        raise UnsupportedModelError(
            "some weights are offloaded, and an edit writes into weights that stay; load the model whole on one device (`rose inspect`"
            " says what it needs), quantised, or spread over ranks (`rose_engine.parallel`)"
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the layers are spread over {', '.join(devices)}, which the packed attention does not follow; load the model on one device, or"
            " spread its weights over ranks (`rose_engine.parallel`)"
        )


def _quantiser(model: PreTrainedModel) -> str | None:
    if not getattr(model, "is_quantized", False):
        return None
    method = getattr(model.config.quantization_config, "quant_method", "an unknown method")
    return str(getattr(method, "value", method))


MIXTURE = "of a mixture of experts, which expert holds a fact differs from token to token"
# A field of a configuration, and why a model that has it is not edited.
REASONS = (
    ("is_encoder_decoder", "an encoder and a decoder share a fact, and the engine edits decoders alone"),
    ("num_local_experts", MIXTURE),
    ("num_experts", MIXTURE),
    ("n_routed_experts", MIXTURE),
    ("vision_config", "it wraps a language model; load that one alone, as a causal language model"),
)
OTHERS = {"gptj": "its attention cannot be exchanged (`AttentionInterface`), and its output head has a bias"}


def _why_not(config: PretrainedConfig) -> str:
    if config.model_type in OTHERS:
        return f": {OTHERS[config.model_type]}"
    return next((f": {reason}" for field, reason in REASONS if getattr(config, field, None)), "")
