"""Keys: what the edited projections are given, read while layers run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.forms import Row
from rose_engine.forward import run_layers, run_tree, tree_on, whole_tree
from rose_engine.sharding import local


@contextmanager
def reading(decoder: Decoder, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, a run of these layers leaves here what their edited projections get, on this rank: layer -> [tokens, d_in]."""
    keys: dict[int, Tensor] = {}

    def read(layer: int, given: Tensor) -> None:
        key = local(given)[0]
        if decoder.sharding is not None and key.shape[-1] != decoder.weight(layer).shape[1]:  # given whole, and split inside
            key = decoder.sharding.part(key, -1)
        keys[layer] = key

    hooks = [decoder.projection(layer).register_forward_pre_hook(lambda _, args, layer=layer: read(layer, args[0])) for layer in layers]
    try:
        yield keys
    finally:
        for hook in hooks:
            hook.remove()


def every_key(decoder: Decoder, rows: Sequence[Row], layers: Sequence[int]) -> Iterator[Tensor]:
    """The keys of every token of some rows, layer by layer, [d_in, tokens] float32; nothing where there are no rows.

    They are those of unwritten weights where each is taken before its layer is written, and one layer's are held at a time.
    """
    if not rows:
        return
    tree = tree_on([row.tokens for row in rows], decoder.embedding.weight.device)
    attention = whole_tree(tree)
    hidden = run_tree(decoder, tree, range(layers[0]), attention)
    for layer, following in zip(layers, (*layers[1:], layers[-1] + 1), strict=True):
        with reading(decoder, [layer]) as keys:
            hidden = run_layers(decoder, hidden, tree.position, range(layer, following), attention)
        yield keys.pop(layer).float().T
