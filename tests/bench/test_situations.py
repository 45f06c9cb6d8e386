"""The situations in which an edited subject is asked, on a tiny model."""

from dataclasses import replace

import pytest
from rose_engine import ROSE, Edit, Editor

from bench import situations
from bench.datasets.cases import Case, SubjectCases
from bench.methods import Method
from bench.metrics import teacher_forced

SUBJECTS = (
    SubjectCases("Lin Nu", (Case(Edit("Lin Nu", "{} plays the", "harp"), questions=("What does Lin Nu play?", "Her instrument?")),)),
    SubjectCases("Siemens", (Case(Edit("Siemens", "The seat of {} is", "Peru"), questions=("Where is Siemens?",)),)),
)


def test_each_situation_holds_the_question_the_subject_and_nothing_twice(tokenizer):
    probes = situations.probes_of(tokenizer, SUBJECTS[0], "Siemens")
    assert {name: len(some) for name, some in probes.items()} == {
        "asked": 2,
        "conversation": 2,
        "system": 2,
        "beside": 2,
        "last": 1,  # both questions are about one sentence
        "part": 1,  # the other question does not name her
    }
    for name in ("asked", "conversation", "system", "beside"):
        text = probes[name][0].text
        assert "What does Lin Nu play?" in text and text.endswith("<|im_start|>assistant\n")
    assert probes["conversation"][0].text.count("<|im_start|>assistant") == len(situations.EARLIER) + 1
    assert probes["beside"][0].text.index("Siemens") < probes["beside"][0].text.index("Lin Nu")
    last = probes["last"][0].text
    assert last.index("___ plays the") < last.index("Lin Nu") and last.count("Lin Nu") == 1
    assert "What does Nu play?" in probes["part"][0].text and "Lin" not in probes["part"][0].text
    assert not situations.probes_of(tokenizer, SUBJECTS[1], "Lin Nu")["part"]  # a name of one word has no part


def test_means_are_those_of_the_edited_model_which_is_then_as_before(make_model, tokenizer):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, replace(ROSE, layers=(1, 2), steps=4, lr=0.3))
    before = {name: weight.clone() for name, weight in editor.weights().items()}
    methods = {"vanilla": Method(), "rose": Method(editor.recipe)}
    found = situations.summary(situations.evaluate(editor, SUBJECTS, methods))
    assert all(weight.equal(before[name]) for name, weight in editor.weights().items())
    with editor.preview(SUBJECTS[0].edits, verify=False):
        asked = situations.probes_of(tokenizer, SUBJECTS[0], "Siemens")["asked"]
        first = sum(outcome.success for outcome in teacher_forced(editor.model, tokenizer, asked)) / 2
    with editor.preview(SUBJECTS[1].edits, verify=False):
        (only,) = teacher_forced(editor.model, tokenizer, situations.probes_of(tokenizer, SUBJECTS[1], "Lin Nu")["asked"])
    mean, error = found["rose"]["asked"]
    assert mean == pytest.approx(50 * (first + only.success)) and error == pytest.approx(50 * abs(first - only.success))
    assert set(found["vanilla"]) == set(situations.SITUATIONS)
