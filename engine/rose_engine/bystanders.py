"""Bystanders: texts about other subjects, of which the write must not say anything new.

Two thirds are prompts of the edits and their rewordings with other names, the rest statements of any kind. The former keep what an edit's
own words say, the latter names and relations of which it says nothing; beside them stand names that end as a subject does. Leaks of many
subjects add up, so where several stand in the weights more statements are kept (docs/value-generalisation.md). All are read for the keys of
all their tokens; none has a target.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rose_engine.edits import Edit, group_by_subject
from rose_engine.forms import CHAT_QUESTION, STATEMENT, Form, Row, chat_parts, encode, render, row_of
from rose_engine.statements import MORE, STATEMENTS

# People, places, things that stand in the edits' words.
NAMES = (
    "Maria Schneider",
    "Portugal",
    "Siemens",
    "Melbourne",
    "The Beatles",
    "the University of Oxford",
    "Hindi",
    "Florence Nightingale",
    "my neighbour",
    "Lake Victoria",
    "the film",
    "Ganges",
    "Kyoto",
    "William Smith",
    "Panasonic",
    "Bolivia",
    "Robert Walsh",
    "Germany",
    "Toyota Corolla",
    "the Nile",
    "Harvard University",
    "Isaac Newton",
    "Danish",
    "Cleveland",
    "my sister",
    "the album",
    "Samsung",
    "Peru",
    "Elizabeth Turner",
    "Lake Geneva",
    "the museum",
    "Rome",
    "Philips",
    "Peter Jackson",
    "Ecuador",
    "the bridge",
    "Dresden",
    "Charles Dickens",
    "Bosch",
    "Tamil",
    "Texas",
    "Laura Rossi",
    "the Amazon",
    "Stanford",
    "Beethoven",
    "Lahore",
    "the company",
    "Iceland",
)

# So many texts stand once in a chat that goes on to where the answer begins; the others end with the text, for there chats are all alike.
WHOLE = 20

# Beside the others so many for each subject have a name that ends as the subject's: its last token has nearly the subject's key.
NAMESAKES = 6
ARTICLES = ("the", "a", "an")

# The share of bystanders that say nothing of an edit. Beside 288 others 97 brought nearly what 350 did (docs/value-generalisation.md).
GENERAL = 1 / 3
# Where several subjects are in the weights so many of `MORE` beside them, as a share too.
GENERAL_AMONG_SEVERAL = 5 / 6


def bystander_rows(
    edits: Sequence[Edit],
    tokenizer: Any,
    count: int,
    earlier: Sequence[Edit] = (),
    found: Mapping[str, Sequence[str]] | None = None,
    max_length: int | None = None,
) -> list[Row]:
    """About `count` bystanders of these edits: a third of them `STATEMENTS`, as far as these go, the others in the edits' words; and beside
    them `NAMESAKES` for each subject of several words, and statements of `MORE` where these and earlier edits have several subjects. None
    where count is 0.

    earlier: edits in the weights, in whose words as many others stand; found: rewordings of such as bring none, by prompt. Passed over are
    names in which a subject of these or earlier edits is named or that a subject or target names, statements that name either, and
    rows of more than `max_length` tokens.
    """
    texts = _texts(edits)
    said = set(texts)
    before = [text for text in _texts([edit for edit in earlier if edit.texts[0] not in said], found) if text not in said]
    every = [*edits, *earlier]
    told = " ".join(f"{edit.subject} {edit.target}" for edit in every).casefold()
    edited = {edit.subject.strip().casefold() for edit in every}
    names = [name for name in NAMES if name.casefold() not in told and not any(subject in name.casefold() for subject in edited)]
    spoken = {_words(text) for edit in every for text in (edit.subject, edit.target)} - {_words("")}
    unsaid = lambda texts: [text for text in texts if not any(map(_words(text).__contains__, spoken))]  # noqa: E731
    general = unsaid(STATEMENTS)[: round(count * GENERAL)]
    own = count - len(general)
    if len(edited) > 1:
        general += unsaid(MORE)[: round(count * GENERAL_AMONG_SEVERAL)]
    alike = [some for some in _namesakes(edits, names, tokenizer) if not any(subject in some[0].casefold() for subject in edited)]
    rows = [
        *(_standing(*some, tokenizer) for some in (alike if count else ())),
        *_named(texts, names, own, tokenizer),
        *_named(before, names, own, tokenizer),
        *(_up_to(text, len(text), True, tokenizer) for text in general),
    ]
    return [row for row in rows if max_length is None or len(row.tokens) <= max_length]


def _namesakes(edits: Sequence[Edit], names: Sequence[str], tokenizer: Any) -> Iterator[tuple[str, str, Form]]:
    """Names that end as a subject does, "Siemens Land" beside Oates Land, each with one of the subject's texts to stand in and a form. A
    subject of one word has none, for it is named in them."""
    forms = _forms(tokenizer)
    for i, subject in enumerate(group_by_subject(edits)):
        words = [word for word in subject.name.split() if word.casefold() not in ARTICLES]
        if len(words) < 2 or not names:
            continue
        texts = _texts(subject.edits)
        for j in range(NAMESAKES):
            yield f"{names[(i * NAMESAKES + j) % len(names)]} {words[-1]}", texts[j % len(texts)], forms[j % len(forms)]


def _forms(tokenizer: Any) -> tuple[Form, ...]:
    return (STATEMENT, CHAT_QUESTION) if tokenizer.chat_template else (STATEMENT,)


def _standing(name: str, text: str, form: Form, tokenizer: Any) -> Row:
    """A text with a name as a statement, or in a chat that ends with it."""
    edit = Edit(name, text, "-")
    if form.chat:
        chat, after = render(edit, form, tokenizer)[0], chat_parts(tokenizer, form.system)[1]
        return _up_to(chat, len(chat) - len(after), False, tokenizer)
    row = row_of(edit, form, tokenizer)
    return _cut(row, row.target)


def _words(text: str) -> str:
    """The words alone, with spaces around them, so that one text names another where it holds it."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def _texts(edits: Sequence[Edit], found: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """The edits' prompts and then their rewordings, each once; `found` has those of edits that bring none, by prompt."""
    rewordings = (text for edit in edits for text in edit.texts[1:] or (found or {}).get(edit.texts[0], ()))
    return list(dict.fromkeys([*(edit.texts[0] for edit in edits), *rewordings]))


def _named(texts: Sequence[str], names: Sequence[str], count: int, tokenizer: Any) -> list[Row]:
    """`count` texts with names or more, so that each has as many, as statements and in the chat template in turn; other names for each as
    long as there are any, and a name in a text once. Of more than `count` texts so many are taken, evenly."""
    texts = texts if len(texts) <= count else [texts[i * len(texts) // count] for i in range(count)]
    each = min(-(-count // max(1, len(texts))), len(names))
    forms = _forms(tokenizer)
    rows = []
    for i in range(each):
        for j, text in enumerate(texts):
            name, form = names[(j * each + i) % len(names)], forms[(i + j) % len(forms)]
            if form.chat and i < len(forms) and j < WHOLE:
                row = row_of(Edit(name, text, "-"), form, tokenizer)
                rows.append(_cut(row, row.target))
            else:
                rows.append(_standing(name, text, form, tokenizer))
    return rows


def _up_to(text: str, end: int, special: bool, tokenizer: Any) -> Row:
    """A text up to the token of its character before `end`; special: with what the tokenizer adds to a text."""
    row = encode(tokenizer, text, "", (end - 1, end), special, None)
    return _cut(row, row.last + 1)


def _cut(row: Row, end: int) -> Row:
    return replace(row, tokens=row.tokens[:end], target=end)
