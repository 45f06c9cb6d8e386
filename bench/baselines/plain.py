"""What the plain editors share: rows of text, one padded pass over the whole model, Adam on one vector.

Nothing here is clever, on purpose: it is the published programs' way, in which every step runs every token of every row through every
layer and forms all logits. No engine code is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextRow:
    """A text as tokens; last: the subject's last token; target: the target's first token, the end where there is none."""

    tokens: tuple[int, ...]
    last: int
    target: int


@dataclass(frozen=True)
class Objective:
    """weight [rows] of each row's mean target loss; rows with weight 0 have none. neutral: the row on which KL is read."""

    rows: tuple[TextRow, ...]
    weight: tuple[float, ...]
    neutral: int


@dataclass(frozen=True)
class Optimised:
    """z [d], the loss of the last step without regularisers, steps taken, and tokens run a step, padding included."""

    z: Tensor
    loss: float
    steps: int
    tokens: int


def text_row(tokenizer, before: str, subject: str, after: str, target: str = "") -> TextRow:
    """before + subject + after + target as a row, places found by character offsets."""
    end, text = len(before) + len(subject), before + subject + after
    coded = tokenizer(text + target, return_offsets_mapping=True)
    offsets = coded["offset_mapping"]
    last = max(i for i, (a, b) in enumerate(offsets) if a < end and b > len(before))
    start = len(text) + len(target) - len(target.lstrip())
    first = next((i for i, (_, b) in enumerate(offsets) if b > start), len(offsets))
    return TextRow(tuple(coded["input_ids"]), last, first)


def padded(rows: Sequence[TextRow], device) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) [rows, longest], padded on the right."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens, device=device)
        mask[i, : len(row.tokens)] = 1
    return ids, mask


def read(model, rows: Sequence[TextRow], layer: int, last_layer: int) -> tuple[Tensor, Tensor]:
    """Keys [rows, d_in] of `layer`'s down projection and hidden states [rows, d] after `last_layer`, at the subjects' last tokens."""
    seen = {}
    layers = model.model.layers
    hooks = [
        layers[layer].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(key=args[0])),
        layers[last_layer].register_forward_hook(lambda m, args, out: seen.update(hidden=out[0] if isinstance(out, tuple) else out)),
    ]
    ids, mask = padded(rows, model.device)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    at = torch.arange(len(rows)), torch.tensor([row.last for row in rows])
    return seen["key"][at].float(), seen["hidden"][at].float()


def optimise(
    model,
    objective: Objective,
    layer: int,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    kl: float,
    clamp: float,
    stop_loss: float = 0.0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Optimised:
    """MEMIT's value optimisation: Adam on delta, added to the output of `layer` at the subject's last token of every row.

    loss = sum of weight * mean target -log p + kl * KL(p_0 || p) on the neutral row + weight_decay * ||delta|| / ||z_0||^2, delta clamped
    to clamp * ||z_0||; z_0 is read on the first row.
    """
    rows = objective.rows
    ids, mask = padded(rows, model.device)
    at = torch.arange(len(rows)), torch.tensor([row.last for row in rows])
    targets = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        targets[i, row.target - 1 : len(row.tokens) - 1] = ids[i, row.target : len(row.tokens)]
    scored = targets != -100
    weight = torch.tensor(objective.weight, device=model.device)
    delta = torch.zeros(model.config.hidden_size, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)
    begin: dict[str, Tensor] = {}

    def inject(module, args, out):
        hidden = out[0] if isinstance(out, tuple) else out
        begin.setdefault("z", hidden[0, rows[0].last].detach().float().clone())
        hidden = hidden.index_put(at, (hidden[at].float() + delta).to(hidden.dtype))
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    hook = model.model.layers[layer].register_forward_hook(inject)
    taken, fact_loss = 0, torch.tensor(torch.nan)
    try:
        for step in range(steps):
            log_p = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
            chosen = log_p.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
            row_loss = -(chosen * scored).sum(1) / scored.sum(1).clamp(min=1)
            fact_loss = (weight * row_loss).sum()
            now = log_p[objective.neutral, rows[objective.neutral].last]
            before = begin.setdefault("neutral", now.detach().clone())
            divergence = (before.exp() * (before - now)).sum()
            norm = begin["z"].norm()
            length = delta.norm() if step else (delta * 0).sum()  # the norm has no gradient at zero
            loss = fact_loss + kl * divergence + weight_decay * length / norm**2
            progress(step, float(fact_loss.detach()))
            if float(fact_loss.detach()) < stop_loss:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            taken += 1
            with torch.no_grad():
                delta *= min(1.0, float(clamp * norm / delta.norm().clamp(min=1e-30)))
    finally:
        hook.remove()
    return Optimised((begin["z"] + delta).detach(), float(fact_loss.detach()), taken, ids.numel())
