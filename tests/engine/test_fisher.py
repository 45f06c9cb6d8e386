"""Fisher information against autograd through the whole model, what it foretells, and the coordinates that are made of it."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rose_engine import ROSE, Editor, forward
from rose_engine.architecture import decoder_of
from rose_engine.fisher import GRAIN, coordinates, fisher_information
from rose_engine.statements import STATEMENTS

from rose_kernels import native
from tests.conftest import IMO, LIN
from tests.engine.naive import WIDTH, in_float64

LAYERS = (1, 3, 4)
TEXTS = ("Emmy Noether was a professor at", "The capital of Eritrea is", "Hindi is spoken in")


@pytest.fixture
def texts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def run(model, text, layer, added):
    """Log-probabilities [V] after a text, with `added` [text, d] on the hidden states after a layer."""
    hook = decoder_of(model).layers[layer].register_forward_hook(lambda m, a, out: out + F.pad(added, (0, 0, 0, WIDTH - len(text))))
    try:
        padded = F.pad(torch.tensor(text), (0, WIDTH - len(text)))
        return model(input_ids=padded[None]).logits[0, len(text) - 1].log_softmax(-1)
    finally:
        hook.remove()


# A width of 64 is written out (`block`), one of 40 is the library's.
@pytest.mark.parametrize(("kind", "width"), [("llama", 64), ("qwen3", 64), ("llama", 40), ("gpt_neox", 64)])
def test_it_is_the_sum_of_squared_gradients(make_model, tokenizer, texts, monkeypatch, kind, width):
    shape = {"hidden_size": width, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32 if width == 64 else 20}
    model = make_model(kind, seed=4, initializer_range=0.2, **shape).requires_grad_(False)
    decoder = decoder_of(model)
    monkeypatch.setattr(forward, "drawn", lambda logits, generator: logits.argmax(-1))
    ours = fisher_information(decoder, texts, LAYERS)
    plain = in_float64(model) if kind != "gpt_neox" else model
    wanted = torch.zeros(width, width, dtype=torch.float64)
    for text in texts:
        for layer in LAYERS:
            added = torch.zeros(len(text), width, dtype=next(plain.parameters()).dtype, requires_grad=True)
            (grad,) = torch.autograd.grad(run(plain, text, layer, added).max(), added)
            wanted += grad.double().T @ grad.double()
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    written = "cpu" in native.served() and (kind, width) in (("llama", 64), ("qwen3", 64))
    assert (forward.blocks_of(decoder, range(2, 6)) is not None) == written


@pytest.mark.parametrize(("width", "dtype"), [(32, torch.float32), (64, torch.float32), (64, torch.bfloat16)])
def test_answers_are_drawn_as_the_model_gives_them(make_model, texts, monkeypatch, width, dtype):
    """The distribution that is drawn from, and how often its likeliest tokens come; at a width of 64 by `block`."""
    shape = {"hidden_size": width, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    model, asked = make_model(seed=2, initializer_range=0.2, **shape).to(dtype), []
    real = forward.drawn
    monkeypatch.setattr(forward, "drawn", lambda logits, generator: asked.append(logits.detach().clone()) or real(logits, generator))
    fisher_information(decoder_of(model), texts[:1], LAYERS)
    with torch.no_grad():
        wanted = model.float()(input_ids=torch.tensor(texts[:1])).logits[0, -1:].log_softmax(-1)
    near = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(asked[0].float().log_softmax(-1), wanted, rtol=near, atol=near)
    probability = torch.tensor([0.5, 0.3, 0.2])
    said = real(probability.log().expand(4000, 3), torch.Generator().manual_seed(1)).bincount(minlength=3) / 4000
    torch.testing.assert_close(said, probability, rtol=0, atol=0.04)


def test_it_foretells_what_a_small_change_does(make_model, texts):
    """KL of the answers before and after a small delta at one token after another, against delta^T F delta / 2."""
    model = make_model(seed=3, initializer_range=0.4).requires_grad_(False)
    decoder, text, layer = decoder_of(model), texts[0], 2
    F_ = fisher_information(decoder, [text] * 1500, (layer,)) / 1500
    exact, delta = in_float64(model), 1e-3 * torch.randn(32, dtype=torch.float64)
    before = run(exact, text, layer, torch.zeros(len(text), 32, dtype=torch.float64))
    kl = 0.0
    for t in range(len(text)):
        added = torch.zeros(len(text), 32, dtype=torch.float64)
        added[t] = delta
        kl += float((before.exp() * (before - run(exact, text, layer, added))).sum())
    assert kl == pytest.approx(float(delta @ F_ @ delta) / 2, rel=0.2)


@pytest.mark.parametrize("weight", [0.5, 20.0])
def test_coordinates_are_the_inverse_square_root(weight):
    draws = torch.randn(200, 40, dtype=torch.float64) * torch.logspace(0, -3, 40, dtype=torch.float64)
    T = coordinates(draws.T @ draws, weight)
    assert torch.equal(T, T.T) and torch.equal((T / GRAIN).round() * GRAIN, T)
    metric = torch.eye(40, dtype=torch.float64) + weight * 40 * draws.T @ draws / float((draws**2).sum())
    wanted = torch.linalg.inv(metric)
    torch.testing.assert_close(T @ T, wanted * 40 / wanted.trace(), rtol=1e-3, atol=1e-3)


def test_coordinates_of_nothing_and_of_no_numbers():
    assert torch.equal(coordinates(torch.zeros(8, 8, dtype=torch.float64), 3.0), torch.eye(8, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="float32 or bfloat16"):
        coordinates(torch.full((8, 8), torch.nan, dtype=torch.float64), 3.0)
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="fisher must"):
            replace(ROSE, fisher=weight)


def test_answers_stand_after_the_text_alone(make_model, tokenizer, monkeypatch):
    """A tokenizer that ends every text."""
    given = []
    monkeypatch.setattr("rose_engine.readings.fisher_information", lambda d, texts, *a: given.extend(texts) or torch.eye(32).double())
    editor = Editor(make_model(), tokenizer, replace(ROSE, fisher=1.0, layers=(1, 2)))
    ending = lambda text: {"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]}  # noqa: E731
    monkeypatch.setattr(editor._readings, "_tokenizer", mock.Mock(side_effect=ending, all_special_ids=[tokenizer.eos_token_id]))
    editor.prepare()
    assert given == [tokenizer(text)["input_ids"] for text in STATEMENTS]


def test_they_are_read_once_off_the_unedited_model(make_model, tokenizer, monkeypatch):
    recipe = replace(ROSE, rewordings=0, bystanders=0, fisher=3.0, layers=(1, 2), steps=3, lr=0.1)
    read = []
    real = fisher_information
    monkeypatch.setattr("rose_engine.readings.fisher_information", lambda *a: read.append(a[2:]) or real(*a))
    edited, fresh = (Editor(make_model(initializer_range=0.2), tokenizer, recipe) for _ in range(2))
    edited.apply(IMO, recipe=replace(recipe, fisher=0.0), verify=False)
    assert read == []
    plain = edited.apply(LIN, recipe=replace(recipe, fisher=0.0), verify=False)
    edited.revert(plain)
    edited.revert(edited.apply(LIN, verify=False, values=plain.values))  # values that are there already
    assert read == []
    edited.apply(LIN, verify=False)
    assert read == [((1, 2), 0)]
    edited.apply(LIN, verify=False)
    assert len(read) == 1
    assert torch.equal(edited._readings.coordinates(recipe).T, fresh._readings.coordinates(recipe).T)
    with fresh.preview(LIN, verify=False) as scaled:  # a value found in them is another
        pass
    with fresh.preview(LIN, recipe=replace(recipe, fisher=0.0), verify=False) as plain:
        pass
    assert (scaled.values.delta - plain.values.delta).norm() > 0.05 * plain.values.delta.norm()
