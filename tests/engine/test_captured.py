"""Frames step as packed suffixes do, whatever was laid into them before; FlashAttention's place is taken by its definition, a graph's by
a record of where it would read. What a GPU alone can show is `bench.gpu_suite`'s."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rose_engine import attention, captured, optimize
from rose_engine.architecture import FAMILIES, decoder_of
from rose_engine.captured import KEPT, SLACK, Frames, fits, shape_of
from rose_engine.edits import group_by_subject
from rose_engine.forward import pack, prepare, suffix_step
from rose_engine.optimize import Diverged, optimize_values, subject_rows
from rose_engine.packing import pack_suffixes, split_rows
from rose_engine.recipe import ROSE
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.conftest import IMO, LIN, MARTEAU
from tests.engine.test_families import EXTRA
from tests.engine.varlen import varlen, varlen_backward

RECIPE = replace(ROSE, rewordings=0, bystanders=0, layers=(1, 2), steps=12, lr=0.05, noise=0.1, stop_loss=0.0)


class Varlen(torch.autograd.Function):
    """What stands in for FlashAttention; as there, gradients of keys that no row has are what stood in memory."""

    @staticmethod
    def forward(ctx, q, k, v, query_offset, key_offset, scale):
        ctx.save_for_backward(q, k, v, query_offset, key_offset)
        ctx.scale = scale
        return varlen(q, k, v, query_offset, key_offset, scale)

    @staticmethod
    def backward(ctx, grad):
        return *varlen_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


def varlen_attn(q, k, v, query_offset, key_offset, longest_query, longest_key, *, scale, window_size, **grouped):
    """Varlen, of what keeps to the contract of PyTorch's."""
    assert window_size == (-1, 0) and grouped == attention.GROUPED and query_offset.dtype == key_offset.dtype == torch.int32
    queries, keys = query_offset.diff(), key_offset.diff()
    assert (queries >= 0).all() and (queries <= longest_query).all() and (queries <= keys).all() and (keys <= longest_key).all()
    assert query_offset[-1] == len(q) and key_offset[-1] <= len(k)
    return Varlen.apply(q, k, v, query_offset, key_offset, scale)


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)


def setting(model, tokenizer, edits=(*IMO, *MARTEAU, *LIN)):
    decoder = decoder_of(model.requires_grad_(False))
    return decoder, [subject_rows(decoder, tokenizer, s, RECIPE) for s in group_by_subject(edits)]


def rows_of(plans):
    return [row for plan in plans for row in plan.facts] + [plan.neutral for plan in plans]


def check(frame, prepared, index) -> None:
    """What a frame gives for the rows laid into it, with deltas drawn anew, is what `suffix_step` gives."""
    batch = pack(prepared, index)
    given = 0.3 * torch.randn(len(index), prepared.hidden.shape[1])
    frame.given[: len(index)] = given
    ours, wanted = frame.step(), suffix_step(batch, given, torch.arange(len(index)))
    for name, tolerance in (("nll", 1e-5), ("loss", 1e-5), ("grad", 1e-4)):
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"gemma2"}))  # whose attention is capped
def test_a_frame_steps_as_packed_suffixes(make_model, tokenizer, flash, kind):
    """And so does a batch that is laid into it next, from another tree."""
    model = make_model(kind, initializer_range=0.2, pad_token_id=0, **EXTRA.get(kind, {}))
    decoder, plans = setting(model, tokenizer)
    frames, rows = Frames(), rows_of(plans)
    order = torch.randperm(len(rows)).tolist()
    for given in (rows, [rows[i] for i in order], rows[len(rows) // 2 :]):
        prepared = prepare(decoder, given, 2)
        parts = split_rows(given, range(len(given)), 100)
        before = {id(frame) for frame in frames.held}
        for frame, index in zip(frames.lay(prepared, parts), parts, strict=True):
            check(frame, prepared, index)
            check(frame, prepared, index)
        if given is not rows and len(given) == len(rows):
            assert before & {id(frame) for frame in frames.held}


def test_frames_are_few_and_hold_their_batches(make_model, tokenizer):
    decoder, plans = setting(make_model(), tokenizer)
    rows, frames, made = rows_of(plans), Frames(), set()
    prepared = prepare(decoder, rows, 2)
    parts = [sorted(torch.randperm(len(rows))[: len(rows) // 2].tolist()) for _ in range(60)]
    for index in parts:
        s, neutral = pack_suffixes(rows, prepared.tree.path, index), sum(r in prepared.neutral for r in index)
        smallest = shape_of(s, neutral)
        assert fits(smallest, smallest, s) and len(s.node) < smallest.tokens <= 1.125 * (len(s.node) + 1)
        (frame,) = frames.lay(prepared, [index])
        made.add(frame)
        assert frame.shape.tokens <= SLACK * smallest.tokens and frame.shape.targets <= SLACK * smallest.targets
        assert len(frames.held) <= KEPT
    assert len(made) < len(parts) / 4


class Recorded:
    """What stands in for the graphs' memory: a graph that runs the step again, where it stood when it was captured."""

    def __init__(self):
        self.works, self.captures, self.replays = True, 0, 0

    def capture(self, run):
        run()
        self.captures += 1
        frame, there = run.__self__, addresses(run.__self__)

        def replay():
            assert addresses(frame) == there
            self.replays += 1
            run()

        return type("Graph", (), {"replay": staticmethod(replay)})


def addresses(frame):
    buffers = [x for x in vars(frame).values() if isinstance(x, torch.Tensor)]
    buffers += [*frame.at, *(x for held in (frame.keys, frame.values) for x in held.values())]
    return [x.data_ptr() for x in (*buffers, *(x for pair in frame.rotary.values() for x in pair))]


@pytest.mark.parametrize("stop_loss", [0.0, None])
def test_values_in_frames_are_those_without(make_model, tokenizer, flash, monkeypatch, stop_loss):
    """Whoever converges between two looks of the host keeps the value, the loss and the number of steps it had then."""
    decoder, plans = setting(make_model(seed=5, initializer_range=0.1), tokenizer)
    trace = []
    optimize_values(decoder, plans, RECIPE, lambda *told: trace.append(told[-1]))
    recipe = replace(RECIPE, stop_loss=sorted(trace)[len(trace) // 2] if stop_loss is None else stop_loss)
    wanted = optimize_values(decoder, plans, recipe, step_tokens=150)
    assert stop_loss is not None or int(wanted.steps.min()) < recipe.steps

    monkeypatch.setattr(captured, "serves", lambda prepared: True)
    monkeypatch.setattr(optimize, "READ_EVERY", {"cpu": 5})
    frames = Frames()
    frames.pool = Recorded()
    for _ in range(2):
        captures = frames.pool.captures
        values = optimize_values(decoder, plans, recipe, frames=frames, step_tokens=150)
        assert torch.equal(values.steps, wanted.steps)
        for name in ("delta", "loss", "centroids"):
            torch.testing.assert_close(getattr(values, name), getattr(wanted, name), rtol=2e-3, atol=2e-4)
    assert frames.pool.captures == captures  # the second time round they are there already
    assert frames.pool.replays > frames.pool.captures


def test_a_model_that_was_moved_is_captured_anew(make_model, tokenizer, flash):
    decoder, plans = setting(make_model(), tokenizer)
    rows, frames = rows_of(plans), Frames()
    laid = [frames.lay(prepare(decoder, rows, 2), [range(len(rows))])[0] for _ in range(2)]
    assert laid[0] is laid[1]
    weight = decoder.layers[4].mlp.up_proj.weight
    weight.data = weight.data.clone()
    prepared = prepare(decoder, rows, 2)
    (frame,) = frames.lay(prepared, [range(len(rows))])
    assert frame is not laid[0]
    check(frame, prepared, range(len(rows)))


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"gemma2"}))
def test_the_host_reads_nothing_within_a_step(make_model, tokenizer, kind):
    """Tensors without data: whatever would be read raises. FlashAttention's own description of what it gives takes its place."""
    model = make_model(kind, pad_token_id=0, **EXTRA.get(kind, {})).to(torch.bfloat16)
    decoder, plans = setting(model, tokenizer)
    rows = rows_of(plans)
    prepared = prepare(decoder, rows, 2)
    (frame,) = Frames().lay(prepared, [range(len(rows))])
    with FakeTensorMode(allow_non_fake_inputs=True):
        frame.step()
        with pytest.raises(DataDependentOutputException):
            frame.loss.sum().item()


def test_what_is_lost_between_two_looks_is_seen_at_the_next(make_model, tokenizer, monkeypatch):
    """A loss that is infinite once, in one step of one subject, and the progress that is told meanwhile."""
    decoder, plans = setting(make_model(), tokenizer)
    honest, steps, told = optimize.suffix_step, [], []

    def step(batch, given, index):
        done = honest(batch, given, index)
        steps.append(None)
        if len(steps) == 7:
            done.loss[:] = torch.inf
        return done

    monkeypatch.setattr(optimize, "suffix_step", step)
    monkeypatch.setattr(optimize, "READ_EVERY", {"cpu": 5})
    with pytest.raises(Diverged) as raised:
        optimize_values(decoder, plans[:1], RECIPE, lambda *a: told.append(a[2]), step_tokens=10**6)
    assert raised.value.step == 9 and raised.value.subjects == (0,) and told == [4]


@pytest.fixture
def gpu(make_model, tokenizer, monkeypatch):
    """What was prepared, as if on a GPU of a capability."""
    decoder, plans = setting(make_model(), tokenizer)
    prepared = prepare(decoder, rows_of(plans), 2)

    def of(dtype=torch.bfloat16, capability=(9, 0), **changes):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        head = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")
        parts = {name: getattr(decoder, name) for name in ("layers", "norm", "model", "sharding", "quantiser")}
        return replace(prepared, decoder=SimpleNamespace(**{**parts, "head": head, **changes}))

    return of


def test_frames_serve_what_they_can(gpu, make_model, tokenizer):
    assert captured.serves(gpu()) and captured.serves(gpu(torch.float16, (8, 0)))
    for refused in ({"dtype": torch.float32}, {"capability": (7, 5)}, {"quantiser": "bitsandbytes"}, {"sharding": object()}):
        assert not captured.serves(gpu(**refused))
    assert not captured.serves(replace(gpu(), blocks=()))
    capped = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=50.0))
    assert not captured.serves(gpu(model=capped))
    hooks = [gpu().decoder.norm.register_forward_hook(lambda *a: None)]
    assert not captured.serves(gpu())
    hooks.pop().remove()
    wrapped = gpu().decoder.layers[3].mlp
    wrapped.forward = wrapped.forward
    assert not captured.serves(gpu())
    decoder, plans = setting(make_model(), tokenizer)
    assert not captured.serves(prepare(decoder, rows_of(plans), 2))  # here is none


def test_what_cannot_be_captured_is_run(monkeypatch, caplog):
    """The stream is the caller's again, and nothing else is tried; memory that runs out is told."""
    streams, here = [], SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: nullcontext())
    runs = []

    def run(error):
        runs.append(error)
        if len(runs) % 2 == 0:
            raise error

    pool = captured.Pool(torch.device("cuda"))
    with pytest.raises(torch.OutOfMemoryError):
        pool.capture(partial(run, torch.OutOfMemoryError("full")))
    assert pool.works and streams == [here]
    assert pool.capture(partial(run, RuntimeError("no such thing in a graph"))) is None
    assert not pool.works and streams == [here, here] and "no such thing" in caplog.text


def test_graphs_may_be_switched_off(monkeypatch):
    assert Frames().graphs
    monkeypatch.setenv("ROSE_GRAPHS", "0")
    assert not Frames().graphs
