"""The quality benchmark: its reader, its metrics against hand-made cases, and a run on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from rose_engine import ROSE, EditError, Editor, rewording

from bench.datasets import load
from bench.datasets.cases import DataError, paraphrases_of
from bench.methods import edited, methods_of
from bench.metrics import Probe, chat_probe, contains, generate, normalise, plain_probe, teacher_forced
from bench.quality import METRICS, evaluate, percent, standard_errors

RECORD = {
    "subjectID": 1,
    "class": "person",
    "subject": {"name": "Lin Nu"},
    "Star_Topology": [
        {
            "requested_rewrite": {"prompt": "{} follows the religion of", "relation": "r", "target_true": None, "target_new": "Islam"},
            "paraphrase_prompts": ["The religion of Lin Nu is"],
            "question_prompts": ["Which religion has Lin Nu?"],
            "edit_question": "What religion does Lin Nu follow?",
            "neighborhood_prompts": ["The religion of Q-Tip is"],
            "neighborhood_targets": ["Islam"],
        }
    ],
}
FILE = {"records": [RECORD], "instruct_templates": [["Be brief.", "Question: {q}"]]}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(FILE))
    return tmp_path / "d.json"


def test_reader(path):
    data = load(path)
    case = data.subjects[0].cases[0]
    assert case.edit.target == "Islam" and case.questions == ("Which religion has Lin Nu?",)
    assert case.neighbours == (("The religion of Q-Tip is", "Islam"),) and data.instructions == (("Be brief.", "Question: ", ""),)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: d["records"][0]["Star_Topology"][0].pop("paraphrase_prompts"), "record 1 lacks"),
        (lambda d: d["records"][0]["Star_Topology"][0]["requested_rewrite"].update(prompt="none"), "record 1: `prompt`"),
        (lambda d: d.pop("instruct_templates"), "must be an object"),
        (lambda d: d.update(instruct_templates=[["a", "b"]]), "has no {q}"),
        (lambda d: d.update(records=[]), "no records"),
    ],
)
def test_reader_names_file_and_record(path, break_it, message):
    data = json.loads(path.read_text())
    break_it(data)
    path.write_text(json.dumps(data))
    with pytest.raises((DataError, EditError), match=message) as error:
        load(path)
    assert str(error.value).startswith(str(path))


def test_no_rewording_says_what_the_evaluation_asks(path, make_model, tokenizer, monkeypatch):
    def lines(decoder, tokenizer, head, openings, *rest):
        return [{" religion of Lin Nu is" if opening.endswith("The") else " believes in": 0.5} for opening in openings]

    monkeypatch.setattr(rewording, "likely_lines", lines)
    monkeypatch.setattr(rewording, "FARTHEST", 1.0)
    editor, subject = Editor(make_model(), tokenizer, replace(ROSE, layers=(1, 2), steps=2)), load(path).subjects[0]
    (method,) = methods_of("rose", editor).values()
    for without, told in ((paraphrases_of(subject), ["{} follows", "{} believes in"]), ((), ["The religion of {} is", "{} follows"])):
        with edited(editor, method, [subject.edits], 0, without):
            (delta,) = editor.applied
            assert delta.metadata["edits"] == [replace(subject.edits[0], rewordings=told).as_dict()] and not delta.metadata["rewordings"]


def test_a_conversation_without_a_template_is_plain_lines(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    assert chat_probe(tokenizer, "Who is it?", "Lin ", "Be brief.", earlier).text == "Be brief.\nHello\nYes?\nWho is it?\nAnswer:"
    assert chat_probe(tokenizer, "Who is it?", "Lin ") == Probe("Who is it?\nAnswer:", " Lin")


def test_teacher_forcing_is_the_models_argmax(make_model, tokenizer):
    """In padded batches of any mixture, against one unpadded row at a time."""
    model = make_model(initializer_range=0.2)
    probes = [plain_probe("The capital of France is", "Paris, the city"), plain_probe("Rain", "x"), Probe("A b c", " d e f g h i j")] * 3
    for probe, outcome in zip(probes, teacher_forced(model, tokenizer, probes), strict=True):
        context, answer = tokenizer(probe.text)["input_ids"], tokenizer(probe.answer)["input_ids"]
        said = model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].argmax(-1).tolist()
        assert outcome.said == tuple(said) and outcome.success == sum(s == a for s, a in zip(said, answer, strict=True)) / len(answer)


def test_generation_in_a_padded_batch(smollm2):
    texts = ["The capital of France is", "One, two, three, four, five,"]
    together = generate(smollm2.model, smollm2.tokenizer, texts, 5, chat=False)
    assert together == [generate(smollm2.model, smollm2.tokenizer, [text], 5, chat=False)[0] for text in texts]


def test_answers_are_compared_normalised():
    assert normalise("The  Cat, an Answer!") == "cat answer"
    assert contains("It is the Merthyr Tydfil, County.", "merthyr tydfil county") and not contains("It is 48.2", "8")


def test_standard_errors_are_over_subjects():
    shares = torch.rand(7, dtype=torch.float64)
    found = standard_errors({"rose": {"efficacy": shares.tolist(), "paraphrase": [1.0], "locality": []}})
    assert found == {"rose": {"efficacy": round(float(100 * shares.std() / 7**0.5), 2)}}


def test_evaluation_edits_and_restores(path, make_model, tokenizer):
    editor = Editor(make_model(initializer_range=0.2), tokenizer, replace(ROSE, layers=(1, 2), steps=8, lr=0.5))
    before = [w.clone() for w in editor.weights().values()]
    results = evaluate(editor, load(path), methods_of("vanilla,rose", editor))
    table = percent(results)
    assert set(table) == {"vanilla", "rose"} and set(table["rose"]) == set(METRICS)
    assert table["vanilla"]["locality"] == table["vanilla"]["locality_instructed"] == 100.0
    assert all(torch.equal(a, b) for a, b in zip(before, editor.weights().values(), strict=True))
