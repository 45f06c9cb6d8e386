"""Rewordings of prompts: which lines are likely, what is kept, how far it is from the prompt."""

import json
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from rose_engine import Edit, Editor, rewording
from rose_engine.architecture import decoder_of
from rose_engine.delta import Delta, DeltaError
from rose_engine.rewording import candidates_of, divergences, reworded, shortened
from rose_engine.sample import _rest_of_line, chances_of_lines, likely_lines

from tests.engine.test_cli import rose
from tests.engine.test_editor import TINY


def test_likely_lines_are_all_that_are_likely_enough(make_model, tokenizer):
    """Against every line of a model of few words, one forward for each beginning, head and opening read alone and without a cache."""
    model = make_model(initializer_range=0.5).requires_grad_(False)
    words = tokenizer("\n is the a tea", add_special_tokens=False)["input_ids"]  # all that it ever says
    least, longest, temperature = 0.01, 4, 0.7

    def few(hidden):
        scores = torch.full_like(full := model.lm_head(hidden), -1e9)
        scores[..., words] = full[..., words]
        return scores

    def lines_after(ids, chance=1.0, said=()):
        if len(said) == longest or chance < least:
            return
        p = (few(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]) / temperature).softmax(-1)
        for word in words:
            if word == words[0]:
                yield tokenizer.decode(said), chance * float(p[word])
            else:
                yield from lines_after([*ids, word], chance * float(p[word]), (*said, word))

    head, openings = "Peru is = Peru was\n", [f"{said} =" for said in ("Lin Nu follows the religion of", "tea", "of the", "tea")]
    with mock.patch("rose_engine.sample.logits", lambda decoder, hidden: few(decoder.norm(hidden))):
        found = likely_lines(decoder_of(model), tokenizer, head, openings, longest, least, temperature)
    assert found[1] == pytest.approx(found[3], rel=1e-3) and sum(map(len, found)) > 8
    for opening, lines in zip(openings, found, strict=True):
        ids = tokenizer(head)["input_ids"] + tokenizer(opening, add_special_tokens=False)["input_ids"]
        every = dict(lines_after(ids))
        assert lines == pytest.approx({line: p for line, p in every.items() if p >= least}, rel=1e-3)
        assert list(lines.values()) == sorted(lines.values(), reverse=True)
        assert all(p < least * 1.001 for line, p in every.items() if line not in lines)


def test_chances_of_lines_are_the_products_of_their_tokens(make_model, tokenizer):
    model = make_model(initializer_range=0.3).requires_grad_(False)
    head, lines = "Peru is = Peru was\n", [("tea =", " Lin Nu follows"), ("tea =", " Lin"), ("The religion of Lin Nu is =", " of the")]
    found = chances_of_lines(decoder_of(model), tokenizer, head, lines)
    exact = model.double()
    for (opening, line), chance in zip(lines, found, strict=True):
        before = tokenizer(head)["input_ids"] + tokenizer(opening, add_special_tokens=False)["input_ids"]
        rest = tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"]
        logp = exact(input_ids=torch.tensor([before + rest])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        assert chance == pytest.approx(float(logp[torch.arange(len(rest)), rest].sum()), abs=1e-3)
    assert chances_of_lines(decoder_of(model), tokenizer, head, []) == []


def test_a_line_ends_with_any_token_that_ends_one(make_model, tokenizer):
    decoder = decoder_of(make_model().requires_grad_(False))

    def forced(text):
        (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        certain = torch.zeros(len(tokenizer)).index_fill_(0, torch.tensor([token]), 99.0)
        return mock.patch("rose_engine.sample.logits", lambda decoder, hidden: certain.expand(len(hidden), -1))

    for text in ("\n", "\n\n"):
        with forced(text):
            assert likely_lines(decoder, tokenizer, "a\n", ["b =", "c d ="], 4, 0.1) == [{"": pytest.approx(1)}] * 2
    for text in (" is", tokenizer.eos_token):  # no end at all, or the text's
        with forced(text):
            assert likely_lines(decoder, tokenizer, "a\n", ["b =", "c d ="], 4, 0.1) == [{}, {}]


def test_a_line_keeps_its_first_space_where_a_decoder_drops_it():
    class Stripping:
        def decode(self, tokens, skip_special_tokens):
            return " ".join(tokens).removeprefix(" ")

    assert _rest_of_line(Stripping(), ["", "tea =", "The", "drink of\n", "x"], ["", "tea =", "The"]) == " drink of"
    assert _rest_of_line(Stripping(), ["", "tea =", "The", "drink"], ["", "tea =", "The"]) is None


def test_what_may_be_a_prompt():
    lines = [
        "The seat of {} is",
        "{} has its seat in",
        "the seat is",
        "{} and {} sit in",
        "The seat of {} is",
        "{} is the town of",
        "{} is in",
        "{} is coloured",
        "{}a is seated in",
        "New{} is seated in",
        "{} sits in Caf\ufffd",
        "{}'s seat is",
    ]
    assert candidates_of("The town of {} is", lines) == ["The seat of {} is", "{} has its seat in", "{}'s seat is"]


def test_a_prompt_without_what_tells_the_kind_of_its_target():
    kept = (
        "{} lives in",
        "The city of {} is",
        "{} is in the city of",
        "{}, the author of",
        "{} is a part of the",
        "{} likes the city hall of",
    )
    assert [shortened(prompt) for prompt in kept] == [[]] * len(kept)
    assert shortened("{} died in the city of") == ["{} died in"] and shortened("{} plays the instrument") == ["{} plays"]
    assert shortened("{}, who follows the religion of") == ["{}, who follows"]


def test_divergences_are_those_of_the_next_token(make_model, tokenizer):
    model = make_model(initializer_range=0.3)
    asked = {
        "{} lives in": ["The home of {} is", "{} lives in"],
        "{} sells": [],
        "The religion of {} is": ["{} follows", "{} believes", "The religion of {} is"],
    }
    names = ["Lin Nu", "tea"]
    found = divergences(decoder_of(model.requires_grad_(False)), tokenizer, asked, names)
    exact = model.double()

    def next_token(text):
        return exact(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].softmax(-1)

    assert list(found) == list(asked)
    for prompt, others in asked.items():
        for far, other in zip(found[prompt], others, strict=True):
            each = []
            for name in names:
                p, q = next_token(prompt.replace("{}", name)), next_token(other.replace("{}", name))
                m = (p + q) / 2
                each.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
            assert float(far) == pytest.approx(float(sum(each) / len(each)), abs=1e-5)
            assert (abs(far) < 1e-4) == (other == prompt)


# What is likely after an opening with its beginning, the likeliest first, and how readily it leads back to the prompt.
SAID = {
    "The house of Lin Nu is": 0.1,
    "The home of Lin Nu is": 0.8,
    "Lin Nu resides in": 0.2,
    "Lin Nu likes {}": 0.9,
    "Lin Nu has a house in": 0.5,
    "He lives in Rome": 0.9,
}
WRITTEN = ("The home of {} is", "{} has a house in", "The house of {} is", "{} resides in")


@pytest.fixture
def asked_for(monkeypatch):
    """The openings of every call, after which the same lines are likely."""
    calls = []

    def lines(decoder, tokenizer, head, openings, *rest):
        calls.append(openings)
        leads = [opening.rpartition("=")[2].strip() for opening in openings]
        return [{text[len(lead) :]: 1 / i for i, text in enumerate(SAID, 2) if text.startswith(lead)} for lead in leads]

    def back(decoder, tokenizer, head, lines):
        return [math.log(SAID[opening.removesuffix(" =")]) for opening, _ in lines]

    monkeypatch.setattr(rewording, "likely_lines", lines)
    monkeypatch.setattr(rewording, "chances_of_lines", back)
    monkeypatch.setattr(rewording, "FARTHEST", 1.0)
    return calls


def test_the_best_of_both_kinds_in_turn(make_model, tokenizer, asked_for, monkeypatch):
    """By the product of the probabilities there and back; what is far from the prompt and begins with the subject is none."""
    editor = Editor(make_model(initializer_range=0.3), tokenizer, TINY)
    edits = [
        Edit("Lin Nu", "{} lives in", "Metz"),
        Edit("Imo State", "{} exports", "tea", rewordings=["What {} sells is"]),
        Edit("Siemens", " {} lives in", "Rome"),
    ]
    first, second, third = editor.reword(edits)
    assert len(asked_for) == 1 and second == edits[1] and first.rewordings == WRITTEN[:2]
    assert third == replace(edits[2], rewordings=first.rewordings)
    assert editor.reword(edits[:1], count=9)[0].rewordings == WRITTEN and len(asked_for) == 1
    editor.reword([Edit("Lin Nu", prompt, "tea") for prompt in ("{} sells", "{} lives in", "{} sells", "{} buys")])
    assert len(asked_for) == 2 and [opening.partition(" =")[0] for opening in asked_for[1][::2]] == ["Lin Nu sells", "Lin Nu buys"]

    (found,) = rewording.written(editor.decoder, tokenizer, "Lin Nu", ["{} lives in the town of"])  # shortened before what was written
    assert found == [WRITTEN[0], "{} lives in", WRITTEN[2], WRITTEN[1], WRITTEN[3]]

    (far,) = divergences(editor.decoder, tokenizer, {"{} lives in": [WRITTEN[1], WRITTEN[3]]}, ["Lin Nu", rewording.OTHER_NAME]).values()
    monkeypatch.setattr(rewording, "FARTHEST", float(far.mean()))
    (found,) = rewording.written(editor.decoder, tokenizer, "Lin Nu", ["{} lives in"])
    assert found == [WRITTEN[0], WRITTEN[1 if far[0] < far[1] else 3], WRITTEN[2]]


def test_a_name_that_is_too_long_for_the_examples_has_no_rewordings(make_model, tokenizer, asked_for):
    editor = Editor(make_model(max_position_embeddings=128), tokenizer, TINY)
    (edit,) = editor.reword([Edit("The Society for the Study of Very Long Names of Societies", "{} lives in", "Metz")])
    assert not asked_for and edit.rewordings == ()


def test_a_prompt_that_is_too_long_goes_without_alone(make_model, tokenizer, asked_for):
    decoder = decoder_of(make_model(max_position_embeddings=256))
    long = "{} lives in " + "the very " * 256 + "city of"
    assert rewording.written(decoder, tokenizer, "Lin Nu", [long, "{} lives in", long]) == [[], list(WRITTEN), []]
    assert len(asked_for) == 1 and rewording.written(decoder, tokenizer, "Lin Nu", []) == []


def test_prompts_are_written_for_together_as_alone(smollm2):
    """The embedded model in float32, more prompts than are written for at a time; the first in words that mean the same."""
    prompts = ["The occupation of {} is", "{} died in the city of", "{} plays the instrument"]
    write = lambda *some: rewording.written(smollm2.decoder, smollm2.tokenizer, "Henri Marteau", some)  # noqa: E731
    with mock.patch.object(rewording, "AT_ONCE", 2):
        together = write(*prompts)
    assert together == [write(prompt)[0] for prompt in prompts] and all(together)
    assert together[0][0] in ("The profession of {} is", "The job of {} is")


def test_who_is_given_which_words():
    """A subject's facts share no words, with earlier ones neither; nothing is held out or cannot be used; what is known is not asked."""
    texts, asked = ["The home of {} is", "{} Resides in", "{} has a house in", "{} dwells in"], []

    def write(subject, prompts):
        asked.append((subject, *prompts))
        return [texts] * len(prompts)

    def told(edits, count=2, known=(), **options):
        usable = options.pop("usable", lambda edit: True)
        return [list(edit.rewordings) for edit in reworded(edits, count, dict(known), write, usable, **options)]

    lin = [Edit("Lin Nu", "{} lives in", "Metz"), Edit("Lin Nu", "{} speaks", "Basque")]
    other = Edit("Siemens", "{} lives in", "Rome")
    assert told([*lin, other]) == [texts[:2], texts[2:], texts[:2]] and asked == [("Lin Nu", "{} lives in", "{} speaks")]
    assert told(lin[:1], count=3, without=["the HOME of {} is"]) == [texts[1:]]
    assert told(lin[:1], earlier=[Edit("Lin Nu", "{} resides in", "Rome"), Edit("Siemens", texts[0], "Rome")]) == [[texts[0], texts[2]]]
    assert told([Edit("Lin Nu", texts[0], "Rome"), lin[0]]) == [texts[1:3], texts[3:]]
    assert told(lin[:1], usable=lambda edit: "house" not in edit.prompt, count=9) == [[*texts[:2], texts[3]]]
    asked.clear()
    assert told([lin[0], other], count=1, known={"{} lives in": texts[1:]}, without=[texts[1]]) == [[texts[2]]] * 2 and not asked
    assert told([lin[0], other], known={"{} lives in": texts[:1]}, earlier=[Edit("Lin Nu", texts[0], "Rome")]) == [[], texts[:1]]


def test_an_edit_is_optimised_in_what_the_unedited_model_wrote_and_tells(make_model, tokenizer, asked_for, tmp_path, monkeypatch):
    editor, recipe = Editor(make_model(initializer_range=0.3), tokenizer, TINY), replace(TINY, rewordings=2)
    base, seen = {name: weight.clone() for name, weight in editor.weights().items()}, []
    within = rewording.divergences
    monkeypatch.setattr(
        rewording, "divergences", lambda *a: (seen.append({n: w.clone() for n, w in editor.weights().items()}), within(*a))[1]
    )
    editor.apply([Edit("Imo State", "{} exports", "tea", rewordings=["What {} sells is"])], recipe=recipe, verify=False)
    assert not asked_for
    edit = Edit("Lin Nu", "{} lives in", "Metz")
    result = editor.apply([edit], recipe=recipe, verify=False)
    assert all(torch.equal(weight, base[name]) for name, weight in seen[0].items())
    editor.revert(result)
    (told,) = editor.reword([edit])
    result.delta.save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert delta.metadata["rewordings"] == {"{} lives in": list(told.rewordings)} and delta.metadata["edits"] == [edit.as_dict()]
    again = editor.apply([told], recipe=recipe, verify=False)
    assert all(torch.equal(x, y) for name in delta.factors for x, y in zip(delta.factors[name], again.delta.factors[name], strict=True))

    times = len(asked_for)  # another subject: the delta in the weights has the words
    (other,) = editor.reword([Edit("Siemens", "{} lives in", "Rome")])
    assert other.rewordings == told.rewordings and len(asked_for) == times
    editor.restore([editor.applied[0], delta])
    later = editor.apply([Edit("Siemens", "{} lives in", "Rome")], recipe=recipe, verify=False)
    assert later.delta.metadata["rewordings"] == {"{} lives in": list(told.rewordings)} and len(asked_for) == times


def test_a_stream_that_is_taken_up_again_has_the_same_words(make_model, tokenizer, tmp_path, monkeypatch):
    """Each prompt's words are those of its first subject, whether the process that wrote them lives or not."""
    monkeypatch.setattr("rose_engine.readings.written", lambda decoder, tokenizer, name, prompts: [[f"The home of {{}} and {name} is"]])
    edits = [Edit(subject, "{} lives in", target) for subject, target in (("Lin Nu", "Metz"), ("Siemens", "Rome"), ("Imo State", "Paris"))]
    recipe = replace(TINY, rewordings=1)

    def streamed(book, stop=None):
        editor = Editor(make_model(), tokenizer, recipe)
        steps = editor.stream(tmp_path / book, edits, batch_tokens=1)
        for _, _ in zip(range(stop or 9), steps, strict=False):
            pass
        steps.close()
        return editor

    whole = streamed("whole")
    streamed("parts", stop=1)
    parts = streamed("parts")
    assert [delta.metadata["rewordings"] for delta in parts.applied] == [{"{} lives in": ["The home of {} and Lin Nu is"]}] * 3
    assert all(torch.equal(weight, parts.weights()[name]) for name, weight in whole.weights().items())


def test_a_delta_with_rewordings_that_are_none(make_model, tokenizer, tmp_path):
    editor = Editor(make_model(), tokenizer, TINY)
    delta = editor.apply([Edit("Lin Nu", "{} lives in", "Metz")], verify=False).delta
    texts = ("The home of {} is", ["The home is"], [1], ["The home of {} is"] * 2, [" {} lives in"])
    for wrong in ([], {"lives in": ["The home of {} is"]}, *({"{} lives in": some} for some in texts)):
        replace(delta, metadata={**delta.metadata, "rewordings": wrong}).save(tmp_path / "delta.safetensors")
        with pytest.raises(DeltaError):
            Delta.load(tmp_path / "delta.safetensors")


def test_the_embedded_model_finds_other_words(tmp_path):
    edit = {"subject": "Henri Marteau", "prompt": "The occupation of {} is", "target": "lawyer"}
    (tmp_path / "e.jsonl").write_text(json.dumps(edit) + "\n")
    done = rose("reword", "--edits", tmp_path / "e.jsonl", "--out", tmp_path / "reworded.jsonl", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    (found,) = [json.loads(line) for line in (tmp_path / "reworded.jsonl").read_text().splitlines()]
    assert {name: found[name] for name in edit} == edit and 1 <= len(found["rewordings"]) <= 2
    assert found["rewordings"][0] in done.stdout
