"""Run part of a model: the prefix tree once, then only suffixes above the last edited layer L.

`prepare` computes, for a set of rows, the hidden states after layer L and the keys and values that suffixes need of their
prefixes above L. `suffix_step` is a step: inject, layers L + 1 and up, loss at the targets alone. Weights never take a gradient.
Where a layer stands and what it is called is `architecture`'s; which tokens are run is `packing`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.attention import SuffixAttention, TreeAttention, attention_of
from rose_engine.forms import Row
from rose_engine.packing import Suffixes, Tree, build_tree, inputs, pack_suffixes
from rose_kernels import inject, row_gradients, target_nll
from rose_kernels.reference import wide


def run_layers(decoder: Decoder, hidden: Tensor, position: Tensor, layers: range, attention: TreeAttention | SuffixAttention) -> Tensor:
    """Apply decoder layers to packed tokens: hidden [N, d], position [N]; returns [N, d]."""
    if not layers or not len(hidden):
        return hidden
    hidden, position = hidden[None], position[None]
    rotary = decoder.rotary(hidden, position)
    with attention_of(decoder.model):
        for layer in layers:
            hidden = decoder.layers[layer](hidden, position_ids=position, position_embeddings=rotary, rose=attention)
    return hidden[0]


@dataclass(frozen=True)
class Batch:
    """Packed suffixes ready to step.

    hidden [N, d]: the unedited hidden states after layer L. layers: those above L. neutral [K]: the rows (0 .. B - 1) that have no
    target; on them the regulariser compares with reference [K, V], the unedited model's log-probabilities.
    """

    suffixes: Suffixes
    hidden: Tensor
    attention: SuffixAttention
    layers: range
    neutral: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Prepared:
    """What stays fixed while values are optimised.

    tree: over all rows' inputs. hidden [nodes, d]: after layer L. last [rows]: the node of each row's last subject token.
    batches: the rows' suffixes, in the given split.
    """

    tree: Tree
    hidden: Tensor
    last: Tensor
    batches: tuple[Batch, ...]


def tree_on(rows: Sequence[Sequence[int]], device: torch.device) -> Tree:
    """The prefix tree of token sequences, on a device."""
    tree = build_tree(rows)
    return Tree(tree.token.to(device), tree.position.to(device), tree.end.to(device), tree.path)


def run_tree(decoder: Decoder, tree: Tree, layers: range) -> Tensor:
    """Hidden states [nodes, d] of every node of the tree after the first `len(layers)` layers, which `layers` lists."""
    every = torch.arange(len(tree.token), device=tree.token.device)
    return run_layers(decoder, decoder.embedding(tree.token), tree.position, layers, TreeAttention(tree, every))


@torch.no_grad()
def prepare(decoder: Decoder, rows: Sequence[Row], layer: int, split: Sequence[Sequence[int]]) -> Prepared:
    """Run the rows' prefix tree through layers 0 .. layer, and what stands before the subjects through the layers above.

    split: the rows of each batch of suffixes. Everything returned lives on the model's device.
    """
    device = decoder.embedding.weight.device
    tree = tree_on([inputs(row) for row in rows], device)
    hidden = run_tree(decoder, tree, range(layer + 1))

    # Above L: every prefix, and the last token of rows without a target, whose unedited prediction is the regulariser's.
    above = range(layer + 1, len(decoder.layers))
    paths = tree.path
    needed = {0}
    for row, path in zip(rows, paths, strict=True):
        needed.update(path[: row.last + (row.target == len(row.tokens))])
    nodes = torch.tensor(sorted(needed), device=device)
    place = torch.zeros(len(tree.token), dtype=torch.long, device=device)
    place[nodes] = torch.arange(len(nodes), device=device)
    prefix = TreeAttention(tree, nodes, keep=above)
    top = run_layers(decoder, hidden[nodes], tree.position[nodes], above, prefix)

    last = torch.tensor([path[row.last] for row, path in zip(rows, paths, strict=True)], device=device)
    batches = []
    for index in split:
        suffixes = pack_suffixes(rows, paths, index).to(device)
        neutral = torch.tensor([b for b, r in enumerate(index) if rows[r].target == len(rows[r].tokens)], dtype=torch.long, device=device)
        reference = logits(decoder, top[place[last[suffixes.row[neutral]]]]).log_softmax(-1)
        attention = SuffixAttention(suffixes, prefix, place)
        batches.append(Batch(suffixes, hidden[suffixes.node], attention, above, neutral, reference))
    return Prepared(tree, hidden, last, tuple(batches))


def logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Logits [T, V] of top-layer hidden states [T, d], float32 (float64 for a float64 model)."""
    return wide(F.linear(decoder.norm(hidden), decoder.head))


def _run_suffixes(decoder: Decoder, batch: Batch, hidden: Tensor) -> Tensor:
    return run_layers(decoder, hidden, batch.suffixes.position, batch.layers, batch.attention)


@dataclass(frozen=True)
class Step:
    """Of one batch: nll [T] of every target token, loss [B] of every row (mean over its targets; KL for a neutral row), and
    grad [B, d] float32, the gradient of each row's loss in its subject's delta."""

    nll: Tensor
    loss: Tensor
    grad: Tensor


def suffix_step(decoder: Decoder, batch: Batch, delta: Tensor, subject: Tensor) -> Step:
    """Forward and backward of one batch with delta [S, d] injected for subject [B] at each row's subject token.

    loss_row = mean over the row's targets of -log P(target), or KL(P_0 || P_delta) on a neutral row    (method.md section 1)
    """
    s = batch.suffixes
    hidden = inject(batch.hidden, delta, s.start, subject).requires_grad_()
    with torch.enable_grad():
        top = _run_suffixes(decoder, batch, hidden)
        nll = target_nll(decoder.norm(top[s.predict]), decoder.head, s.target)
        count = torch.bincount(s.target_row, minlength=len(s.row)).clamp(min=1)
        loss = nll.new_zeros(len(s.row)).index_add(0, s.target_row, nll) / count
        if len(batch.neutral):
            prediction = logits(decoder, top[s.start[batch.neutral]]).log_softmax(-1)
            kl = (batch.reference.exp() * (batch.reference - prediction)).sum(-1)
            loss = loss.index_add(0, batch.neutral, kl)
        (grad,) = torch.autograd.grad(loss.sum(), hidden)
    return Step(nll.detach(), loss.detach(), row_gradients(grad.contiguous(), s.start))
