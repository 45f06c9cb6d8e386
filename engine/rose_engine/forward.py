"""Run part of a model: the prefix tree once, then only suffixes above the last edited layer L.

`prepare` computes, for a set of rows, the hidden states after layer L and the keys and values that suffixes need of their
prefixes above L; `pack` lays out some of the rows for stepping. `suffix_step` is a step: inject, layers L + 1 and up, loss at the
targets alone, and its gradient; `suffix_nll` is the loss alone, `answer_gradients` the gradient of an answer in every token of a suffix
and every layer. Weights never take a gradient. Layers that `block` knows are run by it, all others by the library.
Where a layer stands and what it is called is `architecture`'s; which tokens are run is `packing`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rose_engine import block
from rose_engine.architecture import Decoder, Rotary
from rose_engine.attention import SuffixAttention, TreeAttention, VarlenAttention, attention_of
from rose_engine.forms import Row
from rose_engine.packing import Suffixes, Tree, build_tree, inputs, pack_suffixes
from rose_engine.sharding import scores
from rose_kernels import inject, row_gradients, target_nll
from rose_kernels.layer import DTYPES, WIDTH, Layout, products_, rms_norm, rms_norm_backward_
from rose_kernels.reference import capped, wide

# Rows of the vocabulary's width that exist at one time where the output layer is written out (`_read_out`).
OUTPUT_ROWS = 64


def run_layers(
    decoder: Decoder,
    hidden: Tensor,
    position: Tensor,
    layers: range,
    attention: TreeAttention | SuffixAttention | VarlenAttention,
    rotary: Rotary | None = None,
) -> Tensor:
    """Apply decoder layers to packed tokens: hidden [N, d], position [N]; returns [N, d]. rotary: `Decoder.rotations` of these tokens, from
    a caller that has them.

    Layers in float32 that `block` knows are run by it, unless a gradient is asked for. In narrower dtypes the library's run: it rounds the
    residual stream, as the edited model will.
    """
    if not layers or not len(hidden):
        return hidden
    hidden, position = hidden[None], position[None]
    rotary = rotary or decoder.rotations(hidden, position)
    with attention_of(decoder.model):
        for layer in layers:
            written = block.block_of(decoder.layers[layer]) if hidden.dtype == torch.float32 and not torch.is_grad_enabled() else None
            if written is None:
                hidden = decoder.layers[layer](hidden, attention_mask=attention, position_ids=position, position_embeddings=rotary(layer))
            else:
                cosine, sine = (table[0].contiguous() for table in rotary(layer))
                hidden = block.run(written, hidden[0], cosine, sine, partial(_attend, attention, layer, written.attention.scaling))[None]
    return hidden[0]


def _attend(attention: TreeAttention | SuffixAttention, layer: int, scaling: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attention(layer, q, k, v, scaling, None)[0].flatten(1)


def tree_on(rows: Sequence[Sequence[int]], device: torch.device) -> Tree:
    """The prefix tree of token sequences, on a device."""
    tree = build_tree(rows)
    return Tree(tree.token.to(device), tree.position.to(device), tree.end.to(device), tree.path)


def whole_tree(tree: Tree) -> TreeAttention:
    """Attention of every node of the tree."""
    return TreeAttention(tree, torch.arange(len(tree.token), device=tree.token.device))


def run_tree(decoder: Decoder, tree: Tree, layers: range, attention: TreeAttention | None = None) -> Tensor:
    """Hidden states [nodes, d] of every node of the tree after the first `len(layers)` layers, which `layers` lists. attention: that of
    `whole_tree`, for a caller that goes on with it."""
    hidden = decoder.embed(tree.token, tree.position)
    return run_layers(decoder, hidden, tree.position, layers, attention or whole_tree(tree))


@dataclass(frozen=True)
class Prepared:
    """What stays fixed while values are optimised.

    tree: over all rows' inputs. hidden [nodes, d]: after layer L. last [rows]: the node of each row's last subject token. layers: those
    above L. prefix: their keys and values of the nodes that come before suffixes; place [nodes]: where a node stands in it.
    reference [K, V]: the unedited log-probabilities of the rows without a target, which neutral maps to 0 .. K - 1. blocks: the
    layers above L as `block` runs them, or None where the library does.
    """

    decoder: Decoder
    rows: Sequence[Row]
    tree: Tree
    hidden: Tensor
    last: Tensor
    layers: range
    prefix: TreeAttention
    place: Tensor
    neutral: dict[int, int]
    reference: Tensor
    blocks: tuple[block.Block, ...] | None
    space: block.Workspace


@torch.no_grad()
def prepare(decoder: Decoder, rows: Sequence[Row], layer: int) -> Prepared:
    """Run the rows' prefix tree through layers 0 .. layer, and what stands before the subjects through the layers above.

    Everything returned lives on the model's device.
    """
    device = decoder.embedding.weight.device
    tree = tree_on([inputs(row) for row in rows], device)
    hidden = run_tree(decoder, tree, range(layer + 1))

    # Above L: every prefix, and the last token of rows without a target, whose unedited prediction is the regulariser's.
    above = range(layer + 1, len(decoder.layers))
    needed = {0}
    for row, path in zip(rows, tree.path, strict=True):
        needed.update(path[: row.last + (row.target == len(row.tokens))])
    nodes = torch.tensor(sorted(needed), device=device)
    place = torch.zeros(len(tree.token), dtype=torch.long, device=device)
    place[nodes] = torch.arange(len(nodes), device=device)
    prefix = TreeAttention(tree, nodes, keep=above)
    top = run_layers(decoder, hidden[nodes], tree.position[nodes], above, prefix)

    last = torch.tensor([path[row.last] for row, path in zip(rows, tree.path, strict=True)], device=device)
    neutral = [r for r, row in enumerate(rows) if row.target == len(row.tokens)]
    reference = logits(decoder, top[place[last[neutral]]]).log_softmax(-1)
    return Prepared(
        decoder,
        rows,
        tree,
        hidden,
        last,
        above,
        prefix,
        place,
        {r: k for k, r in enumerate(neutral)},
        reference,
        blocks_of(decoder, above),
        block.Workspace(decoder.head.dtype),
    )


def blocks_of(decoder: Decoder, layers: range) -> tuple[block.Block, ...] | None:
    """The layers as `block` runs them, or None where one of them, the final norm or the output matrix is not of its kind."""
    blocks = [block.block_of(decoder.layers[layer]) for layer in layers]
    written = blocks and all(blocks) and block.is_norm(decoder.norm) and _plain(decoder.head)
    written = written and len({b.mlp.down_proj.weight.dtype for b in blocks} | {decoder.head.dtype}) == 1
    if decoder.sharding is not None:  # a rank that finds a hook of its own, or no csrc, would add up other tensors than the others
        written = not decoder.sharding.total(torch.tensor([float(not written)], device=decoder.head.device)).any()
    return tuple(blocks) if written else None


def _plain(weight: Tensor) -> bool:
    whole = not isinstance(weight, DTensor) and weight.is_contiguous()
    return whole and weight.dtype in DTYPES and not any(n % WIDTH for n in weight.shape)


@dataclass(frozen=True)
class Batch:
    """Packed suffixes ready to step, out of what was prepared.

    hidden [N, d]: the unedited hidden states after layer L. neutral [K]: the rows (0 .. B - 1) that have no target; on them the
    regulariser compares with reference [K, V], the unedited model's log-probabilities. layout: SuffixAttention for the library's
    layers, or what `block` needs to know of the suffixes.
    """

    prepared: Prepared
    suffixes: Suffixes
    hidden: Tensor
    neutral: Tensor
    reference: Tensor
    layout: SuffixAttention | block.Context


@torch.no_grad()
def pack(prepared: Prepared, index: Sequence[int]) -> Batch:
    """The suffixes of the rows `index`, packed."""
    p, decoder = prepared, prepared.decoder
    suffixes = pack_suffixes(p.rows, p.tree.path, index).to(p.hidden.device)
    neutral = [b for b, r in enumerate(index) if r in p.neutral]
    reference = p.reference[[p.neutral[index[b]] for b in neutral]]
    hidden = p.hidden[suffixes.node]
    if p.blocks is None:
        layout = SuffixAttention(suffixes, p.prefix, p.place)
    else:
        hidden = hidden.float()
        layout = context_of(decoder, suffixes, hidden, p.prefix, p.place, p.layers)
    return Batch(p, suffixes, hidden, torch.tensor(neutral, dtype=torch.long, device=hidden.device), reference, layout)


def context_of(decoder: Decoder, suffixes: Suffixes, hidden: Tensor, prefix: TreeAttention, place: Tensor, layers: range) -> block.Context:
    """What `block` needs to know of suffixes of N tokens with hidden states [N, d]; place [nodes]: where a node stands in `prefix`."""
    cosine, sine = (table[0].contiguous() for table in decoder.rotary(hidden[None], suffixes.position[None]))
    places = Layout(suffixes.start, suffixes.length, place[suffixes.prefix], suffixes.prefix_length)
    past = [(prefix.keys[layer], prefix.values[layer]) for layer in layers]
    places.check(len(hidden), len(past[0][0]))
    return block.Context(cosine, sine, places, past)


def logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Logits [T, V] of top-layer hidden states [T, d], float32 (float64 for a float64 model)."""
    return capped(wide(scores(decoder.norm(hidden), decoder.head)), decoder.softcap)


def target_nll_of(decoder: Decoder, hidden: Tensor, target: Tensor) -> Tensor:
    """-log P [T] of targets [T] after top-layer hidden states [T, d]."""
    if isinstance(decoder.head, DTensor):
        return -logits(decoder, hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    return target_nll(decoder.norm(hidden), decoder.head, target, decoder.softcap)


@dataclass(frozen=True)
class Step:
    """Of one batch: nll [T] of every target token, loss [B] of every row (mean over its targets; KL for a neutral row), and
    grad [B, d] float32, the gradient of each row's loss in its subject's delta."""

    nll: Tensor
    loss: Tensor
    grad: Tensor


def suffix_step(batch: Batch, delta: Tensor, subject: Tensor) -> Step:
    """Forward and backward of one batch with delta [S, d] injected for subject [B] at each row's subject token.

    loss_row = mean over the row's targets of -log P(target), or KL(P_0 || P_delta) on a neutral row    (method.md section 1)
    """
    s, p = batch.suffixes, batch.prepared
    count = s.targets.clamp(min=1)
    weight = (1 / count.to(batch.reference.dtype))[s.target_row]
    hidden = inject(batch.hidden, delta, s.start, subject)
    if p.blocks is None:
        reads = Reads(s.predict, s.target, weight, s.start[batch.neutral], batch.reference)
        nll, kl, grad = library_step(p.decoder, hidden, s.position, p.layers, batch.layout, reads)
        grad = row_gradients(grad, s.start)
    else:
        nll, kl, grad = _written_step(batch, hidden, weight)
    loss = nll.new_zeros(len(s.row)).index_add(0, s.target_row, nll) / count
    return Step(nll, loss.index_add(0, batch.neutral, kl), grad)


@torch.no_grad()
def suffix_nll(batch: Batch, delta: Tensor, subject: Tensor) -> Tensor:
    """-log P [T] of every target token with delta [S, d] injected for subject [B] at each row's subject token: a step's forward pass."""
    s, p = batch.suffixes, batch.prepared
    hidden = inject(batch.hidden, delta, s.start, subject)
    if p.blocks is None:
        return target_nll_of(p.decoder, run_layers(p.decoder, hidden, s.position, p.layers, batch.layout)[s.predict], s.target)
    top, _ = block.forward(p.blocks, batch.layout, hidden, s.predict, p.space)
    top = rms_norm(top, *block.norm_of(p.decoder.norm))
    return target_nll(top, p.decoder.head, s.target, p.decoder.softcap)


@dataclass(frozen=True)
class Reads:
    """Where a step reads the top of the model: predict [T], target [T], weight [T]: the tokens that predict a target, the target, and its
    share in the loss. neutral [K], reference [K, V]: the tokens and the unedited log-probabilities of the regulariser. share [K]: theirs
    in the loss; None: 1."""

    predict: Tensor
    target: Tensor
    weight: Tensor
    neutral: Tensor
    reference: Tensor
    share: Tensor | None = None


def library_step(
    decoder: Decoder,
    hidden: Tensor,
    position: Tensor,
    layers: range,
    attention: SuffixAttention | VarlenAttention,
    reads: Reads,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """nll [T], KL [K] and the gradient [N, d] of sum weight nll + sum share KL in `hidden`, by the library's layers and autograd."""
    hidden.requires_grad_()
    with torch.enable_grad():
        top = run_layers(decoder, hidden, position, layers, attention, rotary)
        nll = target_nll_of(decoder, top[reads.predict], reads.target)
        loss, kl = (reads.weight * nll).sum(), nll.new_zeros(0)
        if len(reads.neutral):
            prediction = logits(decoder, top[reads.neutral]).log_softmax(-1)
            kl = (reads.reference.exp() * (reads.reference - prediction)).sum(-1)
            kl = kl if reads.share is None else reads.share * kl
            loss = loss + kl.sum()
        (grad,) = torch.autograd.grad(loss, hidden)
    return nll.detach(), kl.detach(), grad.contiguous()


@torch.no_grad()
def _written_step(batch: Batch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll [T], KL [K] and row gradients [B, d] by `block`."""
    s, p = batch.suffixes, batch.prepared
    outputs = torch.cat([s.predict, s.start[batch.neutral]])
    top, kept = block.forward(p.blocks, batch.layout, hidden, outputs, p.space)
    nll, kl, grad = _read_out(p.decoder, top, s.target, weight, batch.reference, p.space)
    return nll, kl, block.backward(p.blocks, batch.layout, kept, grad, s.start)


def answer_gradients(batch: Batch, generator: torch.Generator) -> Iterator[Tensor]:
    """The gradient [N, d] float32 of the sum of -log P(y) in every token of the suffixes, y drawn from what the model answers where a row's
    target stands: in the hidden states before the last layer, then before the one below it, down to those after layer L.

    generator: the host's. A gradient serves until the next is asked for.
    """
    return (_library_gradients if batch.prepared.blocks is None else _written_gradients)(batch, generator)


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token [T] of each distribution [T, V]."""
    return torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


def _answers(decoder: Decoder, logits: Tensor, generator: torch.Generator) -> Tensor:
    """What is drawn; ranks that share weights take one rank's, for their logits may differ in the last bit."""
    answers = drawn(logits, generator)
    return answers if decoder.sharding is None else decoder.sharding.same(answers)


def _library_gradients(batch: Batch, generator: torch.Generator) -> Iterator[Tensor]:
    s, decoder, layers = batch.suffixes, batch.prepared.decoder, batch.prepared.layers
    before = [batch.hidden.detach().requires_grad_()]
    with torch.enable_grad():
        for layer in layers:
            before.append(run_layers(decoder, before[-1], s.position, range(layer, layer + 1), batch.layout))
        top = before.pop()[s.predict]
        nll = target_nll_of(decoder, top, _answers(decoder, logits(decoder, top), generator))
        grads = torch.autograd.grad(nll.sum(), before)
    yield from (grad.float() for grad in reversed(grads))


@torch.no_grad()
def _written_gradients(batch: Batch, generator: torch.Generator) -> Iterator[Tensor]:
    p, predict = batch.prepared, batch.suffixes.predict
    top, kept = block.forward(p.blocks, batch.layout, batch.hidden, predict, p.space)
    scores = top.new_empty(len(top), len(p.decoder.head))
    products_(rms_norm(top, *block.norm_of(p.decoder.norm)), [p.decoder.head], [scores], turned=True)
    _, _, grad = _read_out(p.decoder, top, _answers(p.decoder, scores, generator), torch.ones(len(top)), batch.reference, p.space)
    yield from block.gradients(p.blocks, batch.layout, kept, grad)


def _read_out(
    decoder: Decoder, top: Tensor, target: Tensor, weight: Tensor, reference: Tensor, space: block.Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and their gradient at the top in one pass over the output matrix.

    top [T + K, d]: the hidden states that predict the targets, then those of the neutral rows. Returns nll [T], KL [K], and the gradient
    [T + K, d] of weight . nll + sum KL, all float32.
    """
    norm, T = block.norm_of(decoder.norm), len(target)
    hidden = rms_norm(top, *norm)
    loss, slope = top.new_empty(len(top)), torch.empty_like(top)
    for first in range(0, len(top), OUTPUT_ROWS):
        end = min(first + OUTPUT_ROWS, len(top))
        split = max(first, min(end, T))  # targets before it, neutral rows from it on
        here, there = torch.arange(split - first), reference[split - T : end - T]
        scores = space.take(-1, "scores", end - first, len(decoder.head), torch.float32)
        products_(hidden[first:end], [decoder.head], [scores], turned=True)
        scores -= scores.amax(-1, keepdim=True)
        chosen, neutral = scores[here, target[first:split]], scores[split - first :].clone()
        total = scores.exp_().sum(-1, keepdim=True)
        loss[first:split] = total[: split - first, 0].log() - chosen
        loss[split:end] = (there.exp() * (there - neutral + total[split - first :].log())).sum(-1)
        scores /= total
        scores[here, target[first:split]] -= 1
        scores[: split - first] *= weight[first:split, None]
        scores[split - first :] -= there.exp()
        products_(scores, [decoder.head], [slope[first:end]], turned=False)
    return loss[:T], loss[T:], rms_norm_backward_(torch.zeros_like(top), slope, top, *norm)
