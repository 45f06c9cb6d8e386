"""ROME (Meng et al. 2022): one rank-one update of one layer for each fact, one fact after the other, in plain PyTorch.

dW = r (C^-1 k)^T / (k^T C^-1 k): the least change, in the metric of C = E[k k^T], after which the key k gives what was wanted. The value
is optimised as MEMIT's, at the same layer; k is the mean over the prompt's contexts, the residual r is read at the bare prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench.baselines.memit_merge import Settings, groups_of, keys_and_residuals, values_of
from bench.baselines.plain import Optimised

ROME = replace(Settings(), layers=(5,), merge=False)


def edit(model, tokenizer, edits: Sequence, C: dict[int, Tensor], prefixes: Sequence[str], settings: Settings = ROME) -> list[Optimised]:
    """Write edits into the model in place, each on top of the ones before."""
    [layer], values = settings.layers, []
    for fact in edits:
        group = groups_of(tokenizer, [fact], prefixes, merge=False)
        values += values_of(model, tokenizer, [fact], group, settings)
        with torch.no_grad():
            k, r = keys_and_residuals(model, group, values[-1].z[None], layer, layer, 1)
            u = torch.linalg.solve(C[layer], k)
            weight = model.model.layers[layer].mlp.down_proj.weight
            weight += (r @ u.T / (k * u).sum()).to(weight.dtype)
    return values
