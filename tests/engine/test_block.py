"""Which layers are written out, which the library runs, and that both give the same step; and which dtype `auto` takes."""

from dataclasses import replace

import pytest
import torch
from rose_engine import Editor, block, dtype
from rose_engine.architecture import decoder_of
from rose_engine.attention import TreeAttention
from rose_engine.edits import group_by_subject
from rose_engine.forward import blocks_of, pack, prepare, run_tree, suffix_step, tree_on
from rose_engine.optimize import subject_rows
from rose_engine.recipe import ROSE
from torch import nn

from rose_kernels import layer, native
from tests.conftest import LIN

needs_csrc = pytest.mark.skipif("cpu" not in native.served(), reason="csrc is not built here: no C++ compiler")


def layers_of(model):
    return blocks_of(decoder_of(model), range(len(model.model.layers)))


@needs_csrc
def test_plain_layers_are_written_out(make_model, monkeypatch):
    model = make_model(head_dim=32)
    assert len(layers_of(model)) == len(model.model.layers)
    assert layers_of(model.bfloat16()) is not None
    monkeypatch.setenv("ROSE_BACKEND", "reference")
    assert layers_of(model) is None
    monkeypatch.delenv("ROSE_BACKEND")
    assert blocks_of(decoder_of(model), range(0)) is None


class Adapter(nn.Linear):
    """What an adapter library puts in a projection's place."""


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


def hooked_norm(model):
    model.model.norm.register_forward_pre_hook(lambda *args: None)


def adapted(model):
    model.model.layers[2].mlp.up_proj = Adapter(32, 64, bias=False)


def halved(model):
    model.half()


def mixed(model):
    model.model.layers[0].mlp.bfloat16()


def own_forward(model):
    model.model.layers[1].forward = model.model.layers[1].forward


class Norm(nn.Module):
    """A norm that is not the family's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))


def other_norm(model):
    model.model.layers[1].post_attention_layernorm = Norm()


def of_another_class(model):
    model.model.layers[3].__class__ = type("LlamaDecoderLayer", (type(model.model.layers[3]),), {"__module__": "mine"})


@needs_csrc
@pytest.mark.parametrize("change", [hooked, hooked_norm, adapted, halved, mixed, own_forward, other_norm, of_another_class])
def test_anything_else_is_the_librarys(make_model, change):
    model = make_model(head_dim=32)
    change(model)
    assert layers_of(model) is None


@pytest.mark.parametrize("extra", [{"head_dim": 8}, {"head_dim": 32, "hidden_act": "gelu"}, {"head_dim": 32, "intermediate_size": 72}])
def test_shapes_and_activations_that_are_not_written_out(make_model, extra):
    assert layers_of(make_model(**extra)) is None


@needs_csrc
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_bfloat16_steps_agree_with_the_librarys(make_model, tokenizer, kind, monkeypatch):
    """Against float64: the written-out step, whose residual stream is float32, is no further off than the library's."""
    models = {name: make_model(kind, head_dim=32, seed=5, initializer_range=0.2) for name in ("exact", "library", "written")}
    models["library"].bfloat16()
    models["written"].bfloat16()
    models["exact"].load_state_dict(models["library"].state_dict())
    models["exact"].double()
    (subject,) = group_by_subject(LIN)
    delta = torch.randn(1, 32)
    loss = {}
    for name, model in models.items():
        monkeypatch.setenv("ROSE_BACKEND", "reference") if name != "written" else monkeypatch.delenv("ROSE_BACKEND")
        decoder = decoder_of(model.requires_grad_(False))
        plan = subject_rows(decoder, tokenizer, subject, ROSE)
        prepared = prepare(decoder, [*plan.facts, plan.neutral], 2)
        assert (prepared.blocks is not None) == (name == "written")
        batch = pack(prepared, range(len(plan.facts) + 1))
        step = suffix_step(batch, delta.double() if name == "exact" else delta, torch.zeros(len(batch.suffixes.row), dtype=torch.long))
        loss[name] = torch.cat([step.nll.double(), step.grad.double().flatten()])
    off = {name: float((loss[name] - loss["exact"]).norm() / loss["exact"].norm()) for name in ("library", "written")}
    assert off["written"] <= 1.2 * off["library"] < 0.1


@needs_csrc
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_float32_layers_of_a_tree_are_the_librarys(make_model, kind, monkeypatch):
    """Hidden states, and the keys and values that are kept; where a gradient is asked for, the library runs."""
    model = make_model(kind, head_dim=32, initializer_range=0.2).requires_grad_(False)
    decoder, words = decoder_of(model), len(model.model.embed_tokens.weight)
    rows = [torch.randint(words, (n,)).tolist() for n in (9, 4, 300)]
    rows.append([*rows[2][:5], 7])
    found, asked = {}, []
    monkeypatch.setattr(block, "run", lambda *args, ours=block.run: (asked.append(1), ours(*args))[1])
    for name, gradient in (("written", False), ("library", False), ("asked", True)):
        monkeypatch.setenv("ROSE_BACKEND", "reference") if name == "library" else monkeypatch.delenv("ROSE_BACKEND", raising=False)
        tree = tree_on(rows, torch.device("cpu"))
        attention = TreeAttention(tree, torch.arange(len(tree.token)), keep=range(2, 6))
        with torch.set_grad_enabled(gradient):
            hidden = run_tree(decoder, tree, range(6), attention)
        found[name] = torch.cat([x.flatten() for x in (hidden, *attention.keys.values(), *attention.values.values())]).detach()
        assert len(asked) == 6
    for other in ("library", "asked"):
        assert float((found["written"] - found[other]).norm() / found[other].norm()) < 1e-5


@needs_csrc
def test_values_do_not_depend_on_the_number_of_threads(make_model, tokenizer):
    if not layer._serves(torch.empty(1, 1)):
        pytest.skip("PyTorch's products serve here, whose bits may depend on threads")
    recipe = replace(ROSE, rewordings=0, layers=(1, 2), steps=6, lr=0.1, bystanders=0)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            editor = Editor(make_model(head_dim=32, seed=3, initializer_range=0.2), tokenizer, recipe)
            found.append(editor.apply(LIN, verify=False).values.delta)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_buffers_are_shared_and_grow():
    space = block.Workspace(torch.float32)
    first = space.take(0, "x", 4, 8)
    assert space.take(0, "x", 3, 8).data_ptr() == first.data_ptr() and space.take(1, "x", 4, 8).data_ptr() != first.data_ptr()
    assert space.take(0, "x", 9, 8).shape == (9, 8) and space.take(0, "m", 2, 8, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("speed, wanted", [(1.0, torch.float32), (2.0, torch.bfloat16)])
def test_auto_takes_the_faster_dtype(monkeypatch, speed, wanted):
    monkeypatch.setattr(dtype, "_product_seconds", lambda kind: 1.0 if kind == torch.float32 else 1 / speed)
    assert dtype.dtype_of("auto", "cpu") == wanted
    assert dtype.dtype_of("float16", "cpu") == torch.float16 and dtype.dtype_of(None, "cpu") is None
    with pytest.raises(ValueError, match="float32, bfloat16, float16 or auto"):
        dtype.dtype_of("int8", "cpu")


def test_auto_measures_here():
    assert dtype.faster_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
