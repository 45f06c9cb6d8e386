"""The suffix engine equals whole rows through the whole model: loss and gradient of every row, every form."""

import pytest
import torch
from rose_engine import attention
from rose_engine.architecture import UnsupportedModelError, decoder_of
from rose_engine.edits import group_by_subject
from rose_engine.forward import logits, pack, prepare, run_tree, suffix_step, tree_on
from rose_engine.optimize import subject_rows
from rose_engine.packing import split_rows
from rose_engine.recipe import ROSE

from rose_kernels import native
from tests.conftest import IMO, LIN, MARTEAU
from tests.engine.naive import in_float64, naive_row, unedited_prediction


def relative(ours, wanted) -> float:
    return float((ours - wanted).norm() / wanted.norm())


def check_against_naive(
    model, tokenizer, layer: int, scale: float, budget: int, loss_bound: float, grad_bound: float, written: bool = False
) -> None:
    """Loss and row gradients of every form, three subjects with different numbers of facts."""
    decoder = decoder_of(model.requires_grad_(False))
    subjects = [subject_rows(decoder, tokenizer, s, ROSE) for s in group_by_subject((*IMO, *MARTEAU, *LIN))]
    assert [len(s.relations) for s in subjects] == [3, 1, 2]
    rows = [row for s in subjects for row in (*s.facts, s.neutral)]
    owner = torch.tensor([i for i, s in enumerate(subjects) for _ in (*s.facts, s.neutral)])
    prepared = prepare(decoder, rows, layer)
    assert (prepared.blocks is not None) == (written and "cpu" in native.served())
    delta = scale * torch.randn(3, decoder.embedding.embedding_dim, dtype=decoder.head.dtype)
    loss, grad = delta.new_zeros(len(rows)), delta.new_zeros(len(rows), delta.shape[1])
    for batch in (pack(prepared, index) for index in split_rows(rows, range(len(rows)), budget)):
        index = batch.suffixes.row
        step = suffix_step(batch, delta, owner[index])
        loss[index], grad[index] = step.loss, step.grad

    forms: dict[str, list[int]] = {}
    for r, row in enumerate(rows):
        first = owner.tolist().index(owner[r])
        forms.setdefault("neutral" if row.target == len(row.tokens) else f"form {(r - first) % ROSE.forms}", []).append(r)
    assert len(forms) == ROSE.forms + 1
    for name, members in forms.items():
        references = [unedited_prediction(model, rows[r]) if name == "neutral" else None for r in members]
        wanted = [naive_row(model, rows[r], layer, delta[owner[r]], ref) for r, ref in zip(members, references, strict=True)]
        # A KL is a difference of logarithms over the whole vocabulary, so that its rounding is ten times coarser.
        coarser = 10 if name == "neutral" else 1
        assert relative(loss[members], torch.stack([w[0] for w in wanted])) < coarser * loss_bound, name
        assert relative(grad[members], torch.stack([w[1] for w in wanted])) < coarser * grad_bound, name


def test_suffix_engine_on_the_embedded_model(smollm2):
    """In float32, where the plain computation itself is 1e-5 to 3e-5 off its float64 value in the gradient."""
    torch.manual_seed(1)
    check_against_naive(smollm2.model, smollm2.tokenizer, layer=8, scale=3.0, budget=200, loss_bound=1e-5, grad_bound=3e-5, written=True)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])  # those that `block` writes out; the others: test_families
@pytest.mark.parametrize("budget", [1, 10**6])
def test_suffix_engine_on_tiny_models(make_model, tokenizer, monkeypatch, kind, budget):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)  # the prefixes are a part of a tree, asked in many blocks
    check_against_naive(make_model(kind), tokenizer, layer=2, scale=0.5, budget=budget, loss_bound=1e-5, grad_bound=3e-5)
    wide = make_model(kind, head_dim=32)  # two whole vectors, so that the layers are those written out in `block`
    check_against_naive(wide, tokenizer, layer=2, scale=0.5, budget=budget, loss_bound=1e-5, grad_bound=3e-5, written=True)
    model = in_float64(make_model(kind))
    check_against_naive(model, tokenizer, layer=2, scale=0.5, budget=budget, loss_bound=1e-10, grad_bound=1e-10)


@pytest.mark.parametrize("block", [1, 3, 256])
def test_tree_run_is_the_model(make_model, tokenizer, monkeypatch, block):
    """A prefix tree over texts that share beginnings gives each text the model's own logits, however many nodes ask at one time."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    model = make_model("qwen3", seed=3)
    decoder = decoder_of(model.requires_grad_(False))
    texts = ["The capital of France is Paris", "The capital of France", "The river", "Other words altogether"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    tree = tree_on(rows, torch.device("cpu"))
    top = run_tree(decoder, tree, range(len(decoder.layers)))
    for row, path in zip(rows, tree.path, strict=True):
        torch.testing.assert_close(logits(decoder, top[list(path)]), model(input_ids=torch.tensor([row])).logits[0], rtol=1e-5, atol=1e-5)


def test_the_model_keeps_its_own_attention(make_model, tokenizer):
    model = make_model()
    before = model.config._attn_implementation
    run_tree(decoder_of(model), tree_on([[1, 2, 3]], torch.device("cpu")), range(2))
    assert model.config._attn_implementation == before


def test_unsupported_models_are_refused(tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("opt", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, word_embed_proj_dim=16)
    with pytest.raises(UnsupportedModelError, match="opt"):
        decoder_of(AutoModelForCausalLM.from_config(config))
