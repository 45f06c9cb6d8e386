"""The benchmark of adopted deltas on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from rose_engine import ROSE, Editor

from bench import quality, transfer
from bench.datasets import load
from bench.methods import apply, methods_of
from tests.bench.test_quality import FILE, RECORD


def test_what_is_read_are_the_adopted_edits(make_model, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "d.json").write_text(json.dumps({**FILE, "records": [RECORD]}))
    make_model(hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    editors = {kind: transfer.base(str(tmp_path / "base"), kind, "cpu") for kind in ("float32", "nf4")}
    for editor in editors.values():
        editor.recipe = replace(ROSE, forms=2, layers=(1, 2), steps=20, lr=0.5, rewordings=0, bystanders=0)
    made, data = editors["float32"], load(tmp_path / "d.json")
    methods, edits = methods_of("vanilla,rose", made), data.subjects[0].edits
    kept = {name: weight.clone() for name, weight in made.weights().items()}
    plain = {kind: editor.verify(edits) for kind, editor in editors.items()}
    apply(made, methods["rose"], edits, 0)
    wanted = {"float32": made.verify(edits)}
    editors["nf4"].restore(editors["nf4"].adopt(made.applied))
    wanted["nf4"] = editors["nf4"].verify(edits)
    for editor in editors.values():
        editor.restore([])

    seen = []
    monkeypatch.setattr(transfer, "read", lambda editor, probes: seen.append(editor.verify(edits)) or quality.read(editor, probes))
    results = transfer.evaluate(made, editors, data, methods)
    assert seen == [plain["float32"], plain["nf4"], wanted["float32"], wanted["nf4"]] and wanted["nf4"] != plain["nf4"]
    assert all(torch.equal(x, kept[name]) for name, x in made.weights().items()) and all(e.applied == () for e in editors.values())
    alone = quality.evaluate(Editor(made.model, tokenizer, made.recipe), data, methods)
    for method in methods:
        assert results[method, "float32"] == {metric: alone[method][metric] for metric in quality.RECALL}
    assert set(results) == {(method, kind) for method in methods for kind in editors}


def test_what_cannot_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        transfer.main(["--data", "d.json", "--made", "int3"])
    assert "unknown base 'int3'; known are float32" in capsys.readouterr().err
