"""WISE (Wang et al. 2024): a side memory beside one layer's down projection, and a router that says which of the two answers.

The side memory W' begins as a copy of W. A random part of it is trained by gradient descent, on the targets and on a margin of the
router's activation d(x), the mean over tokens of ||act(W' a(x)) - act(W a(x))||: at least BETA for edits, at most ALPHA for other texts,
GAMMA between them. A text goes through W' where d(x) reaches the least activation of an edit, times RATIO. The authors merge side
memories after every 500 edits; there are fewer here, so there is one. Their unrelated text, one for each fact of their data, is here
text that the model says itself. Plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from rose_engine.sample import sample_prefixes, sample_texts
from torch import Tensor
from transformers.activations import ACT2FN

# The authors' settings for Llama.
LAYER_SHARE = 27 / 32
STEPS = 70
LR = 1.0
MASK = 0.2
ALPHA, BETA, GAMMA = 5.0, 20.0, 10.0
RATIO = 0.88
REACH = 1.0  # W' stays so near to W, element by element
OTHER_TOKENS = 512


class SideMemory:
    """The side memory of a projection, hooked into a model; `training` sends every text through it."""

    def __init__(self, model, projection, seed: int):
        self.weight = projection.weight
        self.side = projection.weight.detach().float().clone().requires_grad_()
        generator = torch.Generator().manual_seed(seed)
        self.mask = (torch.rand(self.side.shape, generator=generator) < MASK).to(self.side.device)
        self.threshold, self.training = float("inf"), False
        self.act = ACT2FN[model.config.hidden_act]
        self.activation: Tensor | None = None
        self._tokens: Tensor | None = None
        self._routed: Tensor | None = None
        self.hooks = [
            model.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            projection.register_forward_hook(self._answer),
        ]

    def _begin(self, module, args, options):
        mask, ids = options.get("attention_mask"), options.get("input_ids")
        mask = torch.ones(ids.shape, device=ids.device) if mask is None else mask
        self._tokens = mask.float() if mask.dim() == 2 and mask.shape == ids.shape else None

    def _answer(self, module, args, out):
        side = F.linear(args[0].float(), self.side)
        if self._tokens is not None:  # a whole text; what is generated after it goes its way
            far = (self.act(side) - self.act(out.float())).norm(dim=-1)
            self.activation = (far * self._tokens).sum(1) / self._tokens.sum(1)
            self._routed = torch.ones_like(self.activation, dtype=torch.bool) if self.training else self.activation >= self.threshold
        return torch.where(self._routed[:, None, None], side.to(out.dtype), out)

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()


def padded(rows: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    """(ids, mask) [rows, longest], padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def violated(terms: Tensor) -> Tensor:
    """The mean of the terms that are positive, 0 where there is none."""
    positive = terms.clamp(min=0)
    return positive.sum() / (positive > 0).sum().clamp(min=1)


def learn(model, tokenizer, facts: Sequence, memory: SideMemory, prefixes: Sequence[str], others: Sequence[Sequence[int]]) -> None:
    """Train the side memory on a batch of facts."""
    rows, lengths = [], []
    for fact in facts:
        for prefix in prefixes:
            context = tokenizer(prefix + fact.prompt.replace("{}", fact.subject).rstrip())["input_ids"]
            target = tokenizer(f" {fact.target.strip()}", add_special_tokens=False)["input_ids"]
            rows.append(context + target)
            lengths.append(len(context))
    ids, mask = padded(rows, model.device)
    quiet = padded(others, model.device)
    labels = ids.masked_fill(mask == 0, -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = -100
    original = memory.weight.detach().float()
    memory.training = True
    for _ in range(STEPS):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        on = memory.activation
        model.model(input_ids=quiet[0], attention_mask=quiet[1])
        off = memory.activation
        fact_loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        margin = violated(off - ALPHA) + violated(BETA - on) + violated(GAMMA - (on[:, None] - off[None, :]))
        (grad,) = torch.autograd.grad(fact_loss + margin, memory.side)
        with torch.no_grad():
            memory.side -= LR * grad * memory.mask
            memory.side.copy_(torch.minimum(torch.maximum(memory.side, original - REACH), original + REACH))
    with torch.no_grad():
        bare = slice(None, None, len(prefixes))
        model.model(input_ids=ids[bare], attention_mask=mask[bare])
    memory.threshold = min(memory.threshold, RATIO * float(memory.activation.min()))
    memory.training = False


@contextmanager
def edited(editor, batches: Sequence[Sequence], seed: int) -> Iterator[None]:
    """Within the block the model answers with the side memory of all facts, learnt batch after batch."""
    model, tokenizer = editor.model, editor.tokenizer
    projection = model.model.layers[int(LAYER_SHARE * len(model.model.layers))].mlp.down_proj
    prefixes = ("", *sample_prefixes(model, tokenizer, seed))
    others = sample_texts(model, tokenizer, OTHER_TOKENS, seed)
    memory = SideMemory(model, projection, seed)
    try:
        for batch in batches:
            learn(model, tokenizer, batch, memory, prefixes, others)
        yield
    finally:
        memory.remove()
