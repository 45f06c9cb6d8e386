"""AlphaEdit (Fang et al. 2024): MEMIT's values, written in the null space of what the corpus is made of, in plain PyTorch.

Pi = Q Q^T, Q the eigenvectors of E[k k^T] with eigenvalues below a threshold; dW = R K^T Pi (K_p K_p^T Pi + K K^T Pi + I)^-1 with the keys
K_p of the edits before. Solved densely in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.baselines.memit_merge import Settings, groups_of, keys_and_residuals, values_of
from bench.baselines.plain import Optimised, TextRow

THRESHOLD = 2e-2  # the authors' nullspace_threshold


def projectors(C: dict[int, Tensor], threshold: float = THRESHOLD) -> dict[int, Tensor]:
    """layer -> Pi [d_in, d_in] float64, from layer -> E[k k^T]."""
    out = {}
    for layer, moment in C.items():
        values, vectors = torch.linalg.eigh(moment)
        small = vectors[:, values < threshold]
        out[layer] = small @ small.T
    return out


@torch.no_grad()
def write(
    model, groups: Sequence[Sequence[TextRow]], z: Tensor, Pi: dict[int, Tensor], earlier: dict[int, Tensor], settings: Settings
) -> dict[int, Tensor]:
    """Layer by layer; groups: the rows of each value; z [S, d]; earlier: layer -> K_p K_p^T. Returns it with these edits' keys."""
    after = {}
    for i, layer in enumerate(settings.layers):
        K, R = keys_and_residuals(model, groups, z, layer, settings.layers[-1], len(settings.layers) - i)
        seen = earlier[layer] if layer in earlier else torch.zeros_like(Pi[layer])
        after[layer] = seen + K @ K.T
        system = after[layer] @ Pi[layer] + torch.eye(len(K), dtype=K.dtype, device=K.device)
        weight = model.model.layers[layer].mlp.down_proj.weight
        weight += (R @ torch.linalg.solve(system.T, Pi[layer] @ K).T).to(weight.dtype)
    return after


def edit(
    model, tokenizer, edits: Sequence, Pi: dict[int, Tensor], earlier: dict[int, Tensor], settings: Settings, prefixes: Sequence[str]
) -> tuple[list[Optimised], dict[int, Tensor]]:
    """Write edits, a value a fact, into the model in place. Returns the values and `earlier` with these edits' keys."""
    groups = groups_of(tokenizer, edits, prefixes, settings.merge)
    values = values_of(model, tokenizer, edits, groups, settings)
    return values, write(model, groups, torch.stack([value.z for value in values]), Pi, earlier, settings)
