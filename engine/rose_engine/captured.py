"""The step of the value optimisation on a GPU: over buffers that stay where they are, so that one CUDA graph serves batch after batch.

A *frame* holds one packed batch of suffixes in tensors whose sizes are rounded up to few, its *shape*. What is left over belongs to one
more row, which has no target and no weight in the loss. A batch that fits is laid into a frame that is there, its prefixes' keys and
values with it, and the graph that was captured of the first one is replayed. Nothing within a step has the host wait for the device.
The step itself is `forward.library_step`, attention `attention.VarlenAttention`; who steps, and when, is `optimize`'s.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rose_engine.attention import VarlenAttention
from rose_engine.forward import Prepared, Reads, Step, library_step
from rose_engine.packing import Suffixes, pack_suffixes
from rose_kernels import inject, row_gradients

log = logging.getLogger(__name__)

# Frames that are kept for batches to come. Their graphs share one pool of memory; what each adds is its buffers.
KEPT = 8
# How much larger than the smallest, in tokens and targets, a frame that is there already may be.
SLACK = 1.25


class Shape(NamedTuple):
    """Sizes of a frame: tokens, rows, targets and neutral rows, places of keys, and the most queries and keys of a row."""

    tokens: int
    rows: int
    targets: int
    neutral: int
    keys: int
    longest_query: int
    longest_key: int


# What a frame has at least, for batches to come: these cost a step next to nothing.
LEAST = Shape(tokens=1, rows=64, targets=1, neutral=4, keys=2048, longest_query=32, longest_key=128)


def shape_of(suffixes: Suffixes, neutral: int) -> Shape:
    """The smallest shape for a batch with `neutral` neutral rows. What a step's time depends on, tokens and targets, is at most an eighth
    more than there is, the rest up to twice as much. One token more than there are, for rows that are none to begin at."""
    s = suffixes
    tokens = _eighth(len(s.node) + 1)
    left = tokens - len(s.node)
    longest = max(left, int(s.length.max())), max(left, int((s.prefix_length + s.length).max()))
    doubled = (_double(n) for n in (len(s.row), max(1, neutral), int(s.prefix_length.sum()) + tokens, *longest))
    rows, neutrals, keys, query, key = doubled
    shape = Shape(tokens, rows, _eighth(max(1, len(s.target))), neutrals, keys, query, key)
    return Shape(*map(max, shape, LEAST))


def fits(shape: Shape, suffixes: Suffixes, neutral: int) -> bool:
    """Whether a frame of a shape holds a batch, without running much more than the batch has."""
    s, wanted = suffixes, shape_of(suffixes, neutral)
    left = shape.tokens - len(s.node)  # the last row's
    if any(have < want for have, want in zip(shape, wanted, strict=True)) or left > min(shape.longest_query, shape.longest_key):
        return False
    larger = max(shape.tokens / wanted.tokens, shape.targets / wanted.targets)
    return larger <= SLACK and int(s.prefix_length.sum()) + shape.tokens <= shape.keys


def _double(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()


def _eighth(n: int) -> int:
    """n rounded up by an eighth of it at most, to one of eight sizes between two powers of two."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


def serves(prepared: Prepared) -> bool:
    """Whether frames can step what was prepared: whole half-precision weights on a GPU that has FlashAttention, attention that it knows,
    and no hook in a layer above L."""
    decoder, head = prepared.decoder, prepared.decoder.head
    if not head.is_cuda or head.dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(head.device) < (8, 0):
        return False
    if prepared.blocks is not None or decoder.sharding is not None or decoder.quantiser:
        return False
    if getattr(decoder.model.config, "attn_logit_softcapping", None) is not None:
        return False
    width = next(iter(prepared.prefix.keys.values())).shape[-1]
    layers = [decoder.layers[layer] for layer in prepared.layers]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for layer in layers for m in layer.modules())
    return width % 8 == 0 and width <= 256 and not hooked


class Frame:
    """A batch in buffers of a shape. given [rows, d]: what is to be added at each row's subject token, for the caller to fill.

    step() is a forward and backward pass: a `Step` whose tensors the next step overwrites.
    """

    def __init__(self, prepared: Prepared, shape: Shape, pool: Pool | None):
        decoder, self.shape, self.layers, self.pool = prepared.decoder, shape, prepared.layers, pool
        self.decoder, self.graph = decoder, None
        device, dtype, (V, d) = prepared.hidden.device, prepared.hidden.dtype, decoder.head.shape
        zeros = partial(torch.zeros, device=device, dtype=prepared.reference.dtype)
        self.hidden = zeros(shape.tokens, d, dtype=dtype)
        self.given, self.grad = zeros(shape.rows, d), zeros(shape.rows, d)
        self.nll, self.loss = zeros(shape.targets), zeros(shape.rows)
        self.reference = zeros(shape.neutral, V)
        self.row = torch.arange(shape.rows, device=device)
        # What the host lays out of a batch goes to the device in one copy each of integers and floats.
        self.sizes = {
            "node": shape.tokens, "position": shape.tokens, "place": shape.tokens, "source": shape.keys, "start": shape.rows,
            "query_offset": shape.rows + 2, "key_offset": shape.rows + 2, "predict": shape.targets, "target": shape.targets,
            "target_row": shape.targets, "neutral": shape.neutral, "neutral_row": shape.neutral,
        }  # fmt: skip
        self.integers = zeros(sum(self.sizes.values()), dtype=torch.long)
        self.shares = zeros(shape.targets + shape.neutral)
        at = dict(zip(self.sizes, self.integers.split(list(self.sizes.values())), strict=True))
        self.at = at
        self.query_offset, self.key_offset = (zeros(shape.rows + 2, dtype=torch.int32) for _ in range(2))
        like = next(iter(prepared.prefix.keys.values()))
        self.keys, self.values = ({layer: zeros(shape.keys, *like.shape[1:], dtype=dtype) for layer in self.layers} for _ in range(2))
        longest = shape.longest_query, shape.longest_key
        self.attention = VarlenAttention(self.keys, self.values, at["place"], self.query_offset, self.key_offset, *longest)
        weight, share = self.shares.split([shape.targets, shape.neutral])
        self.reads = Reads(at["predict"], at["target"], weight, at["neutral"], self.reference, share)
        self.rotary = self._rotations()
        self.count = 0, 0  # rows and targets that are true ones

    def _rotations(self) -> dict[int, tuple[Tensor, Tensor] | None]:
        """Of each layer; layers that turn alike share a pair."""
        rotary = self.decoder.rotations(self.hidden[None], self.at["position"][None])
        return {layer: rotary(layer) for layer in self.layers}

    @torch.no_grad()
    def lay(self, prepared: Prepared, index: Sequence[int], suffixes: Suffixes) -> None:
        """Put the suffixes of the rows `index` in the place of what was here. The host waits for nothing."""
        s, shape = suffixes, self.shape
        N, B, T = len(s.node), len(s.row), len(s.target)
        rest = torch.arange(shape.tokens - N)
        total = (s.prefix_length + s.length).cumsum(0)
        begin = total - s.length  # of each row's suffix among the keys
        used = int(total[-1])
        row = torch.arange(B).repeat_interleave(s.length)
        source = torch.zeros(used, dtype=torch.long)
        within = torch.arange(s.prefix.shape[1]) < s.prefix_length[:, None]
        source[((begin - s.prefix_length)[:, None] + torch.arange(s.prefix.shape[1]))[within]] = s.prefix[within]
        neutral = [b for b, r in enumerate(index) if r in prepared.neutral]
        laid = {
            "node": s.node, "position": s.position, "source": source,
            "place": torch.cat([begin[row] + torch.arange(N) - s.start[row], used + rest]),
            # Rows that are none begin at a token of the last row, where nothing is added; they have no query and no key.
            "start": torch.cat([s.start, torch.full((shape.rows - B,), N)]),
            "query_offset": torch.cat([s.start, torch.full((shape.rows - B + 1,), N), torch.tensor([shape.tokens])]),
            "key_offset": torch.cat([total - s.prefix_length - s.length, torch.full((shape.rows - B + 1,), used), used + rest[-1:] + 1]),
            "predict": s.predict, "target": s.target, "target_row": s.target_row,
            "neutral": s.start[neutral], "neutral_row": torch.tensor(neutral, dtype=torch.long),
        }  # fmt: skip
        integers, shares = torch.zeros_like(self.integers, device="cpu"), torch.zeros_like(self.shares, device="cpu")
        for (name, size), part in zip(self.sizes.items(), integers.split(list(self.sizes.values())), strict=True):
            assert len(laid[name]) <= size, name
            part[: len(laid[name])] = laid[name]
        shares[:T] = 1 / s.targets[s.target_row]
        shares[shape.targets : shape.targets + len(neutral)] = 1
        for there, here in ((self.integers, integers), (self.shares, shares)):
            there.copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)
        self.query_offset.copy_(self.at["query_offset"])
        self.key_offset.copy_(self.at["key_offset"])
        torch.index_select(prepared.hidden, 0, self.at["node"], out=self.hidden)
        source = prepared.place[self.at["source"]]
        for layer in self.layers:
            torch.index_select(prepared.prefix.keys[layer], 0, source, out=self.keys[layer])
            torch.index_select(prepared.prefix.values[layer], 0, source, out=self.values[layer])
        for k, b in enumerate(neutral):
            self.reference[k] = prepared.reference[prepared.neutral[index[b]]]
        turned = self._rotations()
        for layer in {id(pair): layer for layer, pair in turned.items() if pair is not None}.values():
            for there, here in zip(self.rotary[layer], turned[layer], strict=True):
                there.copy_(here)
        self.given.zero_()
        self.count = B, T

    def step(self) -> Step:
        """Of the rows that were laid, with `given`."""
        if self.graph is not None:
            self.graph.replay()
        elif self.pool is not None and self.pool.works:
            self.graph = self.pool.capture(self._run)
        else:
            self._run()
        B, T = self.count
        return Step(self.nll[:T], self.loss[:B], self.grad[:B])

    @torch.no_grad()
    def _run(self) -> None:
        at = self.at
        hidden = inject(self.hidden, self.given, at["start"], self.row)
        nll, kl, grad = library_step(
            self.decoder, hidden, at["position"], self.layers, self.attention, self.reads, rotary=self.rotary.__getitem__
        )
        self.nll.copy_(nll)
        self.loss.zero_().index_add_(0, at["target_row"], self.reads.weight * nll).index_add_(0, at["neutral_row"], kl)
        self.grad.copy_(row_gradients(grad, at["start"]))


class Pool:
    """Memory that the graphs of all frames share: they are replayed one after another, and what they give is copied out of it."""

    def __init__(self):
        self.handle, self.works = torch.cuda.graph_pool_handle(), True

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of `run`, which is run once before: libraries make their work space, and Triton its kernels, outside of a graph. None,
        with a warning, where it cannot be captured; then nothing is any more."""
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            run()
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.handle):
                run()
        except RuntimeError as e:
            log.warning("the step cannot be captured in a CUDA graph and is run kernel by kernel: %s", e)
            self.works = False
            return None
        return graph


class Frames:
    """The frames of one decoder, kept from one batch of subjects to the next. graphs: capture their steps; `ROSE_GRAPHS=0` does not."""

    def __init__(self, graphs: bool | None = None):
        self.graphs = os.environ.get("ROSE_GRAPHS") != "0" if graphs is None else graphs
        self.pool: Pool | None = None
        self.held: list[Frame] = []
        self.weights: tuple[int, ...] = ()

    def lay(self, prepared: Prepared, parts: Sequence[Sequence[int]]) -> list[Frame]:
        """The suffixes of the rows of each part, in a frame. Those of an earlier call are used again."""
        if self.graphs and self.pool is None and prepared.hidden.is_cuda:
            self.pool = Pool()
        weights = _addresses(prepared)
        free, self.weights = self.held if weights == self.weights else [], weights
        taken = []
        for index in parts:
            suffixes = pack_suffixes(prepared.rows, prepared.tree.path, index)
            neutral = sum(r in prepared.neutral for r in index)
            held = [frame for frame in free if fits(frame.shape, suffixes, neutral)]
            frame = min(held, key=lambda f: f.shape.tokens) if held else Frame(prepared, shape_of(suffixes, neutral), self.pool)
            free = [other for other in free if other is not frame]
            frame.lay(prepared, index, suffixes)
            taken.append(frame)
        self.held = taken + free[: max(0, KEPT - len(taken))]
        return taken


def _addresses(prepared: Prepared) -> tuple[int, ...]:
    """Where everything stands that a graph reads beside the frame: a model that was moved is captured anew."""
    decoder = prepared.decoder
    modules = [*(decoder.layers[layer] for layer in prepared.layers), decoder.norm]
    return (decoder.head.data_ptr(), *(p.data_ptr() for module in modules for p in module.parameters()))
