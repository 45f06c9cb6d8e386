"""GRACE (Hartvigsen et al. 2023): a codebook beside one layer, keys with radii and values trained in their place, in plain PyTorch.

The input of a late down projection is the query. Where it lies within the radius of its nearest key, the projection's output is
the key's value. A fact's key is the query at the last token of its prompt; its value is trained until the target follows. A key that
would overlap one of another target halves the distance between the two; one of the same target widens the old radius.
Where this departs from the authors' program: every token is a query of its own (there the prompt's last token is, by its place in the
batch), so that teacher forcing, padding and generation see the same; a value begins as what the layer said, not at random; training
ends early at a loss of 0.01.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The authors' settings for Llama: layer 27 of 32, radius 1, 50 steps of Adam with rate 1.
LAYER_SHARE = 27 / 32
RADIUS = 1.0
STEPS = 50
LR = 1.0


@dataclass
class Codebook:
    """keys [n, d_in], values [n, d_out], radius [n], target [n] texts. All float32."""

    keys: Tensor
    values: Tensor
    radius: Tensor
    target: list[str]

    def add(self, key: Tensor, value: Tensor, target: str) -> None:
        """Put in a key, or widen that of the same target which is near, or share the room with one of another."""
        radius = RADIUS
        if len(self.keys):
            distance = (self.keys - key).norm(dim=-1)
            near = int(distance.argmin())
            if distance[near] <= self.radius[near] + RADIUS:
                if self.target[near] == target:
                    self.radius[near] = torch.maximum(self.radius[near], distance[near])
                    return
                radius = float(distance[near]) / 2 - 1e-5
                self.radius[near] = torch.minimum(self.radius[near], torch.tensor(radius))
        self.keys, self.values = torch.cat([self.keys, key[None]]), torch.cat([self.values, value[None]])
        self.radius = torch.cat([self.radius, self.radius.new_tensor([max(radius, 0.0)])])
        self.target.append(target)

    def looked_up(self, query: Tensor, out: Tensor) -> Tensor:
        """query [..., d_in] and the layer's own out [..., d_out]: out, or the value of the key that holds the query."""
        if not len(self.keys):
            return out
        distance, near = torch.cdist(query.float().reshape(1, -1, query.shape[-1]), self.keys[None])[0].min(-1)
        inside = (distance <= self.radius[near]).reshape(out.shape[:-1])
        return torch.where(inside[..., None], self.values[near].reshape(out.shape).to(out.dtype), out)


def learn(model, tokenizer, fact, projection, codebook: Codebook) -> None:
    """Train the value of one fact and put it in the codebook."""
    prompt = fact.prompt.replace("{}", fact.subject).rstrip()
    context = tokenizer(prompt)["input_ids"]
    target = tokenizer(f" {fact.target.strip()}", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([context + target], device=model.device)
    at = len(context) - 1
    seen: dict[str, Tensor] = {}
    value = torch.zeros(projection.weight.shape[0], device=model.device, requires_grad=True)

    def replaced(module, args, out):
        seen.setdefault("key", args[0][0, at].detach().float().clone())
        if "begun" not in seen:  # warm start: what the layer said
            seen["begun"] = out[0, at]
            value.data.copy_(out[0, at].float())
        return torch.cat([out[:, :at], value.to(out.dtype)[None, None], out[:, at + 1 :]], 1)

    hook = projection.register_forward_hook(replaced)
    adam = torch.optim.Adam([value], lr=LR)
    try:
        for _ in range(STEPS):
            logits = model(input_ids=ids).logits[0, at:-1].float()
            loss = F.cross_entropy(logits, ids[0, at + 1 :])
            if float(loss.detach()) < 1e-2:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
    finally:
        hook.remove()
    codebook.add(seen["key"], value.detach(), fact.target.strip())


@contextmanager
def edited(editor, batches: Sequence[Sequence], seed: int) -> Iterator[None]:
    """Within the block the model answers with the codebook of all facts, learnt one after the other."""
    model = editor.model
    projection = model.model.layers[int(LAYER_SHARE * len(model.model.layers))].mlp.down_proj
    d_out, d_in = projection.weight.shape
    empty = torch.zeros(0, device=model.device)
    codebook = Codebook(empty.reshape(0, d_in), empty.reshape(0, d_out), empty, [])
    # While a fact is learnt the earlier ones are there.
    hook = projection.register_forward_hook(lambda module, args, out: codebook.looked_up(args[0], out))
    try:
        for batch in batches:
            for fact in batch:
                learn(model, editor.tokenizer, fact, projection, codebook)
        yield
    finally:
        hook.remove()
