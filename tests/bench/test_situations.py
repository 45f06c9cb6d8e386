"""The situations in which an edited subject is asked, on a tiny model."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from rose_engine import ROSE, Edit, Editor

from bench import situations
from bench.datasets.cases import Case, SubjectCases
from bench.methods import Method
from bench.metrics import Outcome

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


@torch.no_grad()
def probability(model, tokenizer, probes):
    """A success that every change of the weights moves: how likely the answer's first token is."""
    outcomes = []
    for probe in probes:
        logits = model(input_ids=torch.tensor([tokenizer(probe.text)["input_ids"]])).logits[0, -1]
        outcomes.append(Outcome(float(logits.softmax(-1)[tokenizer(probe.answer)["input_ids"][0]]), ()))
    return outcomes


def test_means_are_those_of_the_edited_model_which_is_then_as_before(make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(situations, "teacher_forced", probability)
    editor = Editor(make_model(initializer_range=0.3), tokenizer, replace(ROSE, layers=(1, 2), steps=4, lr=0.3))
    before = {name: weight.clone() for name, weight in editor.weights().items()}
    found = situations.summary(situations.evaluate(editor, SUBJECTS, {"vanilla": Method(), "rose": Method(editor.recipe)}))
    assert all(weight.equal(before[name]) for name, weight in editor.weights().items())
    means = []
    for subject, other in (SUBJECTS, SUBJECTS[::-1]):
        asked = situations.probes_of(tokenizer, subject, other.name)["asked"]
        with editor.preview(subject.edits, verify=False):
            means.append(fmean(outcome.success for outcome in probability(editor.model, tokenizer, asked)))
    mean, error = found["rose"]["asked"]
    assert mean == pytest.approx(50 * sum(means)) and error == pytest.approx(50 * abs(means[0] - means[1]))
    assert mean != pytest.approx(found["vanilla"]["asked"][0], rel=1e-3)
    assert set(found["vanilla"]) == set(situations.SITUATIONS)
