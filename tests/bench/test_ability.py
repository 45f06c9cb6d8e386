"""General ability, case studies and the harness's hook."""

import json
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rose_engine import ROSE, Editor

from bench import case_studies, harness
from bench.ability import TEXTS, ability, fluency, predictions
from bench.methods import methods_of
from bench.metrics import contains


@torch.no_grad()
def test_perplexity_and_drift_are_the_models(make_model, tokenizer):
    model = make_model(initializer_range=0.2)
    unedited, _ = predictions(model, tokenizer)
    same = ability(model, tokenizer, unedited)
    nll = [
        model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        for ids in (tokenizer(t, return_tensors="pt")["input_ids"] for t in TEXTS)
    ]
    tokens = sum(len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
    assert same["perplexity"] == pytest.approx(math.exp(float(sum(nll)) / tokens), rel=1e-4) and same["kl_neutral"] == pytest.approx(
        0, abs=1e-6
    )
    model.model.layers[2].mlp.down_proj.weight += 0.3 * torch.randn_like(model.model.layers[2].mlp.down_proj.weight)
    now = predictions(model, tokenizer)[0]
    wanted = torch.nn.functional.kl_div(now, unedited, log_target=True, reduction="none").sum(-1).mean()
    assert ability(model, tokenizer, unedited)["kl_neutral"] == pytest.approx(float(wanted), rel=1e-4) and float(wanted) > 1e-3
    model.model.layers[2].mlp.down_proj.weight += torch.nan
    assert math.isnan(ability(model, tokenizer, unedited)["kl_neutral"])  # a broken model does not look untouched


def test_fluency_falls_where_a_text_repeats_itself():
    words = [f"w{i}" for i in range(32)]
    assert fluency([" ".join(words)]) == pytest.approx((2 / 3 * math.log2(31) + 4 / 3 * math.log2(30)) / 2)
    assert fluency(["again and again " * 10]) < 2 < fluency([" ".join(words)])
    assert fluency(["one"]) == 0.0


@pytest.mark.parametrize("name", list(case_studies.STUDIES))
def test_case_studies_tell_before_and_after(make_model, tokenizer, name):
    editor = Editor(make_model(initializer_range=0.2), tokenizer, replace(ROSE, layers=(1, 2), forms=2, steps=2))
    weights = [w.clone() for w in editor.weights().values()]
    asked = case_studies.study(editor, name, methods_of("vanilla,rose", editor))
    assert all(q["after"]["vanilla"]["said"] == q["before"] for q in asked)
    for q in asked:
        for after in q["after"].values():
            assert after["right"] == (contains(after["said"], q["wanted"]) if q["wanted"] else after["said"] == q["before"])
    text = case_studies.text_of({name: asked})
    assert all(q["ask"] in text for q in asked) and "must stay" in text
    assert all(torch.equal(a, b) for a, b in zip(weights, editor.weights().values(), strict=True))


def test_harness_compares_base_and_edited(tmp_path, monkeypatch, capsys):
    """What is handed to lm-evaluation-harness, and what becomes of its answer; the harness itself is stood in for."""
    seen = []

    def simple_evaluate(**options):
        seen.append(options)
        return {"results": {task: {"alias": task, "acc,none": 0.5 + 0.1 * len(seen)} for task in options["tasks"]}}

    fake, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    fake.simple_evaluate, tasks.TaskManager = simple_evaluate, lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    for name in ("base", "edited"):
        (tmp_path / name).mkdir()
    arguments = ["--base", str(tmp_path / "base"), "--edited", str(tmp_path / "edited"), "--tasks", "a,b", "--limit", "5", "--json", "-"]
    assert harness.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["base"]["a"] == {"acc,none": 0.6} and result["edited"]["b"] == {"acc,none": 0.7}
    assert [f"pretrained={tmp_path / name}," in options["model_args"] for name, options in zip(("base", "edited"), seen, strict=True)] == [
        True
    ] * 2
    assert all(options["tasks"] == ["a", "b"] and options["limit"] == 5 for options in seen)
