"""The step of the value optimisation on a GPU: over buffers that stay where they are, so that one CUDA graph serves batch after batch.

A *frame* holds one packed batch of suffixes in tensors whose sizes are rounded up to few, its *shape*. What is left over belongs to one
more row, which has no target and no weight in the loss. A batch that fits is laid into a frame that is there, its prefixes' keys and
values with it, and the graph that was captured of the first one is replayed. Within a step the host never waits for the device.
The step itself is `forward.library_step`, attention `attention.VarlenAttention`; who steps, and when, is `optimize`'s.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rose_engine.attention import VarlenAttention
from rose_engine.forward import Prepared, Reads, Step, library_step
from rose_engine.packing import Suffixes, pack_suffixes
from rose_kernels import inject, row_gradients

log = logging.getLogger(__name__)

# Frames that are kept for batches to come: so many, and so many bytes of keys and values. Their graphs share one pool of memory.
KEPT, KEPT_BYTES = 8, 2**29
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


# What a frame has at least, for batches to come: no step takes longer for it, and it is little memory.
LEAST = Shape(tokens=1, rows=64, targets=1, neutral=4, keys=512, longest_query=32, longest_key=128)


def shape_of(suffixes: Suffixes, neutral: int) -> Shape:
    """The smallest shape for a batch with `neutral` neutral rows. What time and memory depend on, tokens, targets and keys, is at most an
    eighth more than there is, the rest up to twice as much. One token more than there are, for rows that are none to begin at."""
    s = suffixes
    tokens = _eighth(len(s.node) + 1)
    left = tokens - len(s.node)
    query, key = (max(left, int(n.max())) for n in (s.length, s.prefix_length + s.length))
    shape = Shape(
        tokens=tokens,
        rows=_double(len(s.row)),
        targets=_eighth(max(1, len(s.target))),
        neutral=_double(max(1, neutral)),
        keys=_eighth(int(s.prefix_length.sum()) + tokens),
        longest_query=_double(query),
        longest_key=_double(key),
    )
    return Shape(*map(max, shape, LEAST))


def fits(shape: Shape, wanted: Shape, suffixes: Suffixes) -> bool:
    """Whether a frame of a shape holds a batch, without running much more than the batch has. wanted: the batch's smallest shape."""
    s, left = suffixes, shape.tokens - len(suffixes.node)  # left: the last row's
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
    and modules above L that are as the library made them."""
    decoder, head = prepared.decoder, prepared.decoder.head
    if not head.is_cuda or head.dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(head.device) < (8, 0):
        return False
    if prepared.blocks is not None or decoder.sharding is not None or decoder.quantiser:
        return False
    if getattr(decoder.model.config, "attn_logit_softcapping", None) is not None:
        return False
    width = next(iter(prepared.prefix.keys.values())).shape[-1]
    return width % 8 == 0 and width <= 256 and not any(map(_changed, _modules(prepared)))


def _modules(prepared: Prepared) -> Iterator[nn.Module]:
    """All modules that a step runs."""
    for module in (*(prepared.decoder.layers[layer] for layer in prepared.layers), prepared.decoder.norm):
        yield from module.modules()


def _changed(module: nn.Module) -> bool:
    """Whether a call of the module does something else beside."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class Layout(NamedTuple):
    """Where everything of a batch stands in a frame; integers, each as long as the frame's shape says, what is left over filled up.

    node, position, place [tokens]: each token's node of the tree, its position, and where among the keys its own is put. source [keys]: of
    which node a key is, where it is a prefix's. start [rows]. query_offset, key_offset [rows + 2]: where each row's queries and keys begin,
    then those of the row of what is left over, then the end. predict, target, target_row [targets]; neutral, neutral_row [neutral]: the
    subject's token of each neutral row, and the row.
    """

    node: Tensor
    position: Tensor
    place: Tensor
    source: Tensor
    start: Tensor
    query_offset: Tensor
    key_offset: Tensor
    predict: Tensor
    target: Tensor
    target_row: Tensor
    neutral: Tensor
    neutral_row: Tensor


def layout_of(suffixes: Suffixes, shape: Shape, neutral: Sequence[int]) -> Layout:
    """The layout of suffixes, on the host. neutral: which rows have no target."""
    s, N = suffixes, len(suffixes.node)
    key_end = (s.prefix_length + s.length).cumsum(0)
    key_start, used = key_end - s.length - s.prefix_length, int(key_end[-1])
    left, none = torch.arange(shape.tokens - N), shape.rows - len(s.row)
    column = torch.arange(s.prefix.shape[1])
    within = column < s.prefix_length[:, None]
    source = torch.zeros(shape.keys, dtype=torch.long)
    source[(key_start[:, None] + column)[within]] = s.prefix[within]
    own = (key_end - s.length - s.start).repeat_interleave(s.length) + torch.arange(N)

    def filled(x: Tensor, size: int, value: int = 0) -> Tensor:
        return F.pad(x, (0, size - len(x)), value=value)

    return Layout(
        node=filled(s.node, shape.tokens),
        position=filled(s.position, shape.tokens),
        place=torch.cat([own, used + left]),
        source=source,
        start=filled(s.start, shape.rows, N),  # rows that are none begin at a token of the last one, where nothing is added
        query_offset=F.pad(filled(s.start, len(s.start) + none + 1, N), (0, 1), value=shape.tokens),
        key_offset=F.pad(filled(key_start, len(s.start) + none + 1, used), (0, 1), value=used + len(left)),
        predict=filled(s.predict, shape.targets),
        target=filled(s.target, shape.targets),
        target_row=filled(s.target_row, shape.targets),
        neutral=filled(s.start[list(neutral)], shape.neutral),
        neutral_row=filled(torch.tensor(neutral, dtype=torch.long), shape.neutral),
    )


class Frame:
    """A batch in buffers of a shape. given [rows, d]: what is to be added at each row's subject token, for the caller to fill.

    step() is a forward and backward pass: a `Step` whose tensors the next step overwrites.
    """

    def __init__(self, prepared: Prepared, shape: Shape, layout: Layout, pool: Pool | None):
        self.decoder, self.layers, self.shape, self.pool, self.graph = prepared.decoder, prepared.layers, shape, pool, None
        device, dtype, (V, d) = prepared.hidden.device, prepared.hidden.dtype, self.decoder.head.shape
        zeros = partial(torch.zeros, device=device, dtype=prepared.reference.dtype)
        self.hidden = zeros(shape.tokens, d, dtype=dtype)
        self.given, self.grad = zeros(shape.rows, d), zeros(shape.rows, d)
        self.nll, self.loss = zeros(shape.targets), zeros(shape.rows)
        self.reference = zeros(shape.neutral, V)
        self.row = torch.arange(shape.rows, device=device)
        self.integers = zeros(sum(map(len, layout)), dtype=torch.long)
        self.at = Layout(*self.integers.split([len(x) for x in layout]))
        self.offsets = zeros(2, shape.rows + 2, dtype=torch.int32)
        self.shares = zeros(shape.targets + shape.neutral)
        like = next(iter(prepared.prefix.keys.values()))
        self.keys, self.values = ({layer: zeros(shape.keys, *like.shape[1:], dtype=dtype) for layer in self.layers} for _ in range(2))
        longest = shape.longest_query, shape.longest_key
        self.attention = VarlenAttention(self.keys, self.values, self.at.place, *self.offsets, *longest)
        weight, share = self.shares.split([shape.targets, shape.neutral])
        self.reads = Reads(self.at.predict, self.at.target, weight, self.at.neutral, self.reference, share)
        self.rotary = self._rotations()
        self.rows = self.targets = 0  # that were laid

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(x.nbytes for held in (self.keys, self.values) for x in held.values())

    def _rotations(self) -> dict[int, tuple[Tensor, Tensor] | None]:
        rotary = self.decoder.rotations(self.hidden[None], self.at.position[None])
        return {layer: rotary(layer) for layer in self.layers}

    @torch.no_grad()
    def lay(self, prepared: Prepared, index: Sequence[int], suffixes: Suffixes, layout: Layout) -> None:
        """Put the suffixes of the rows `index`, and the keys and values before them, in the place of what was here."""
        T = len(suffixes.target)
        neutral = [prepared.neutral[r] for r in index if r in prepared.neutral]
        shares = torch.zeros_like(self.shares, device="cpu")
        shares[:T] = 1 / suffixes.targets[suffixes.target_row]
        shares[self.shape.targets : self.shape.targets + len(neutral)] = 1
        for there, here in ((self.integers, torch.cat(layout)), (self.shares, shares)):
            there.copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)
        self.offsets[0].copy_(self.at.query_offset)
        self.offsets[1].copy_(self.at.key_offset)
        torch.index_select(prepared.hidden, 0, self.at.node, out=self.hidden)
        source = prepared.place[self.at.source]
        for layer in self.layers:
            torch.index_select(prepared.prefix.keys[layer], 0, source, out=self.keys[layer])
            torch.index_select(prepared.prefix.values[layer], 0, source, out=self.values[layer])
        for k, place in enumerate(neutral):
            self.reference[k] = prepared.reference[place]
        written = set()
        for layer, pair in self._rotations().items():
            for there, here in zip(self.rotary[layer] or (), pair or (), strict=True):
                if id(there) not in written:  # layers that turn alike share a pair
                    there.copy_(here)
                    written.add(id(there))
        self.given.zero_()
        self.rows, self.targets = len(index), T

    def step(self) -> Step:
        """Of the rows that were laid, with `given`."""
        if self.graph is not None:
            self.graph.replay()
        elif self.pool is not None and self.pool.works:
            self.graph = self.pool.capture(self._run)
        else:
            self._run()
        return Step(self.nll[: self.targets], self.loss[: self.rows], self.grad[: self.rows])

    @torch.no_grad()
    def _run(self) -> None:
        at = self.at
        hidden = inject(self.hidden, self.given, at.start, self.row)
        rotary = self.rotary.__getitem__
        nll, kl, grad = library_step(self.decoder, hidden, at.position, self.layers, self.attention, self.reads, rotary)
        self.nll.copy_(nll)
        self.loss.zero_().index_add_(0, at.target_row, self.reads.weight * nll).index_add_(0, at.neutral_row, kl)
        self.grad.copy_(row_gradients(grad, at.start))


class Pool:
    """Memory that the graphs of all frames share: they are replayed one after another, and what they give is copied out of it."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.works = device, torch.cuda.Stream(device), True
        self.handle, self.graphs = None, WeakSet()

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of `run`, which is run once before: libraries make their work space, and Triton its kernels, outside of a graph. None,
        with a warning, where it cannot be captured; then nothing is any more."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            run()
        here.wait_stream(self.stream)
        if not self.graphs:  # memory that no graph holds any more is not given out again under its old handle
            self.handle = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.handle, stream=self.stream):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            log.warning("the step cannot be captured in a CUDA graph and is run kernel by kernel: %s", e)
            self.works = False
            return None
        finally:
            torch.cuda.set_stream(here)
        self.graphs.add(graph)
        return graph


class Frames:
    """The frames of one decoder, kept from one batch of subjects to the next. graphs: capture their steps; `ROSE_GRAPHS=0` does not."""

    def __init__(self, graphs: bool | None = None):
        self.graphs = os.environ.get("ROSE_GRAPHS") != "0" if graphs is None else graphs
        self.pool: Pool | None = None
        self.held: list[Frame] = []
        self.reading: tuple = ()

    def lay(self, prepared: Prepared, parts: Sequence[Sequence[int]]) -> list[Frame]:
        """The suffixes of the rows of each part, in a frame; it is theirs until the next call."""
        if self.graphs and self.pool is None and prepared.hidden.is_cuda:
            self.pool = Pool(prepared.hidden.device)
        reading = _reading(prepared)
        self.held, self.reading = self.held if reading == self.reading else [], reading
        taken = []
        for index in parts:
            suffixes = pack_suffixes(prepared.rows, prepared.tree.path, index)
            neutral = [b for b, r in enumerate(index) if r in prepared.neutral]
            wanted = shape_of(suffixes, len(neutral))
            found = [frame for frame in self.held if fits(frame.shape, wanted, suffixes)]
            frame = min(found, key=lambda frame: frame.shape, default=None)
            layout = layout_of(suffixes, frame.shape if frame else wanted, neutral)
            frame = frame or Frame(prepared, wanted, layout, self.pool)
            frame.lay(prepared, index, suffixes, layout)
            self.held = [other for other in self.held if other is not frame]
            taken.append(frame)
        rest, self.held = self.held, list(taken)
        for frame in rest:
            if len(self.held) >= KEPT or sum(one.key_bytes for one in (*self.held, frame)) > KEPT_BYTES:
                break
            self.held.append(frame)
        return taken


def _reading(prepared: Prepared) -> tuple:
    """Where everything stands that a graph reads beside its frame, and how its modules work: a model that was moved is captured anew."""
    there = [(x.data_ptr() for x in (*m.parameters(False), *m.buffers(False))) for m in _modules(prepared)]
    return (prepared.decoder.head.data_ptr(), prepared.decoder.model.training, *chain.from_iterable(there))
