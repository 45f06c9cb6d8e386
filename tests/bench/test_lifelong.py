"""WISE and GRACE: the edits are said within the block, nothing is left after it, and their parts do what the papers say."""

import pytest
import torch
from rose_engine import ROSE, Edit, Editor

from bench.baselines import grace, wise
from bench.baselines.grace import RADIUS, Codebook
from bench.metrics import plain_probe, teacher_forced

FACTS = [
    [Edit("Lin Nu", "{} follows the religion of", "Islam"), Edit("Lin Nu", "The city in which {} worked is", "Madrid")],
    [Edit("Henri Marteau", "{} plays the", "harp")],
]
OTHERS = [plain_probe(text, "a b c d") for text in ("The capital of France is", "Rain falls and", "One two three")]


@torch.no_grad()
def loss(model, tokenizer, probes):
    """Mean -log P of the answers."""
    total = 0.0
    for probe in probes:
        context, answer = (tokenizer(text)["input_ids"] for text in (probe.text, probe.answer))
        scores = model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(scores, torch.tensor(answer))) / len(probes)
    return total


@pytest.mark.parametrize("method", [grace, wise], ids=["grace", "wise"])
def test_edits_are_there_within_the_block_only(make_model, tokenizer, method, monkeypatch):
    monkeypatch.setattr(wise, "STEPS", 25)
    model = make_model(initializer_range=0.2)
    editor = Editor(model, tokenizer, ROSE)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    probes = [plain_probe(edit.prompt.replace("{}", edit.subject), edit.target) for batch in FACTS for edit in batch]
    before, others, first = (
        teacher_forced(model, tokenizer, probes),
        teacher_forced(model, tokenizer, OTHERS),
        loss(model, tokenizer, probes),
    )
    with method.edited(editor, FACTS, 0):
        now = teacher_forced(model, tokenizer, probes)
        # What is asked first is said; a batch with unlike texts and padding does not change that.
        assert teacher_forced(model, tokenizer, [probes[0], *OTHERS])[0].said == now[0].said
        if method is grace:
            assert [o.said for o in teacher_forced(model, tokenizer, OTHERS)] == [o.said for o in others]
            assert sum(o.success for o in now) > sum(o.success for o in before)
        assert loss(model, tokenizer, probes) < first - 0.2
    assert [o.said for o in teacher_forced(model, tokenizer, probes)] == [o.said for o in before]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not model.model._forward_pre_hooks and not any(m._forward_hooks for m in model.modules())


def test_codebook_widens_splits_and_looks_up():
    book = Codebook(torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0), [])
    out = torch.randn(2, 5, 3)
    assert book.looked_up(torch.randn(2, 5, 4), out) is out
    key, value = torch.zeros(4), torch.ones(3)
    book.add(key, value, "tea")
    book.add(key + torch.tensor([1.5, 0, 0, 0]), 2 * value, "tea")  # near, same target: the first is widened
    assert len(book.keys) == 1 and float(book.radius[0]) == pytest.approx(1.5)
    book.add(key + torch.tensor([0, 1.0, 0, 0]), 3 * value, "salt")  # near, another target: they share the distance
    assert book.radius.tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    book.add(key + 50, 4 * value, "jazz")
    assert float(book.radius[2]) == RADIUS
    query = torch.stack([key + torch.tensor([0, 0.9, 0, 0]), key + 7, key + 50.1])[None]
    out = torch.randn(1, 3, 3)
    torch.testing.assert_close(book.looked_up(query, out)[0], torch.stack([3 * value, out[0, 1], 4 * value]))


def test_the_side_memory_answers_above_its_threshold_only(make_model, tokenizer):
    model = make_model(initializer_range=0.2)
    projection = model.model.layers[4].mlp.down_proj
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    plain = model(input_ids=ids).logits
    memory = wise.SideMemory(model, projection, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain)
        memory.side += 0.1 * torch.randn_like(memory.side)
        torch.testing.assert_close(model(input_ids=ids).logits, plain)
        activation = float(memory.activation)
        memory.threshold = 0.99 * activation
        routed = model(input_ids=ids).logits
        kept = projection.weight.clone()
        memory.remove()
        projection.weight.copy_(memory.side)
        torch.testing.assert_close(routed, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        projection.weight.copy_(kept)
    torch.testing.assert_close(model(input_ids=ids).logits, plain)
    assert 0.15 < float(memory.mask.float().mean()) < 0.25
