"""The made-up world: its data are what the benchmarks read, and its model learns."""

import json

import pytest
from rose_engine import Editor

from bench import synthetic
from bench.datasets import load
from bench.methods import methods_of
from bench.quality import evaluate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    options = ["--people", "4", "--edited", "2", "--epochs", "2", "--layers", "3", "--width", "32", "--seed", "3"]
    assert synthetic.main(["--out", str(folder), *options]) == 0
    return folder


def test_what_is_asked_is_not_what_an_edit_is_given(world):
    data = load(world / "data.json")
    assert len(data.subjects) == 2 and all(len(subject.cases) == len(synthetic.RELATIONS) for subject in data.subjects)
    for subject in data.subjects:
        for case in subject.cases:
            given = {case.edit.prompt.replace("{}", subject.name), case.edit.question}
            assert not given & {*case.paraphrases, *case.questions} and case.paraphrases and case.questions
            assert all(subject.name in text for text in (*case.paraphrases, *case.questions))
            assert case.neighbours and not any(subject.name in prompt for prompt, _ in case.neighbours)
    truths = [fact["requested_rewrite"] for r in json.loads((world / "data.json").read_text())["records"] for fact in r["Star_Topology"]]
    assert all(truth["target_true"] != truth["target_new"] for truth in truths)


def test_the_benchmark_runs_on_it(world):
    editor = Editor.from_pretrained(str(world / "model"))
    assert editor.model.config.model_type == "gpt_neox" and editor.tokenizer.chat_template is None
    data = load(world / "data.json", 1)
    table = evaluate(editor, data, methods_of("vanilla,rose[layers=0-1;steps=2;forms=2]", editor))
    assert all(values["instructed"] and values["paraphrase"] for values in table.values())
