"""The geometry of an edit: how far its value may be pushed, and how far other wordings push it (method.md section 4).

The paper's account: an edit is recalled in another wording where the activation deviation D that the wording causes stays within the
tolerance radius R of the edited value. Every quantity of that account is measured here, from the model, the rows and the factors; what is
to be concluded for an edit is `certificate`'s part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.forms import Row
from rose_engine.forward import Prepared, pack, prepare, run_tree, suffix_nll, tree_on
from rose_engine.keys import reading
from rose_engine.packing import inputs

# Eq. 4: draws a magnitude, the share of them that has to be exceeded, and the probability that every target keeps.
DRAWS, SUCCESS, PROBABILITY = 10, 0.9, 0.9
# The grid of magnitudes: so many steps, each this share of ||v0||.
STEPS, STEP = 40, 0.02
# Tokens that are run at one time.
PASS_TOKENS = 1024


@dataclass(frozen=True)
class Radii:
    """Tolerance radii in units of the residual stream. subjects [S]: all targets of a subject together (eq. 4). facts [B]: each alone.
    probability [B]: of each target without noise; a radius is 0 where it is too low already."""

    subjects: Tensor
    facts: Tensor
    probability: Tensor


@torch.no_grad()
def tolerance_radius(
    decoder: Decoder,
    rows: Sequence[Row],
    subject: Sequence[int],
    delta: Tensor,
    step: Tensor,
    *,
    layer: int,
    steps: int = STEPS,
    draws: int = DRAWS,
    success: float = SUCCESS,
    probability: float = PROBABILITY,
    seed: int = 0,
) -> Radii:
    """R (eq. 4): the largest eps of the grid up to which z + eps u / ||u|| still gives every target its probability.

    rows [B]: the facts as they were edited, with targets; subject [B]: whose each is. delta [S, d]: added at the subjects' tokens after
    `layer`, z = h + delta; zeros for a model that holds the edit already. step [S]: a subject's grid is 0, step, .. steps * step. At each
    magnitude u is drawn `draws` times, the same Gaussian directions at every magnitude and for every subject; it passes where
    more than `success` of the draws do, and the search ends at the first that does not. All draws of all subjects that are still in
    the search run together.
    """
    if len(rows) != len(subject) or not len(rows):
        raise ValueError(f"one subject a row is wanted, given {len(rows)} rows and {len(subject)} subjects")
    prepared, device = prepare(decoder, rows, layer), delta.device
    directions = F.normalize(torch.randn(draws, delta.shape[1], generator=torch.Generator().manual_seed(seed)), dim=1).to(device)
    owner, S, B = torch.tensor(subject, device=device), len(delta), len(rows)
    facts, subjects = torch.full((B,), -1, device=device), torch.full((S,), -1, device=device)  # the last step that passed
    found = delta.new_zeros(B)
    whole = torch.bincount(owner, minlength=S)
    for i in range(steps + 1):
        alive = (facts == i - 1).nonzero()[:, 0].tolist()
        if not alive:
            break
        noise = (i * step)[:, None, None] * directions  # [S, draws, d]
        given = _probabilities(prepared, alive, owner, (delta[:, None] + noise).flatten(0, 1), draws)
        if i == 0:
            found = given.mean(1)
        kept = given >= probability
        index = torch.tensor(alive, device=device)
        facts[index[kept.double().mean(1) > success]] = i
        # A subject passes where one draw keeps all its targets; a fact that has left fails every draw.
        together = torch.zeros(S, draws, device=device).index_add(0, owner[index], kept.float())
        subjects[((together == whole[:, None]).double().mean(1) > success) & (subjects == i - 1)] = i
    return Radii(subjects.clamp(min=0) * step, facts.clamp(min=0) * step[owner], found)


def _probabilities(prepared: Prepared, index: Sequence[int], owner: Tensor, table: Tensor, draws: int) -> Tensor:
    """P(target) [len(index), draws], the product over its tokens, with every draw's vector of its subject; table [S * draws, d]."""
    out, rows = [], prepared.rows
    size = max(1, PASS_TOKENS // (draws * max(len(inputs(rows[r])) - rows[r].last for r in index)))
    for first in range(0, len(index), size):
        part = index[first : first + size]
        batch = pack(prepared, [r for r in part for _ in range(draws)])
        which = owner[list(part)].repeat_interleave(draws) * draws + torch.arange(draws, device=owner.device).repeat(len(part))
        nll = suffix_nll(batch, table, which)
        out.append(nll.new_zeros(len(which)).index_add(0, batch.suffixes.target_row, nll).view(-1, draws))
    return (-torch.cat(out)).exp()


@dataclass(frozen=True)
class State:
    """What a model holds at the rows' subject tokens: keys layer -> [B, d_in] and hidden [B, d], the residual stream after the last of
    these layers, float32."""

    keys: dict[int, Tensor]
    hidden: Tensor


@torch.no_grad()
def read_state(decoder: Decoder, rows: Sequence[Row], layers: Sequence[int]) -> State:
    """The model as it is now, at the last subject token of every row."""
    tree = tree_on([row.tokens[: row.last + 1] for row in rows], decoder.embedding.weight.device)
    node = [path[-1] for path in tree.path]
    with reading(decoder, layers) as keys:
        hidden = run_tree(decoder, tree, range(layers[-1] + 1))
    return State({layer: key[node].float() for layer, key in keys.items()}, hidden[node].float())


def deviation(factors: tuple[Tensor, Tensor], keys: Tensor, other: Tensor) -> Tensor:
    """D (eq. 5): ||dW (k - k')|| [B], dW = U V given as (U [d_out, n], V [n, d_in]), keys and other [B, d_in]."""
    U, V = factors
    return ((keys - other) @ V.T @ U.T).norm(dim=-1)


def conflict(gradients: Tensor) -> Tensor:
    """Gradient conflict (eq. 6) of relations, 1 - |cos(g_i, g_j)| [M, M], from their centroids [M, d]. NaN where one vanishes."""
    return 1 - similarity(gradients).abs()


def similarity(vectors: Tensor) -> Tensor:
    """Cosines [n, n] of vectors [n, d]."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit @ unit.T


def within_and_between(keys: Tensor, owner: Sequence[int]) -> tuple[float | None, float | None]:
    """Mean cosine of keys [n, d_in] of one subject, and of keys of two; None where there are no such pairs."""
    cosine, who = similarity(keys), torch.tensor(owner, device=keys.device)
    same = who[:, None] == who
    within, between = cosine[same & ~torch.eye(len(keys), dtype=torch.bool, device=keys.device)], cosine[~same]
    return tuple(float(pairs.mean()) if len(pairs) else None for pairs in (within, between))


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries [n, n - 1] of a square matrix beside its diagonal."""
    n = len(matrix)
    return matrix[~torch.eye(n, dtype=torch.bool, device=matrix.device)].view(n, max(0, n - 1))


def first_order(K: Tensor, R: Tensor, difference: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Eq. 16: ||R K^T C^-1 dk|| [B], what D is where K^T C^-1 dk is small, for dk [B, d_in], K [d_in, n], R [d_out, n].

    solve(X [d_in, B]) -> C^-1 X.
    """
    return (R.double() @ (K.double().T @ solve(difference.T).double())).norm(dim=0)


def deviation_bound(K: Tensor, R: Tensor, difference: Tensor, least: float) -> Tensor:
    """||R K^T||_2 ||dk|| / least [B], least the smallest eigenvalue of C: eq. 18, and with C = I eq. 17.

    D never exceeds it, for the eigenvalues of (C + K K^T)^-1 are at most 1 / least.
    """
    r = torch.linalg.qr(K.double(), mode="r").R
    return torch.linalg.matrix_norm(R.double() @ r.T, 2) * difference.double().norm(dim=-1) / least
