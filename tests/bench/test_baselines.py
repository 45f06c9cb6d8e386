"""The baselines: the plain RoSE reaches what the engine reaches, MEMIT-Merge writes its equation, and the speed benchmark runs them all."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rose_engine import ROSE
from rose_engine.editor import Editor

from bench.baselines import memit_merge, rose_naive
from bench.baselines.plain import read
from bench.speed import facts_of
from tests.conftest import IMO

LAYERS = (1, 2, 4)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "down_proj" in n}


def test_plain_rose_and_the_engine_agree(make_model, tokenizer):
    """Two programs, one method: after six steps the losses and the changed weights are the same to float32's rounding."""
    model = make_model(seed=3, initializer_range=0.2)
    plain = copy.deepcopy(model)
    recipe = replace(ROSE, rewordings=0, bystanders=0, waypoints=0, steps=6, lr=0.05, stop_loss=0.0, layers=LAYERS)
    before = weights(model)
    result = Editor(model, tokenizer).apply(IMO, recipe=recipe, verify=False)
    done = rose_naive.edit(plain, tokenizer, IMO, recipe)
    assert done.values[0].steps == 6 and done.values[0].loss == pytest.approx(result.loss[0], rel=1e-3)
    for name, weight in weights(plain).items():
        ours = dict(model.named_parameters())[name] - before[name]
        theirs = weight - before[name]
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
        assert bool(theirs.any()) == (int(name.split(".")[2]) in LAYERS)


def test_memit_merge_writes_its_equation(make_model, tokenizer):
    """One layer: dW K = R (I + K^T (lambda C)^-1 K)^-1 K^T (lambda C)^-1 K, from keys and residuals read before the write."""
    model = make_model(seed=4, initializer_range=0.2)
    settings = replace(memit_merge.Settings(), layers=(2,), covariance_weight=0.5)
    C = memit_merge.covariance(model, tokenizer, ["The quick brown fox jumps over the lazy dog.", "Water is wet " * 9], (2,))
    C[2] += 0.1 * torch.eye(len(C[2]), dtype=torch.float64)  # a few tokens do not fill the space
    rows = [
        memit_merge.rows_of(tokenizer, name, [e for e in facts_of(2, 2) if e.subject == name], ["", "You see. "])
        for name in ("Lin Nu", "Henri Marteau")
    ]
    z = torch.randn(2, 32)
    read_rows = [read(model, group, 2, 2) for group in rows]
    K = torch.stack([keys.mean(0) for keys, _ in read_rows], 1).double()
    R = (z - torch.stack([hidden[0] for _, hidden in read_rows])).T.double()
    before = weights(model)
    memit_merge.write(model, rows, z, C, settings)
    P = torch.linalg.solve(0.5 * C[2], K)
    dW = R @ torch.linalg.solve(torch.eye(2, dtype=torch.float64) + K.T @ P, P.T)
    for name, weight in weights(model).items():
        change = (weight - before[name]).double()
        assert (change - (dW if ".2." in name else 0)).norm() <= 1e-4 * dW.norm()


def test_memit_merge_learns(make_model, tokenizer):
    model = make_model(seed=5, initializer_range=0.2)
    C = {layer: torch.eye(model.config.intermediate_size, dtype=torch.float64) for layer in LAYERS}
    loss = {}
    for steps in (1, 12):
        settings = replace(memit_merge.Settings(), layers=LAYERS, steps=steps, lr=1.0)
        loss[steps] = memit_merge.edit(copy.deepcopy(model), tokenizer, facts_of(1, 2), C, settings).values[0].loss
    assert loss[12] < loss[1] - 0.1


def test_speed_runs_every_method(make_model, tokenizer, tmp_path):
    make_model(layers=10, initializer_range=0.2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["-m", "bench.speed", "--model", tmp_path, "--facts", "2", "--steps", "2", "--repeats", "1", "--json", "-"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    methods = ("memit_merge", "rose_naive", "rose", "rose_auto")
    for method in methods:
        assert (
            result[f"{method}_s"] > 0
            and result["steps"][method] == 2
            and set(result["split"][method]) >= {"load", "prepare", "optimise", "write"}
        )
        assert result["tokens"][method] > 0 and result["peak_extra_mb"][method] >= 0
    assert result["final_loss"]["rose"] == pytest.approx(result["final_loss"]["rose_naive"], rel=1e-2)
    assert result["tokens"]["rose"] < result["tokens"]["rose_naive"]


def test_speed_tells_what_is_read_off_a_model_once(tmp_path):
    command = ["-m", "bench.speed", "--facts", "1", "--steps", "1", "--repeats", "1", "--methods", "default_auto", "--json", "-"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    split = result["split"]["default_auto"]
    assert split["coordinates"] > 0 and result["default_auto_s"] == pytest.approx(sum(split[s] for s in ("prepare", "optimise", "write")))
