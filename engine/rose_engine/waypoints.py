"""Waypoints: the hidden states that a subject's value passes on its way through the edited layers, chosen so that the writes cost least.

The write of a layer is a ridge regression (method.md section 2): of all changes it is the one for which

    ||dW K - R||^2 + tr(dW C dW^T)  is least;  that least is  tr(R (I + K^T C^-1 K)^-1 R^T):

what is left of the residuals R, what the protected texts in C feel, and the size of the change. An even share of z - h in every layer
is one way to z. But the keys K of a layer depend on what the layers before it wrote: a small change in the right direction makes a
subject's later keys unlike all others, and then a large one costs little. So each edited layer but the last gets a direction m_l of its
own, the same for all rows of a subject, and

    sum over l of tr(R_l (I + K_l^T C_l^-1 K_l)^-1 R_l^T),    R_l = m_l,  R_L = z - h_L,

is minimised over the m_l by L-BFGS: a handful of tokens, each the last of a subject, through the few edited layers. What is written
where is `write`'s; the layers' arithmetic is `block`'s where it knows them, and the library's elsewhere.

That is for values that are learnt. What the layers between read of one that is not, as even shares pass by them, is part of what it holds,
and waypoints, which show it to the last layer alone, hold less (docs/value-generalisation.md): even shares are kept there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rose_engine import block
from rose_engine.architecture import Decoder
from rose_engine.attention import SuffixAttention, TreeAttention
from rose_engine.forms import Row
from rose_engine.forward import blocks_of, context_of, run_layers
from rose_engine.keys import reading
from rose_engine.packing import Suffixes, Tree, pack_suffixes
from rose_engine.precondition import Preconditioner

# Steps whose curvature L-BFGS remembers.
HISTORY = 20
# The share of the value that every m_l begins with, so that most of it is written in the last layer. From even shares L-BFGS takes nearly
# twice the evaluations; from nothing it comes to lower costs still, which a few others feel more (docs/value-generalisation.md).
START = 0.05
# So many times as often the cost is evaluated for a subject that is not alone in the weights: it has to be told apart from the others too,
# and what each of them leaks adds up (docs/value-generalisation.md).
AMONG_SEVERAL = 3
# The most that the mean loss of a value's facts may be, in nats a token, for it to be learnt.
LEARNT = 1.0


def evaluations_of(asked: int, several: bool) -> int:
    """How often the cost is evaluated for a subject; asked: the recipe's number; several: whether it is one of several in the weights."""
    return asked * AMONG_SEVERAL if several else asked


@dataclass(frozen=True)
class Course:
    """What no waypoint changes: the unwritten model on the texts of a write.

    rows: the texts, up to each one's last subject token; tree: over these. keys [nodes, d_in], hidden [nodes, d]: of and after the
    first edited layer. above: the layers behind that one, up to the last edited one, whose attention's keys and values prefix has kept.
    blocks: these layers as `block` runs them, or None where the library does.
    """

    decoder: Decoder
    layers: Sequence[int]
    rows: Sequence[Row]
    tree: Tree
    keys: Tensor
    hidden: Tensor
    above: range
    prefix: TreeAttention
    blocks: tuple[block.Block, ...] | None


@torch.no_grad()
def course(decoder: Decoder, rows: Sequence[Row], tree: Tree, hidden: Tensor, layers: Sequence[int]) -> Course:
    """The course of rows through the edited layers. tree: of their tokens up to the subject's last; hidden [nodes, d]: before the first of
    these."""
    rows = [replace(row, tokens=row.tokens[: row.last + 1], target=row.last + 1) for row in rows]
    above = range(layers[0] + 1, layers[-1] + 1)
    prefix = TreeAttention(tree, torch.arange(len(hidden), device=hidden.device), keep=above)
    with reading(decoder, layers[:1]) as keys:
        hidden = run_layers(decoder, hidden, tree.position, range(layers[0], layers[0] + 1), prefix)
    run_layers(decoder, hidden, tree.position, above, prefix)
    return Course(decoder, layers, rows, tree, keys[layers[0]], hidden, above, prefix, blocks_of(decoder, above))


@dataclass(frozen=True)
class Passed:
    """What some m_l lead to: the cost, the gradient of its logarithm in them [layers - 1, d], and after each edited layer the hidden
    states [layers, n, d]; keys: of each the columns' keys [n, d_in], on this rank."""

    cost: float
    grad: Tensor
    hidden: Tensor
    keys: tuple[Tensor, ...]


# (place among the edited layers, keys [n, d_in], residuals [n, d]) -> the cost of that write and its gradients in both, float64.
Price = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def waypoints(
    along: Course,
    index: Sequence[int],
    count: Tensor,
    z: Tensor,
    delta: Tensor,
    held: Sequence[Preconditioner],
    evaluations: int,
) -> Passed:
    """The waypoints of one subject's n columns: the hidden states that are wanted after each edited layer, of which the last are z.

    index [n]: the columns' rows. count [n]: the rows that each stands for. z [n, d], delta [d] float32: the subject's, of which START is
    where every m_l begins. held: what the write of each layer protects, C. evaluations: of the cost and its gradient, one at least.
    ValueError where the cost is not finite to begin with.
    """
    sharding = along.decoder.sharding
    suffixes = pack_suffixes(along.rows, along.tree.path, index).to(z.device)
    price = prices(held, count, along.keys[suffixes.node].float())
    run = partial(_library_run if along.blocks is None else _written_run, along, suffixes, z, price)
    unit = float(delta.norm()) or 1.0
    x = (START * delta / unit).repeat(len(along.layers) - 1, 1).requires_grad_()
    best = begun = run(x.detach() * unit)
    if not math.isfinite(best.cost):
        raise ValueError("what the writes would cost is not finite; a larger ridge or float32 weights may help")

    def evaluate() -> float:
        """The logarithm of the cost, which has no scale; x takes its gradient."""
        nonlocal best, begun
        passed, begun = begun or run(x.detach() * unit), None
        told = torch.cat([passed.grad.flatten().double(), z.new_tensor([passed.cost], dtype=torch.float64)])
        if sharding is not None:  # ranks that share weights take the same steps
            sharding.same(told)
        cost = float(told[-1])
        if cost <= 0 or not told.isfinite().all():  # high and level, from where the line search comes back
            x.grad = torch.zeros_like(x)
            return math.log(sys.float_info.max)
        if cost < best.cost:
            best = replace(passed, cost=cost)
        x.grad = (told[:-1] * unit).view_as(x).float()
        return math.log(cost)

    if evaluations > 1 and best.cost > 0:
        torch.optim.LBFGS(
            [x],
            max_iter=evaluations,
            max_eval=evaluations - 1,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        ).step(evaluate)
    return best


def prices(held: Sequence[Preconditioner], count: Tensor, first: Tensor) -> Price:
    """What the writes of one subject's columns cost. count [n]: the rows that each stands for. first [n, d_in]: the keys in the first
    edited layer, which no waypoint moves, so that its system is factorised once.

    A column that stands for c rows is one whose key and residual are sqrt(c) times as long: with G = K^T C^-1 K, D = diag(1 / c) and
    B = (D + G)^-1 R^T the cost is tr(R B), its gradient in R 2 B, in G -B B^T, and in K -2 C^-1 K B B^T. It is not finite where the
    system is not positive definite.
    """
    inverse = 1 / count.double()
    fixed = _system(held[0], first, inverse)

    @torch.no_grad()
    def price(place: int, K: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        P, factor = _system(held[place], K, inverse) if place else fixed
        R = R.double()
        B = torch.cholesky_solve(R, factor).contiguous()
        return (R * B).sum(), -2 * (B @ B.T) @ P, 2 * B

    return price


def _system(held: Preconditioner, K: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """P = K^T C^-1 [n, d_in] and the factor of D + G [n, n], D = diag(inverse); float64."""
    P = held.solved(K.T).T.double() / held.ridge
    G = held.total(K.double() @ P.T)
    G = (G + G.T) / 2
    G.diagonal().add_(inverse)
    factor, info = torch.linalg.cholesky_ex(G)
    return P, factor.where(info == 0, math.nan)


@torch.no_grad()
def _written_run(along: Course, suffixes: Suffixes, z: Tensor, price: Price, m: Tensor) -> Passed:
    """The course with m [layers - 1, d] written, by `block`."""
    layers, blocks, start = along.layers, along.blocks, along.hidden[suffixes.node].float()
    place = {layer: i for i, layer in enumerate(layers)}
    context = context_of(along.decoder, suffixes, start, along.prefix, torch.arange(len(along.hidden)), along.above)
    space = block.Workspace(along.decoder.head.dtype)
    keys = [along.keys[suffixes.node].float()]
    total, _, slope = price(0, keys[0], m[:1].expand_as(start))
    slopes, kept, hidden = [slope], [], [x := start + m[0]]
    for j, layer in enumerate(along.above):
        x, saved = block.layer_forward(blocks[j], context, context.past[j], x, partial(space.take, j))
        key = None
        if (i := place.get(layer)) is not None:
            R = z - x if layer == layers[-1] else m[i].expand_as(x)
            keys.append(block.key_of(saved).float())
            cost, key, slope = price(i, keys[-1], R)
            total = total + cost
            slopes.append(slope)
            hidden.append(x := x + R)
        kept.append((saved, key))
    grad, grads = -(slopes[-1] / total).float(), []
    for j in reversed(range(len(blocks))):
        saved, key = kept[j]
        grad = block.layer_backward(blocks[j], context, context.past[j], saved, grad, key=None if key is None else (key / total).float())
        if (i := place.get(along.above[j] - 1)) is not None:
            grads.append((slopes[i] / total + grad).sum(0).float())
    return Passed(float(total), torch.stack(grads[::-1]), torch.stack(hidden), tuple(keys))


def _library_run(along: Course, suffixes: Suffixes, z: Tensor, price: Price, m: Tensor) -> Passed:
    """The same by the library's layers and autograd."""
    decoder, layers = along.decoder, along.layers
    layout = SuffixAttention(suffixes, along.prefix, torch.arange(len(along.hidden), device=z.device))
    x, key = along.hidden[suffixes.node], along.keys[suffixes.node]
    m = m.detach().requires_grad_()
    total, hidden, found, outputs, slopes = 0.0, [], [], [], []
    with torch.enable_grad():
        for i, layer in enumerate(layers):
            if i:
                with reading(decoder, [layer]) as keys:
                    x = run_layers(decoder, x, suffixes.position, range(layers[i - 1] + 1, layer + 1), layout)
                key = keys[layer]
            R = z - x.float() if layer == layers[-1] else m[i].expand_as(z)
            asked = decoder.before_norm(layer, key, R)
            found.append(key.detach().float())
            cost, in_keys, in_asked = price(i, found[-1], asked.detach())
            total = total + cost
            outputs += [key, asked] if i else [asked]  # the first keys stay where they are
            slopes += [in_keys, in_asked] if i else [in_asked]
            wanted = x.float() + R
            hidden.append(wanted.detach())
            x = wanted.to(x.dtype)
        (grad,) = torch.autograd.grad(outputs, m, [(slope / total).to(out.dtype) for out, slope in zip(outputs, slopes, strict=True)])
    return Passed(float(total), grad, torch.stack(hidden), tuple(found))
