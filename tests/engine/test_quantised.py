"""Quantised bases on the CPU, by bitsandbytes: the edit stands beside them, and can be had on the full-precision model."""

import logging
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from rose_engine import ROSE, Delta, Editor
from rose_engine.architecture import UnsupportedModelError, decoder_of
from rose_engine.branch import Branch, check_gradient, pass_gradients
from rose_engine.delta import DeltaError
from rose_engine.export import adopted, check_base, export_checkpoint, export_peft
from rose_engine.forms import STATEMENT, row_of
from rose_engine.forward import pack, prepare, suffix_step
from rose_engine.inspect import inspect
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import IMO, LIN, MARTEAU

pytest.importorskip("bitsandbytes")
RECIPE = replace(ROSE, rewordings=0, bystanders=3, layers=(1, 2), steps=10, lr=0.2, forms=4, noise=0.0)
BITS = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@pytest.fixture
def folder(make_model, tokenizer, tmp_path):
    make_model(hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=list(BITS))
def load(request, folder):
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS[request.param], device_map="cpu")


def logits(model, tokenizer):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer("Lin Nu follows the religion of")["input_ids"]])).logits


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}


def test_an_edit_beside_quantised_weights(load, tokenizer, tmp_path):
    model, losses = load(), []
    kept, editor = state(model), Editor(model, tokenizer, RECIPE)
    before = logits(model, tokenizer)
    first = editor.apply((*IMO, *LIN), progress=lambda *told: losses.append(told[-1]))
    assert losses[-1] < losses[0] and isinstance(editor.weights()["model.layers.2.mlp.down_proj.weight"], Branch)
    second = editor.apply(MARTEAU)
    edited = logits(model, tokenizer)
    assert not torch.equal(edited, before) and all(torch.equal(x, kept[name]) for name, x in state(model).items())
    first.delta.save(tmp_path / "1.safetensors")
    second.delta.save(tmp_path / "2.safetensors")
    with pytest.raises(RuntimeError, match="stop"), editor.preview(LIN):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, tokenizer), edited)
    editor.restore([])
    assert torch.equal(logits(model, tokenizer), before)

    deltas = [Delta.load(tmp_path / f"{i}.safetensors") for i in (1, 2)]
    export_peft(deltas, tmp_path / "peft", base="tiny")
    again = load()
    pass_gradients(again)  # or its 4-bit products would be in bfloat16 on some machines
    served = PeftModel.from_pretrained(again, tmp_path / "peft")
    torch.testing.assert_close(logits(served, tokenizer), edited, rtol=1e-3, atol=1e-3)
    twin = Editor(load(), tokenizer, RECIPE)
    for delta in deltas:
        twin.load(delta)
    torch.testing.assert_close(logits(twin.model, tokenizer), edited, rtol=0, atol=0)


def test_a_step_through_quantised_layers(load, tokenizer):
    """Against finite differences of its own loss, after an answer, before which some machines pack 4-bit weights anew."""
    model = load()
    decoder = Editor(model, tokenizer, RECIPE).decoder
    logits(model, tokenizer)
    row = row_of(LIN[0], STATEMENT, tokenizer)
    batch = pack(prepare(decoder, [row], 2), [0])
    at = 0.3 * torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    one, step = torch.zeros(1, dtype=torch.long), suffix_step(batch, at, torch.zeros(1, dtype=torch.long))
    way = step.grad / step.grad.norm()
    four = model.config.quantization_config.load_in_4bit
    h = 0.05 if four else 0.5  # what goes into an 8-bit product is rounded to 8 bits, and so the loss is one of small steps
    there, back = (float(suffix_step(batch, at + sign * h * way, one).loss) for sign in (1, -1))
    assert (there - back) / (2 * h) == pytest.approx(float(step.grad.norm()), rel=0.05 if four else 0.3)


def test_weights_that_were_packed_for_inference(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS["4 bits"], device_map="cpu")
    logits(model, tokenizer)
    if not getattr(model.model.layers[0].mlp.down_proj.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this machine does not pack them")
    with pytest.raises(ValueError, match="load the model again and make the editor before it answers"):
        Editor(model, tokenizer, RECIPE)


def test_a_projection_without_a_gradient_is_told():
    class Packed(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="no gradient passes through Packed"):
        check_gradient(Packed(8, 4), torch.float32)
    check_gradient(torch.nn.Linear(8, 4), torch.float32)


def test_the_write_meets_what_it_was_asked_for(load, tokenizer):
    """Against the same system in float64, from the keys and factors of the delta."""
    editor = Editor(load(), tokenizer, replace(RECIPE, ridge=2.0, bystanders=0))
    delta = editor.apply((*IMO, *LIN), verify=False).delta
    for name, (U, V) in delta.factors.items():
        K = delta.keys[name].double()
        exact = U.double() @ torch.linalg.inv(2.0 * torch.eye(K.shape[1], dtype=torch.float64) + K.T @ K) @ K.T
        torch.testing.assert_close(U.double() @ V.double(), exact, rtol=1e-4, atol=1e-6)


def test_the_edit_on_the_full_precision_model(load, folder, tokenizer, tmp_path):
    delta = Editor(load(), tokenizer, RECIPE).apply(LIN, verify=False).delta
    with pytest.raises(DeltaError, match="was quantised when the edit was made"):
        export_checkpoint(folder, [delta], tmp_path / "no")
    export_checkpoint(folder, adopted(folder, [delta]), tmp_path / "edited")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    editor = Editor(whole, tokenizer, RECIPE)
    editor.restore(editor.adopt([delta]))
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert all(torch.equal(x, shipped.state_dict()[name]) for name, x in whole.state_dict().items())
    with pytest.raises(DeltaError, match="no weight"):
        delta.metadata["base"][0]["name"] = "model.layers.9.mlp.down_proj.weight"
        editor.adopt([delta])


def test_a_quantised_checkpoint_and_its_adapter(load, tokenizer, tmp_path):
    """What was saved quantised is loaded so, told by `inspect`, and known as the base of its edits."""
    model = load()
    Editor(model, tokenizer)  # or an answer might pack the weights
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    editor = Editor.from_pretrained(str(tmp_path / "small"), recipe=RECIPE)
    delta = editor.apply(LIN, verify=False).delta
    check_base(tmp_path / "small", [delta])
    with pytest.raises(DeltaError, match="ship an adapter"):
        export_checkpoint(tmp_path / "small", [delta], tmp_path / "no")
    found = inspect(tmp_path / "small", recipe=RECIPE)
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert found["bits"] in (4, 8) and found["model_bytes"] == pytest.approx(size, rel=0.05)
    delta.metadata["base"][0]["sha256"] = "0" * 64
    with pytest.raises(DeltaError, match="quantised otherwise"):
        check_base(tmp_path / "small", [delta])


def test_a_second_editor_does_not_take_edits_for_the_base(load, tokenizer):
    model = load()
    editor = Editor(model, tokenizer, RECIPE)
    result = editor.apply(LIN, verify=False)
    with pytest.raises(ValueError, match="edits of another editor"):
        Editor(model, tokenizer, RECIPE).apply(MARTEAU)
    editor.revert(result)
    Editor(model, tokenizer, RECIPE).apply(MARTEAU, verify=False)


def test_a_delta_on_top_of_others_is_not_adopted_alone(folder, tokenizer):
    editor = Editor(AutoModelForCausalLM.from_pretrained(folder), tokenizer, RECIPE)
    editor.apply(LIN, verify=False)
    second = editor.apply(MARTEAU).delta
    with pytest.raises(DeltaError, match="on top of 1 other edits"):
        adopted(folder, [second])
    first, again = adopted(folder, editor.applied)
    assert again.metadata["below"] == 1 and again.metadata["report"] is None and first.metadata["parent"] is None


def test_other_quantisers_are_refused(make_model):
    model = make_model()
    model.is_quantized = True
    model.config.quantization_config = BITS["4 bits"].__class__()
    model.config.quantization_config.quant_method = "gptq"
    with pytest.raises(UnsupportedModelError, match="quantised by gptq"):
        decoder_of(model)
