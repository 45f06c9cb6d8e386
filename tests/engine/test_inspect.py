"""What `rose inspect` says of a model, against the model itself and what it runs."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rose_engine import ROSE, Editor
from rose_engine.architecture import UnsupportedModelError, decoder_of
from rose_engine.bystanders import bystander_rows
from rose_engine.cli import app
from rose_engine.edits import group_by_subject
from rose_engine.estimate import BYSTANDER, memory, seconds, shapes_of, typical_work, work_of
from rose_engine.fisher import coordinates
from rose_engine.forward import pack, prepare, suffix_step
from rose_engine.inspect import inspect
from rose_engine.optimize import subject_rows
from rose_engine.packing import build_tree
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from tests.conftest import IMO, LIN, MARTEAU

LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}


# What the command printed, then the most memory that its process had, in KiB.
MEASURED = """
import sys
from rose_engine.cli import main
try:
    main()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_70b_within_a_gigabyte(tmp_path):
    AutoConfig.for_model("llama", **LLAMA_70B).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURED, "inspect", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert int(done.stderr.split()[-1]) < 1_000_000
    assert found["parameters"] == 70_553_706_496 and found["dtype"] == "bfloat16" and found["model_bytes"] == 2 * found["parameters"]
    assert found["weights"] == {f"model.layers.{layer}.mlp.down_proj.weight": [8192, 28672] for layer in ROSE.layers}


def test_what_is_printed(capsys):
    app(["inspect", "smollm2", "--facts", "2"], standalone_mode=False)
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["model.layers.8.mlp.down_proj.weight"].strip() == "576x1536"
    assert lines["memory"].split()[1] == "MB" and "2 fact(s)" in lines["an"] and "optimise" in lines["time"]


def test_the_embedded_model_as_it_is_loaded(smollm2):
    found = inspect("smollm2", facts=3)
    assert found["recipe"] == {**smollm2.recipe.as_dict(), "layers": smollm2.recipe.layers}
    assert found["weights"] == {name: list(w.shape) for name, w in smollm2.weights(smollm2.recipe.layers).items()}
    assert found["parameters"] == sum(p.numel() for p in smollm2.model.parameters())
    assert all(value > 0 for value in found["seconds"].values())


def test_the_products_that_are_counted_are_those_that_run(make_model, tokenizer):
    """Of the library's layers, whose products PyTorch counts: those of prepare, and of a step."""
    model = make_model().requires_grad_(False)
    decoder = decoder_of(model)
    plans = [subject_rows(decoder, tokenizer, subject, ROSE) for subject in group_by_subject(MARTEAU)]
    rows = [row for plan in plans for row in (*plan.facts, plan.neutral)]
    recipe = Editor(model, tokenizer).recipe
    recipe = type(recipe)(layers=(1, 2), steps=1)
    work = work_of(plans)
    predicted = seconds(shapes_of(decoder), work, recipe, lambda tokens: 2 * tokens)

    def products(run):
        with FlopCounterMode(display=False) as counter:
            result = run()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)), result

    count, prepared = products(lambda: prepare(decoder, rows, 2))
    reading = 2 * model.lm_head.weight.numel()  # one token's logits
    assert predicted["prepare"] == pytest.approx(count - reading, rel=0.03)
    batch = pack(prepared, range(len(rows)))
    count, _ = products(lambda: suffix_step(batch, torch.zeros(1, 32), torch.zeros(len(rows), dtype=torch.long)))
    (whole,) = work.batches
    hidden = 2 * reading * (whole.read - 1)  # those of the targets are an operator of our own; the neutral row's are counted
    assert predicted["optimise"] - hidden == pytest.approx(count, rel=0.06)


def test_average_texts_are_near_real_ones(tokenizer, make_model):
    decoder = decoder_of(make_model(max_position_embeddings=2048))
    plans = [subject_rows(decoder, tokenizer, subject, ROSE) for subject in group_by_subject((*IMO, *LIN, *MARTEAU))]
    real, average, shapes = work_of(plans), typical_work(3, 2, 8), shapes_of(decoder)
    recipe = type(ROSE)(layers=(1, 2), fisher=3.0, waypoints=0)  # what is protected is widened on the CPU alone
    assert memory(shapes, real, replace(recipe, waypoints=20))["total"] > memory(shapes, real, recipe)["total"]
    assert memory(shapes, average, recipe)["total"] == pytest.approx(memory(shapes, real, recipe)["total"], rel=0.5)
    on_gpu = memory(shapes, real, recipe, "cuda")  # `revert` keeps its copies with the host, and coordinates are float32
    on_cpu = memory(shapes, real, recipe)
    assert on_gpu["total"] == on_cpu["total"] - on_gpu["base"] - on_gpu["coordinates"] > 0
    assert on_cpu["coordinates"] == 2 * on_gpu["coordinates"] == coordinates(torch.eye(shapes.d, dtype=torch.float64), 3.0).nbytes
    once = lambda work: sum(seconds(shapes, work, recipe, lambda tokens: tokens).values())  # noqa: E731
    assert once(average) == pytest.approx(once(real), rel=0.5)


def test_what_cannot_be_edited(tmp_path):
    AutoConfig.for_model("mixtral").save_pretrained(tmp_path / "mixture")
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        inspect(tmp_path / "mixture")
    AutoConfig.for_model("llama", **{**LLAMA_70B, "num_hidden_layers": 6}).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="layer 8 cannot be edited: the model has 6 layers"):
        inspect(tmp_path / "small", recipe=ROSE)
    with pytest.raises(ValueError, match="Unrecognized model"):
        inspect(tmp_path)


@pytest.mark.parametrize(("count", "layers"), [(2, (0,)), (6, (0, 1)), (12, (1, 2, 3)), (28, ROSE.layers), (32, ROSE.layers)])
def test_the_layers_that_are_edited_follow_the_depth(tmp_path, count, layers):
    AutoConfig.for_model("llama", **{**LLAMA_70B, "num_hidden_layers": count}).save_pretrained(tmp_path)
    assert inspect(tmp_path)["recipe"]["layers"] == layers


def test_bystanders_are_counted(make_model, tokenizer):
    rows = bystander_rows(IMO, tokenizer, 120)
    assert len(build_tree([row.tokens for row in rows]).token) == pytest.approx(len(rows) * BYSTANDER, rel=0.3)
    shapes, work = shapes_of(decoder_of(make_model())), typical_work(1, 2, 10)
    none, some = (memory(shapes, work, replace(ROSE, layers=(1, 2), bystanders=n))["weights"] for n in (0, len(rows)))
    assert some > none + 2 * 4 * len(rows) * BYSTANDER * shapes.d_in  # their keys, as they join and joined
