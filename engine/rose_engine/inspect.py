"""What would be edited in a model, and what an edit would cost, from its configuration alone: no weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rose_engine import embedded
from rose_engine.architecture import Decoder, check_quantiser, check_supported, decoder_of
from rose_engine.dtype import dtype_of
from rose_engine.estimate import measured_rate, memory, seconds, shapes_of, typical_work
from rose_engine.recipe import Recipe, preset


def inspect(
    name: str | Path,
    *,
    subjects: int = 1,
    facts: int = 4,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    recipe: Recipe | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What an edit of so many subjects of so many facts would be on a model: a folder or hub id that holds a configuration, or `smollm2`.

    Returns JSON values: family, parameters, dtype, bits of a projection's weight, model_bytes, recipe, weights (name -> shape),
    memory_bytes above the model by part, delta_bytes, and seconds by stage, estimated from a product that is measured on `device`.
    UnsupportedModelError where the engine does not edit the model, OSError or ValueError where there is no configuration, ValueError
    where the recipe does not fit it.
    """
    folder = str(embedded.embedded_model()) if name == embedded.NAME else str(name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    check_supported(config)
    quantised = getattr(config, "quantization_config", None)
    check_quantiser(str(quantised.get("quant_method")) if quantised else None)
    dtype = dtype_of(dtype, device) or config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    decoder, recipe = decoder_of(model), recipe or preset(config)
    decoder.check_last_layer(recipe.last_layer)
    shapes, work = shapes_of(decoder), typical_work(subjects, facts, recipe.forms + recipe.rewordings)
    return {
        "family": config.model_type,
        "layers": shapes.layers,
        "parameters": shapes.parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "bits": 4 if quantised and quantised.get("load_in_4bit") else 8 if quantised else 8 * shapes.element,
        "model_bytes": round(_bytes(decoder, quantised)),
        "recipe": recipe.as_dict(),
        "subjects": subjects,
        "facts": facts,
        "suffix_tokens": sum(part for batch in work.batches for part in batch.parts),
        "weights": {decoder.weight_name(layer): list(decoder.weight(layer).shape) for layer in recipe.layers},
        "memory_bytes": {part: round(size) for part, size in memory(shapes, work, recipe, device).items()},
        "delta_bytes": 4 * len(recipe.layers) * work.columns * (shapes.d + 2 * shapes.d_in),
        "device": str(device),
        "seconds": seconds(shapes, work, recipe, measured_rate(shapes, dtype, device)),
    }


def _bytes(decoder: Decoder, quantised: dict[str, Any] | None) -> float:
    """Of the weights; of quantised ones the projections of the layers have 4 bits and a float32 scale for each 64, or 8 bits."""
    whole = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    if not quantised:
        return whole
    inside = [p for p in decoder.layers.parameters() if p.dim() == 2]
    each = 0.5 + 4 / 64 if quantised.get("load_in_4bit") else 1.0
    return whole + sum(p.numel() * (each - p.element_size()) for p in inside)
