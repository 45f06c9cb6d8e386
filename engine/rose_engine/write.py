"""The weights: spread each value's residual over the edited layers and write it, layer by layer (IGA, method.md section 2).

At layer l the columns are the rows' keys k_i (input of the edited projection at the subject's last token) and residuals, read from the
model as the layers before l left it: what is missing after l of the waypoint there (`waypoints`), or an even share of what is missing of z
after L, (z_i - h_i) / (edited layers from l to L). Rows whose texts agree up to the subject's
last token have one key and one residual; they are one column weighted by the square root of their number, which is the
same update with a smaller system. The keys of earlier edits and of bystanders, texts that the edit must not touch, enter the
preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.branch import Branch
from rose_engine.forms import Row
from rose_engine.forward import run_layers, run_tree, tree_on, whole_tree
from rose_engine.keys import every_key, reading
from rose_engine.precondition import Preconditioner
from rose_engine.recipe import Recipe
from rose_engine.waypoints import LEARNT, Course, course, evaluations_of, waypoints
from rose_kernels import add_low_rank_, forget_refused, raise_refused, rank_gram, rank_solve, rank_update_
from rose_kernels.rank_update import check_finite

# U [d_out, n] and V [n, d_in], float32; the weight changed by U V.
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Written:
    """Of each weight by its name the factors (U, V) and the keys K [d_in, m] float32; columns [m]: the subject of each key."""

    factors: dict[str, Factors]
    keys: dict[str, Tensor]
    columns: list[int]


@contextmanager
def all_or_nothing(weights: Iterable[Tensor | Branch]) -> Iterator[None]:
    """On any exception in the block the weights get back the bits that they had when it began."""
    kept = [(weight, weight.clone()) for weight in weights]
    try:
        yield
    except BaseException:
        for weight, before in kept:
            weight.copy_(before)
        raise


@torch.no_grad()
def write_layers(
    decoder: Decoder,
    rows: Sequence[Row],
    subject: Sequence[int],
    wanted: Tensor,
    delta: Tensor,
    loss: Sequence[float],
    recipe: Recipe,
    preconditioner: Callable[[str], Preconditioner],
    bystanders: Sequence[Row] = (),
) -> Written:
    """Write the subjects' values into the edited layers, in place.

    rows: the facts' rows; subject [rows]: the subject of each. wanted [rows, d] float32: the unedited hidden state after layer L at
    each row's subject token, to which delta [S, d] of its subject is added: z_i. loss [S]: the subjects' mean losses at the last step, in
    nats a token; values of at most `LEARNT` are written by waypoints where the recipe has any, the others in even shares. For waypoints
    beside others, of this write or of an earlier one that the preconditioner protects, costs are evaluated more often (`evaluations_of`).
    preconditioner(name): that of a weight, with what earlier edits protect. bystanders: rows of which every token's key is protected too.
    ValueError where a system cannot be solved; run it within `all_or_nothing`, for earlier layers are written by then.
    """
    forget_refused()
    device = wanted.device
    tree = tree_on([row.tokens[: row.last + 1] for row in rows], device)
    columns = _columns(tree.path, subject)
    on = lambda x: torch.tensor(x, device=device)  # noqa: E731
    node, owner = on([node for node, _ in columns]), on([owner for _, owner in columns])
    z = wanted[on([rows[0] for rows in columns.values()])] + delta[owner]
    count = on([float(len(rows)) for rows in columns.values()])

    layers, last = recipe.layers, recipe.last_layer
    near = every_key(decoder, bystanders, layers)  # each before its layer is written
    before = [preconditioner(decoder.weight_name(layer)) for layer in layers]
    held = (_beside(one, next(near, None)) for one in before)
    attention = whole_tree(tree)
    hidden = run_tree(decoder, tree, range(layers[0]), attention)
    planned = [s for s, one in enumerate(loss) if one <= LEARNT] if recipe.waypoints and len(layers) > 1 else []
    aims, even = z.expand(len(layers), *z.shape), on([s not in planned for _, s in columns])
    if planned:
        held = list(held)
        along = course(decoder, rows, tree, hidden, layers)
        several = len(delta) > 1 or any(one.keys.shape[1] for one in before)
        evaluations = evaluations_of(recipe.waypoints, several)
        aims = _aims(along, planned, list(columns.values()), owner, count, z, delta, held, evaluations)
    written = Written({}, {}, list(range(len(delta))) if recipe.columns == "mean" else owner.tolist())
    for i, (layer, protected) in enumerate(zip(layers, held, strict=True)):
        with reading(decoder, [layer]) as keys:
            reached = run_layers(decoder, hidden, tree.position, range(layer, layer + 1), attention)
        K = keys[layer][node].float().T
        R = aims[i] - reached[node].float()
        if len(planned) < len(delta):  # even shares, of what is missing after the last layer
            reached = run_layers(decoder, reached, tree.position, range(layer + 1, last + 1), attention)
            R = torch.where(even[:, None], (z - reached[node].float()) / (len(layers) - i), R)
        R = decoder.before_norm(layer, keys[layer][node], R).T
        P, root = protected.apply(K), count.sqrt()
        alone = P is K
        K, R, P = K * root, R * root, P * root
        if recipe.columns == "mean":
            K, R, P = _mean_columns(K, R, P, root, owner)
        name = decoder.weight_name(layer)
        written.factors[name], written.keys[name] = _update(decoder, layer, K, R, None if alone else P, recipe.ridge)
        if layer != last:
            hidden = run_layers(decoder, hidden, tree.position, range(layer, layers[i + 1]), attention)
    raise_refused()
    return written


def _beside(held: Preconditioner, near: Tensor | None) -> Preconditioner:
    return held if near is None else held.beside(near)


def _aims(
    along: Course,
    subjects: Sequence[int],
    columns: Sequence[Sequence[int]],
    owner: Tensor,
    count: Tensor,
    z: Tensor,
    delta: Tensor,
    held: Sequence[Preconditioner],
    evaluations: int,
) -> Tensor:
    """The waypoints of some subjects' columns [layers, n, d], zeros elsewhere, subject after subject; what the next is told apart from has
    the keys of those before, though not what those write at its own, which the write itself takes into account."""
    if z.device.type == "cpu":  # where what is protected is what takes longest to read
        held = [one.often() for one in held]
    aims = z.new_zeros(len(held), *z.shape)
    for s in subjects:
        mine = (owner == s).nonzero()[:, 0]
        index = [columns[c][0] for c in mine.tolist()]
        found = waypoints(along, index, count[mine], z[mine], delta[s], held, evaluations)
        aims[:, mine] = found.hidden
        if s != subjects[-1]:
            held = [one.joined(keys.T * count[mine].sqrt()) for one, keys in zip(held, found.keys, strict=True)]
    return aims


def _update(decoder: Decoder, layer: int, K: Tensor, R: Tensor, P: Tensor | None, ridge: float) -> tuple[Factors, Tensor]:
    """Write one layer; returns the factors and the keys, whole where ranks hold parts of them."""
    weight, sharding = decoder.weight(layer), decoder.sharding
    if isinstance(weight, Branch):
        check_finite(R=R)
        U, V = R.contiguous(), rank_solve(rank_gram(K, P), K if P is None else P, ridge)
        weight.add(U, V)
        return (U, V), K
    if sharding is None:
        return rank_update_(weight, K, R, P, ridge), K
    sharding.check_finite(K=K, P=P, R=R)
    U, V = R.contiguous(), rank_solve(sharding.total(rank_gram(K, P)), K if P is None else P, ridge)
    add_low_rank_([weight], [U], [V])
    return (U, sharding.whole(V, 1)), sharding.whole(K, 0)


def _columns(paths: Sequence[Sequence[int]], subject: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Rows that agree up to the subject's last token: (last node, subject) -> those rows."""
    columns: dict[tuple[int, int], list[int]] = {}
    for r, (path, s) in enumerate(zip(paths, subject, strict=True)):
        columns.setdefault((path[-1], s), []).append(r)
    return columns


def _mean_columns(K: Tensor, R: Tensor, P: Tensor, root: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One column a value (MEMIT's habit): the mean of its rows' keys, and the residual of the first row, the bare prompt at
    which the value was read."""
    share = F.one_hot(owner).float() * root[:, None]
    share, first = share / (share**2).sum(0), torch.tensor([owner.tolist().index(s) for s in range(share.shape[1])], device=owner.device)
    return K @ share, R[:, first] / root[first], P @ share
