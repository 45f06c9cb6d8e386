"""Rewordings of prompts: what is sampled, what is kept, how far it is from the prompt."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from rose_engine import Edit, Editor, rewording
from rose_engine.architecture import decoder_of
from rose_engine.rewording import candidates_of, divergence
from rose_engine.sample import sample_lines

from tests.engine.test_cli import rose
from tests.engine.test_editor import TINY


def test_lines_follow_their_opening(make_model, tokenizer):
    """A model that is sure of itself draws what it would say greedily, head and opening read without padding and without a cache."""
    model = make_model(initializer_range=1.0).requires_grad_(False)
    words = tokenizer("\n is the a of in tea", add_special_tokens=False)["input_ids"]  # all that it ever says
    known = torch.zeros(len(tokenizer), 1).index_fill_(0, torch.tensor(words), 30.0)
    model.lm_head.weight *= known
    head = "Peru is = Peru was\n"
    openings = [f"{said} =" for said in ("Lin Nu follows the religion of", "tea", "What is told of Siemens is", "the", "of the", "in a")]
    lines = sample_lines(model, tokenizer, head, openings, 12)
    assert any(lines) and None in lines
    for opening, line in zip(openings, lines, strict=True):
        ids = tokenizer(head)["input_ids"] + tokenizer(opening, add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 12:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        said, ended, _ = tokenizer.decode(ids[start:], skip_special_tokens=True).partition("\n")
        assert line == (said if ended else None)


def test_a_line_that_does_not_end_is_none(make_model, tokenizer):
    model, newline = make_model(), tokenizer("\n", add_special_tokens=False)["input_ids"][-1]

    def forced(token):
        logits = torch.zeros(len(tokenizer)).index_fill_(0, torch.tensor([token]), 99.0)
        return mock.patch.object(model.lm_head, "forward", lambda x: logits.expand(*x.shape[:2], -1))

    with forced(newline):
        assert sample_lines(model, tokenizer, "a\n", ["b =", "c d ="], 4) == ["", ""]
    with forced(newline + 1):
        assert sample_lines(model, tokenizer, "a\n", ["b =", "c d ="], 4) == [None, None]


def test_what_may_be_a_prompt():
    lines = [
        "The seat of {} is",
        "{} has its seat in",
        "the seat is",
        "{} and {} sit in",
        "The seat of {} is",
        "{} is the town of",
        "{} is in",
    ]
    assert candidates_of("The town of {} is", lines) == ["The seat of {} is", "{} has its seat in", "{} is in"]


def test_divergence_is_that_of_the_next_token(make_model, tokenizer):
    model = make_model(initializer_range=0.3)
    prompt, others, names = "{} lives in", ["The home of {} is", "{} lives in"], ["Lin Nu", "tea"]
    found = divergence(decoder_of(model.requires_grad_(False)), tokenizer, prompt, others, names)
    exact = model.double()

    def next_token(text):
        return exact(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].softmax(-1)

    for far, other in zip(found, others, strict=True):
        each = []
        for name in names:
            p, q = next_token(prompt.replace("{}", name)), next_token(other.replace("{}", name))
            m = (p + q) / 2
            each.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
        assert float(far) == pytest.approx(float(sum(each) / len(each)), abs=1e-5)
    assert found[0] > 1e-4 > abs(found[1])


def test_the_nearest_are_kept_once_a_prompt_and_read_off_the_unedited_model(make_model, tokenizer, monkeypatch):
    editor = Editor(make_model(initializer_range=0.3), tokenizer, TINY)
    edits = [
        Edit("Lin Nu", "{} lives in", "Metz"),
        Edit("Imo State", "{} exports", "tea", rewordings=["What {} sells is"]),
        Edit("Siemens", "{} lives in", "Rome"),
    ]
    said = ["Lin Nu resides in", "The home of Lin Nu is", None, "Lin Nu likes {}", "He lives in Rome", "Lin Nu has a house in"]
    seen = []

    def lines(model, tokenizer, head, openings, tokens, seed):
        seen.append({name: weight.clone() for name, weight in editor.weights().items()})
        begun = [opening.rpartition("=")[2] for opening in openings]
        return [text[len(lead) :] if text and text.startswith(lead.strip()) else None for lead, text in zip(begun, said * 11, strict=False)]

    monkeypatch.setattr(rewording, "sample_lines", lines)
    monkeypatch.setattr(rewording, "FARTHEST", 1.0)
    base = {name: weight.clone() for name, weight in editor.weights().items()}
    editor.apply([Edit("Lin Nu", "{} speaks", "Basque")], verify=False)
    first, second, third = editor.reword(edits)
    assert len(seen) == 1 and all(torch.equal(weight, base[name]) for name, weight in seen[0].items())
    assert second == edits[1] and first.rewordings == third.rewordings and third == replace(edits[2], rewordings=first.rewordings)
    kept = ["{} resides in", "The home of {} is", "{} has a house in"]
    with editor._unedited():
        far = divergence(editor.decoder, tokenizer, "{} lives in", kept, ["Lin Nu", *rewording.NAMES]).tolist()
    assert list(first.rewordings) == [text for _, text in sorted(zip(far, kept, strict=True))][:2]
    assert len(editor.reword(edits[:1], count=3)[0].rewordings) == 3
    one, two = editor.reword([edits[0], Edit("Lin Nu", "{} speaks", "Basque")], count=2)  # the same lines are drawn for both
    assert len(one.rewordings) == 2 and two.rewordings and not set(two.rewordings) & set(one.rewordings)


def test_the_embedded_model_finds_other_words(tmp_path):
    edit = {"subject": "Henri Marteau", "prompt": "The occupation of {} is", "target": "lawyer"}
    (tmp_path / "e.jsonl").write_text(json.dumps(edit) + "\n")
    done = rose("reword", "--edits", tmp_path / "e.jsonl", "--out", tmp_path / "reworded.jsonl", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    (found,) = [json.loads(line) for line in (tmp_path / "reworded.jsonl").read_text().splitlines()]
    assert {name: found[name] for name in edit} == edit and 1 <= len(found["rewordings"]) <= 2
    assert found["rewordings"][0] in done.stdout
