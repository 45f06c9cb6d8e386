"""Every family on a tiny random model: the engine's step against whole forward passes, writing, taking back, shipping."""

import copy
from dataclasses import replace

import accelerate
import pytest
import torch
from peft import PeftModel
from rose_engine import ROSE, Delta, Editor
from rose_engine.architecture import FAMILIES, UnsupportedModelError, decoder_of
from rose_engine.delta import DeltaError
from rose_engine.edits import group_by_subject
from rose_engine.export import export_checkpoint, export_peft
from rose_engine.forms import STATEMENT, row_of
from rose_engine.forward import pack, prepare, suffix_nll, suffix_step
from rose_engine.optimize import subject_rows
from rose_engine.verify import read_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import IMO, LIN, MARTEAU
from tests.engine.naive import naive_row, run, unedited_prediction

RECIPE = replace(ROSE, rewordings=0, bystanders=0, layers=(1, 2), steps=15, lr=0.2)

# What each family is known for, switched on; everything else as its configuration has it.
EXTRA = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 128, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 128, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 32, "n_inner": 64, "n_layer": 6, "n_head": 4, "n_positions": 512, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 128},
    "olmo": {"clip_qkv": 0.5},
    "phi3": {"sliding_window": 128},
    "qwen2": {"use_sliding_window": False},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    "starcoder2": {"use_bias": True},
}


@pytest.fixture(params=sorted(FAMILIES))
def model(request, make_model):
    return make_model(request.param, initializer_range=0.2, pad_token_id=0, **EXTRA.get(request.param, {}))


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_step_is_that_of_whole_forward_passes(model, tokenizer):
    decoder = decoder_of(model.requires_grad_(False))
    plans = [subject_rows(decoder, tokenizer, s, RECIPE) for s in group_by_subject((*MARTEAU, *LIN))]
    rows = [row for plan in plans for row in plan.facts] + [plan.neutral for plan in plans]
    owner = torch.tensor([s for s, plan in enumerate(plans) for _ in plan.facts] + [0, 1])
    prepared = prepare(decoder, rows, 2)
    batch = pack(prepared, range(len(rows)))
    delta = 0.3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    step = suffix_step(batch, delta, owner)
    for r, row in enumerate(rows):
        reference = None if row.target < len(row.tokens) else unedited_prediction(model, row)
        loss, grad = naive_row(model, row, 2, delta[owner[r]], reference)
        torch.testing.assert_close(step.loss[r], loss, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(step.grad[r], grad, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(suffix_nll(batch, delta, owner), step.nll, rtol=1e-5, atol=1e-6)


def test_reading_is_that_of_whole_forward_passes(model, tokenizer):
    decoder = decoder_of(model)
    rows = [row_of(edit, STATEMENT, tokenizer) for edit in IMO]
    for row, reading in zip(rows, read_rows(decoder, tokenizer, rows), strict=True):
        with torch.no_grad():
            scores = run(model, row).log_softmax(-1)
        places = torch.arange(row.target, len(row.tokens))
        chosen = scores[places - 1, torch.tensor(row.tokens)[places]].sum().exp().item()
        assert reading.probability == pytest.approx(chosen, rel=1e-3)


def test_edit_revert_load_and_ship(model, tokenizer, tmp_path):
    base, twin = bits(model), copy.deepcopy(model)
    editor, losses = Editor(model, tokenizer, replace(RECIPE, noise=0.0, bystanders=3)), []
    result = editor.apply((*IMO, *LIN), progress=lambda *told: losses.append(told[-1]))
    assert losses[-1] < losses[0]
    edited = bits(model)
    changed = {name for name in base if not torch.equal(base[name], edited[name])}
    assert changed == set(result.delta.factors) == {editor.decoder.weight_name(layer) for layer in (1, 2)}
    result.delta.save(tmp_path / "d.safetensors")
    editor.revert(result)
    assert all(torch.equal(base[name], weight) for name, weight in bits(model).items())
    delta = Delta.load(tmp_path / "d.safetensors")
    editor.load(delta)
    assert all(torch.equal(edited[name], weight) for name, weight in bits(model).items())

    export_peft([delta], tmp_path / "peft", base="tiny")
    ids = torch.tensor([tokenizer("Lin Nu follows the religion of")["input_ids"]])
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, PeftModel.from_pretrained(twin, tmp_path / "peft")(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_transposed_weight_in_a_checkpoint(make_model, tokenizer, tmp_path):
    """GPT-2 stores its projections as [d_in, d_out]; a delta speaks of them as [d_out, d_in]."""
    model = make_model("gpt2", initializer_range=0.2, **EXTRA["gpt2"])
    model.save_pretrained(tmp_path / "base")
    delta = Editor(model, tokenizer, RECIPE).apply(IMO, verify=False).delta
    assert list(delta.factors["transformer.h.2.mlp.c_proj.weight"][0].shape) == [32, 24]
    export_checkpoint(tmp_path / "base", [delta], tmp_path / "edited")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    with pytest.raises(DeltaError, match="another base"):
        export_checkpoint(tmp_path / "edited", [delta], tmp_path / "twice")


def test_the_write_moves_the_residual_stream_to_the_value(model, tokenizer):
    """With next to no ridge a fact meets its value where no norm stands behind the projection; with one it goes there."""
    editor = Editor(model, tokenizer, replace(RECIPE, steps=3, forms=1, ridge=1e-4))
    row = row_of(MARTEAU[0], STATEMENT, tokenizer)

    def hidden():
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row.tokens]), output_hidden_states=True)
        return out.hidden_states[3][0, row.last]

    before = hidden()
    result = editor.apply(MARTEAU, verify=False)
    wanted = result.values.delta[0]
    moved = hidden() - before
    left = (moved - wanted).norm() / wanted.norm()
    assert left < (0.02 if editor.decoder.family.post_norm is None else 0.6)


def test_local_and_global_rotations_differ(make_model, tokenizer):
    model = make_model("gemma3_text", initializer_range=0.2, pad_token_id=0, **EXTRA["gemma3_text"])
    turned = decoder_of(model).rotations(torch.zeros(1, 5, 32), torch.arange(5)[None])
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    local, whole = (model.config.layer_types.index(kind) for kind in ("sliding_attention", "full_attention"))
    assert not torch.equal(turned(local)[0], turned(whole)[0])


def test_a_row_longer_than_the_window_is_refused(make_model, tokenizer):
    editor = Editor(make_model("mistral", sliding_window=12), tokenizer, RECIPE)
    with pytest.raises(ValueError, match=r"tokens long in form .* the model takes 12"):
        editor.apply(IMO)


def test_offloaded_weights_are_refused(make_model, tokenizer):
    model = accelerate.cpu_offload(make_model(), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="some weights are offloaded"):
        Editor(model, tokenizer, RECIPE)


def test_a_tokenizer_that_adds_bos(make_model, tokenizer):
    """And pads on the left. Its first token is the same in every plain row, and in no chat row twice."""
    with_bos = copy.deepcopy(tokenizer)
    with_bos.padding_side = "left"
    bos = with_bos.bos_token
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, with_bos.bos_token_id)])
    model = make_model(initializer_range=0.2)
    decoder = decoder_of(model.requires_grad_(False))
    plan = subject_rows(decoder, with_bos, group_by_subject(LIN)[0], RECIPE)
    assert all(row.tokens[0] == with_bos.bos_token_id for row in plan.facts)
    row = plan.facts[0]
    assert row.tokens.count(with_bos.bos_token_id) == 1 and with_bos.decode(row.tokens[row.last]).strip() == "Nu"
    loss, _ = naive_row(model, row, 2, torch.zeros(32))
    none = torch.zeros(1, 32)
    step = suffix_step(pack(prepare(decoder, [row], 2), [0]), none, torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(step.loss[0], loss, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("t5", "an encoder and a decoder"),
        ("gemma3", "wraps a language model"),
        ("gptj", "its attention cannot be exchanged"),
    ],
)
def test_what_is_refused_says_why(kind, reason):
    class Model:
        config = AutoConfig.for_model(kind)

    with pytest.raises(UnsupportedModelError, match=reason):
        decoder_of(Model())
