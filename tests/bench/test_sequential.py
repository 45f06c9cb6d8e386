"""The sequential benchmark on a tiny model."""

import json
from dataclasses import replace

import torch
from rose_engine import ROSE, Editor

from bench.datasets import load
from bench.sequential import METRICS, evaluate, sequence, table_of
from tests.bench.test_quality import FILE, RECORD


def test_four_tables_and_the_model_as_before(make_model, tokenizer, tmp_path):
    records = []
    for i, name in enumerate(("Lin Nu", "Ada Brandt", "Omar Haddad", "Kofi Mensah", "Tomas Vega", "Nuria Sol")):
        text = json.dumps(RECORD).replace("Lin Nu", name)
        records.append({**json.loads(text), "subjectID": i})
    (tmp_path / "d.json").write_text(json.dumps({**FILE, "records": records}))
    editor = Editor(make_model(initializer_range=0.2), tokenizer, replace(ROSE, forms=2, layers=(1, 2), steps=2, lr=0.5))
    before = [w.clone() for w in editor.weights().values()]
    seen = []
    results = evaluate(editor, load(tmp_path / "d.json"), editor.recipe, seen.append)
    assert {name: list(table) for name, table in results.items()} == {
        "plain": ["5", "6"], "joint": ["5", "6"], "batch": ["6"], "vanilla": ["5", "6"]
    }  # fmt: skip
    assert all(set(values) == set(METRICS) for table in results.values() for values in table.values())
    assert results["vanilla"]["6"]["locality"] == 100.0
    assert all(torch.equal(a, b) for a, b in zip(before, editor.weights().values(), strict=True))
    assert len(table_of(results).splitlines()) == 5
    count = lambda n: {"edits": sum(len(delta.metadata["edits"]) for delta in editor.applied)}  # noqa: E731
    data = load(tmp_path / "d.json")
    assert sequence(editor, data.subjects, editor.recipe, (2, 6), count, seen.append) == {"2": {"edits": 2}, "6": {"edits": 6}}
    assert editor.applied == ()


def test_no_rewording_says_a_paraphrase(make_model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text(json.dumps({**FILE, "records": [RECORD]}))
    editor = Editor(make_model(), tokenizer, replace(ROSE, forms=2, layers=(1, 2), steps=1, bystanders=0))
    data, noted = load(tmp_path / "d.json"), []
    monkeypatch.setattr(editor, "reword", lambda edits, count, without: noted.append(set(without)) or list(edits))
    evaluate(editor, data, editor.recipe)
    said = {text.replace(subject.name, "{}") for subject in data.subjects for case in subject.cases for text in case.paraphrases}
    assert said and noted == [said] * 3  # plain, joint and batch
