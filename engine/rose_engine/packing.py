"""Token rows laid out for the engine: one prefix tree over all rows, and packed suffixes without padding.

Rows that begin alike (a system prompt, a subject at the head of the sentence) share the nodes of the tree, so what precedes the
subject is computed once however many rows need it. A *suffix* runs from the subject's last token to the last token that predicts a
target; only suffixes change while a value is optimised (design.md, ideas 1 to 3 and 7). Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rose_engine.forms import Row


@dataclass(frozen=True)
class Tree:
    """A prefix tree over token rows, its N nodes in depth-first order.

    token, position, end: [N] int64; the subtree of node j is j .. end[j] - 1, so j is i or an ancestor of i exactly where
    j <= i < end[j]. path: the nodes of each row, one for each of its tokens.
    """

    token: Tensor
    position: Tensor
    end: Tensor
    path: tuple[tuple[int, ...], ...]


def build_tree(rows: Sequence[Sequence[int]]) -> Tree:
    """The prefix tree of token sequences. Sorted sequences visit it depth first, so one pass with a stack builds it."""
    token: list[int] = []
    position: list[int] = []
    end: list[int] = []
    path: list[tuple[int, ...]] = [()] * len(rows)
    stack: list[int] = []
    for r in sorted(range(len(rows)), key=lambda r: tuple(rows[r])):
        row = rows[r]
        shared = 0
        while shared < min(len(stack), len(row)) and token[stack[shared]] == row[shared]:
            shared += 1
        for node in stack[shared:]:
            end[node] = len(token)
        del stack[shared:]
        for p in range(shared, len(row)):
            stack.append(len(token))
            token.append(row[p])
            position.append(p)
            end.append(0)
        path[r] = tuple(stack)
    for node in stack:
        end[node] = len(token)
    return Tree(torch.tensor(token), torch.tensor(position), torch.tensor(end), tuple(path))


@dataclass(frozen=True)
class Suffixes:
    """B packed suffixes of N tokens in all, with what attention and the loss need to know of them.

    row [B]: which rows these are. node [N], position [N]: each token's node and position. start [B]: the token at which
    each row's suffix begins, its subject's last token. pad [B, longest]: token of each padded place (0 where there is
    none). length [B]. prefix [B, longest prefix]: nodes before the suffix (0 where none), prefix_length [B].
    flat [N]: place of each token in the padded [B * longest] layout. predict [T], target [T], target_row [T]: the tokens
    that predict a target, the target tokens, and the row (0 .. B - 1) that each belongs to. targets [B]: how many a row has.
    """

    row: Tensor
    node: Tensor
    position: Tensor
    start: Tensor
    pad: Tensor
    length: Tensor
    flat: Tensor
    prefix: Tensor
    prefix_length: Tensor
    predict: Tensor
    target: Tensor
    target_row: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Suffixes:
        """The same on another device."""
        return Suffixes(**{name: value.to(device) for name, value in vars(self).items()})


def _padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    out = torch.zeros(len(sequences), max(1, *map(len, sequences)) if sequences else 1, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        out[i, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return out


def inputs(row: Row) -> tuple[int, ...]:
    """The tokens of a row that are fed to the model: all but the last target token, which predicts nothing we read."""
    return row.tokens[:-1] if row.target < len(row.tokens) else row.tokens


def pack_suffixes(rows: Sequence[Row], paths: Sequence[Sequence[int]], index: Sequence[int]) -> Suffixes:
    """Pack the suffixes of the rows `index` of `rows`, whose tree paths are `paths`."""
    node, position, start, length, pad, flat, prefix, predict, target, target_row = ([] for _ in range(10))
    longest = max(len(inputs(rows[r])) - rows[r].last for r in index)
    for b, r in enumerate(index):
        row, path = rows[r], paths[r]
        first, count = len(node), len(inputs(row)) - row.last
        start.append(first)
        length.append(count)
        node += path[row.last : row.last + count]
        position += range(row.last, row.last + count)
        pad.append(range(first, first + count))
        flat += range(b * longest, b * longest + count)
        prefix.append(path[: row.last])
        for p in range(row.target, len(row.tokens)):
            predict.append(first + p - 1 - row.last)
            target.append(row.tokens[p])
            target_row.append(b)
    as_tensor = lambda x: torch.tensor(x, dtype=torch.long)  # noqa: E731
    return Suffixes(
        row=as_tensor(list(index)),
        node=as_tensor(node),
        position=as_tensor(position),
        start=as_tensor(start),
        pad=_padded(pad),
        length=as_tensor(length),
        flat=as_tensor(flat),
        prefix=_padded(prefix),
        prefix_length=as_tensor([len(p) for p in prefix]),
        predict=as_tensor(predict),
        target=as_tensor(target),
        target_row=as_tensor(target_row),
        targets=as_tensor([len(rows[r].tokens) - rows[r].target for r in index]),
    )


def split_rows(rows: Sequence[Row], index: Iterable[int], budget: int) -> list[list[int]]:
    """Split the rows `index` into batches of at most `budget` suffix tokens (never less than a row), rows of like length together."""
    batches: list[list[int]] = []
    used = budget
    for r in sorted(index, key=lambda r: (len(inputs(rows[r])) - rows[r].last, rows[r].last)):
        cost = len(inputs(rows[r])) - rows[r].last
        if used + cost > budget:
            batches.append([])
            used = 0
        batches[-1].append(r)
        used += cost
    return batches
