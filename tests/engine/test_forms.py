"""Forms: subjects and targets are found by their characters, in every form, for any text."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rose_engine import Edit, EditError
from rose_engine.forms import (
    CHAT_FORMS,
    PAPER_CHAT_FORMS,
    PAPER_PLAIN_FORMS,
    PLAIN_FORMS,
    STATEMENT,
    chat_parts,
    encode,
    forms_for,
    regulariser_row,
    render,
    row_of,
)

SETS = (CHAT_FORMS, PLAIN_FORMS, PAPER_CHAT_FORMS, PAPER_PLAIN_FORMS)
FORMS = {form.name: form for forms in SETS for form in forms}
SUBJECTS = ["Imo State", "{x}", "{", '"quoted" \\ name', "two\nlines", "🙂 face 🇫🇷", "عمر الخيام", "李小龍", "a" * 300, "O'Neil %s {0}"]


def test_eight_forms_of_each_kind(tokenizer):
    assert all(len(forms) == len({f.name for f in forms}) == 8 for forms in SETS)
    assert forms_for(tokenizer, paper=True) == PAPER_CHAT_FORMS
    assert (
        forms_for(tokenizer) == CHAT_FORMS
        and any(f.chat and f.system for f in CHAT_FORMS)
        and any(f.chat and not f.system for f in CHAT_FORMS)
    )
    with pytest.raises(ValueError, match="between 1 and 8"):
        forms_for(tokenizer, 9)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("question", [None, "Tell me: what is the capital of {}, please?"])
def test_subject_and_target_are_where_they_are_said_to_be(tokenizer, form, subject, question):
    edit = Edit(subject, "The capital of {} is", "Metz", question)
    text, target, span = render(edit, form, tokenizer)
    assert text[slice(*span)] == subject and target.strip() == "Metz"
    row = row_of(edit, form, tokenizer)
    assert tokenizer.decode(row.tokens[row.target :]).strip() == "Metz"
    assert tokenizer.decode(row.tokens[: row.target]) == text
    # A byte-level token is as many characters long as it is bytes: count where the subject's last token begins and ends.
    lengths = [len(t) for t in tokenizer.convert_ids_to_tokens(row.tokens)]
    end = len(text[: span[1]].encode())
    assert sum(lengths[: row.last]) < end <= sum(lengths[: row.last + 1])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@example(subject="\U00040000:", form="chat_brief")  # a byte of this character is not in the vocabulary
@given(subject=st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc"]), min_size=1, max_size=20), form=st.sampled_from(sorted(FORMS)))
def test_any_subject_is_located(tokenizer, subject, form):
    if any(token in subject for token in tokenizer.all_special_tokens):
        return
    edit = Edit(subject, "So ({}) lives in", "Wien")
    if tokenizer.decode(tokenizer(subject)["input_ids"]) != subject:
        with pytest.raises(EditError, match="`subject` holds a character that the tokenizer cannot spell"):
            row_of(edit, FORMS[form], tokenizer)
        return
    row = row_of(edit, FORMS[form], tokenizer)
    text, _, span = render(edit, FORMS[form], tokenizer)
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert offsets[row.last][0] < span[1] <= offsets[row.last][1]


def test_joining_space():
    target = lambda prompt, form=STATEMENT, t="Metz": render(Edit("a", prompt, t), form, None)[1]  # noqa: E731
    assert target("{} is") == " Metz" and target("{} said (") == "Metz" and target("{} is ", t=" Metz ") == " Metz"


def test_chat_answers_drop_the_space(tokenizer):
    row = row_of(Edit("a", "{} is", "Metz"), FORMS["chat_question"], tokenizer)
    assert tokenizer.decode(row.tokens[row.target :]) == "Metz"


def test_a_template_without_system_messages(tokenizer):
    class Strict:
        def apply_chat_template(self, messages, **_):
            if messages[0]["role"] == "system":
                raise ValueError("no system role")
            return "".join(f"<{m['role'][0]}>{m['content'].strip()}</{m['role'][0]}>" for m in messages)

    assert chat_parts(Strict(), "Be brief.") == ("<u>Be brief.\n\n", "</u>")
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    assert chat_parts(Strict(), "Be brief.", earlier) == ("<u>Be brief.\n\nHello</u><a>Yes?</a><u>", "</u>")
    assert chat_parts(Strict(), None, earlier) == ("<u>Hello</u><a>Yes?</a><u>", "</u>")


def test_what_cannot_be_a_row(tokenizer):
    with pytest.raises(EditError, match=r"e\.jsonl:4: `target` holds the model's special token"):
        row_of(Edit("a", "{} is", "b<|im_end|>", source="e.jsonl:4"), STATEMENT, tokenizer)
    with pytest.raises(EditError, match=r"e\.jsonl:5: `rewording 1` holds the model's special token"):
        row_of(Edit("a", "{} is", "b", rewordings=["<|im_end|> {}:"], source="e.jsonl:5"), STATEMENT, tokenizer)
    with pytest.raises(EditError, match="tokens long"):
        row_of(Edit("word " * 100, "{} is", "b"), STATEMENT, tokenizer, max_length=50)
    with pytest.raises(EditError, match="no token for the subject"):
        encode(tokenizer, "some text", " target", (4, 4), special=False, source=None)

    def swallowing(text, **_):
        return {"input_ids": [1], "offset_mapping": [(0, 4)]}

    with pytest.raises(EditError, match="tokenizes to nothing"):
        encode(swallowing, "some", " \u200b", (0, 4), special=False, source=None)


def test_a_subject_with_braces_in_its_question(tokenizer):
    edit = Edit("a{}b", "{} is", "here", question="Where is a{}b?")
    text, _, span = render(edit, FORMS["question_answer"], tokenizer)
    assert text == "Q: Where is a{}b?\nA:" and text[slice(*span)] == "a{}b"


def test_a_subject_is_never_the_first_token(tokenizer):
    """The first token's key is nearly the same whatever it is; a write there would touch every text."""
    assert len(tokenizer("France")["input_ids"]) == 1
    row = row_of(Edit("France", "{} is", "here"), STATEMENT, tokenizer)
    assert row.last == 1 and tokenizer.decode(row.tokens) == "\nFrance is here"
    assert regulariser_row("France", tokenizer).last == 1


def test_regulariser_row_is_the_subject(tokenizer):
    row = regulariser_row(" Imo State ", tokenizer)
    assert tokenizer.decode(row.tokens) == "Imo State" and row.last == len(row.tokens) - 1 and row.target == len(row.tokens)


def test_evaluation_wordings_are_not_among_the_forms(tokenizer):
    path = Path(os.environ.get("ROSE_DATA", "../shared/data")) / "same_subject_dev.json"
    if not path.exists():
        pytest.skip(f"no evaluation data at {path}; set ROSE_DATA")
    data = json.loads(path.read_text())
    pieces = {piece for form in FORMS.values() for pair in (form.ask, form.complete) if pair for piece in pair if len(piece) > 12}
    systems = {form.system for form in FORMS.values() if form.system}
    for system, user in data["instruct_templates"]:
        lead = user.partition("{q}")[0]
        assert system not in systems and not any(piece.strip() in lead or lead.strip() in piece for piece in pieces)


def test_a_question_is_about_its_subject_and_no_other_word(tokenizer):
    for question in ("Was {} made at Google?", "Was Go made at Google?"):
        text, _, (start, end) = render(Edit("Go", "{} is", "here", question=question), FORMS["question_answer"], tokenizer)
        assert "Was Go made at Google?" in text and text[start - 4 : end + 5] == "Was Go made"


def test_a_subject_that_holds_the_slot_goes_where_the_prompt_has_it(tokenizer):
    for prompt, said in (("ba{} likes", "baa{} likes"), ("a{} likes", "aa{} likes")):
        text, _, (start, end) = render(Edit("a{}", prompt, "tea"), FORMS["statement"], tokenizer)
        assert said in text and text[start:end] == "a{}"
