"""The prefix tree and packed suffixes, against what they mean."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from rose_engine.forms import Row
from rose_engine.packing import build_tree, inputs, pack_suffixes, split_rows

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=12)


@given(sequences)
def test_tree_holds_every_row_once(rows):
    tree = build_tree(rows)
    assert len(tree.token) == len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})
    node = torch.arange(len(tree.token))
    for row, path in zip(rows, tree.path, strict=True):
        assert tree.token[list(path)].tolist() == list(row) and tree.position[list(path)].tolist() == list(range(len(row)))
        leaf = path[-1]
        ancestors = node[(node <= leaf) & (leaf < tree.end)]
        assert ancestors.tolist() == list(path)


@st.composite
def rows(draw):
    tokens = draw(st.lists(st.integers(0, 3), min_size=2, max_size=8))
    last = draw(st.integers(0, len(tokens) - 2))
    return Row(tuple(tokens), last, draw(st.integers(last + 1, len(tokens))))


@given(st.lists(rows(), min_size=1, max_size=8))
def test_suffixes_say_what_the_rows_say(rows):
    tree = build_tree([inputs(r) for r in rows])
    index = list(range(len(rows)))[::-1]
    s = pack_suffixes(rows, tree.path, index)
    at = 0
    targets = []
    for b, r in enumerate(index):
        row = rows[r]
        wanted = inputs(row)[row.last :]
        assert s.start[b] == at and s.length[b] == len(wanted)
        assert tree.token[s.node[at : at + len(wanted)]].tolist() == list(wanted)
        assert s.pad[b, : len(wanted)].tolist() == list(range(at, at + len(wanted)))
        assert s.pad.flatten()[s.flat[at : at + len(wanted)]].tolist() == list(range(at, at + len(wanted)))
        assert tree.token[s.prefix[b, : s.prefix_length[b]]].tolist() == list(row.tokens[: row.last])
        targets += [(at + p - row.last - 1, row.tokens[p], b) for p in range(row.target, len(row.tokens))]
        at += len(wanted)
    assert len(s.node) == at
    assert list(zip(s.predict.tolist(), s.target.tolist(), s.target_row.tolist(), strict=True)) == targets


@given(st.lists(rows(), min_size=1, max_size=12), st.integers(1, 20))
def test_split_covers_every_row_within_the_budget(rows, budget):
    index = range(len(rows))[::2]
    batches = split_rows(rows, index, budget)
    assert sorted(r for batch in batches for r in batch) == list(index)
    for batch in batches:
        assert len(batch) == 1 or sum(len(inputs(rows[r])) - rows[r].last for r in batch) <= budget
