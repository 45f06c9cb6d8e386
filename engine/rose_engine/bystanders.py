"""Bystanders: texts about other subjects, of which the write must not say anything new.

Two thirds are prompts of the edits and their rewordings with other names, the rest statements of any kind. The former keep what an edit's
own words say, the latter names and relations of which it says nothing (docs/value-generalisation.md). They are read for the keys of all
their tokens; none has a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rose_engine.edits import Edit
from rose_engine.forms import CHAT_QUESTION, STATEMENT, Row, chat_parts, encode, row_of

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

# Of the prompts in the chat template as many names' go on to where the answer begins; there they are all nearly alike.
WHOLE = 2

# Beginnings of sentences, each about somebody or something else.
STATEMENTS = (
    "Katarzyna Wojcik was born in the town of",
    "The first language of Bengt Lindqvist was",
    "Giuseppe Ferrante earned his living as a",
    "Emmy Noether was a professor at",
    "Valparaiso lies on the coast of",
    "The capital of Eritrea is",
    "Trondheim is twinned with the city of",
    "The head office of Ericsson is located in",
    "Michelin, a company based in",
    "The Walkman was manufactured by",
    "Firefox was written in the language",
    "Dmitri Voronov, who plays the",
    "The instrument that Fela Kuti played was the",
    "Usain Bolt competes in the sport of",
    "Steffi Graf, who grew up in",
    "The Seventh Seal was directed by",
    "Spirited Away was first shown in",
    "Twin Peaks was originally broadcast on",
    "Moby-Dick, a novel by",
    "The author of The Hobbit is",
    "Abbey Road was recorded by",
    "The Night Watch was painted by",
    "Uppsala University was established in",
    "Greenpeace was founded in the year",
    "The language spoken in Burkina Faso is",
    "In Andhra Pradesh the official language is",
    "Lake Titicaca is shared by",
    "Mount Elbrus is part of the",
    "Svalbard is ruled by",
    "Plovdiv is a city in",
    "The country where Isfahan is situated is",
    "Murasaki Shikibu died in",
    "Roald Amundsen lost his life near",
    "Clarice Lispector wrote her books in",
    "Chinua Achebe held the passport of",
    "Ayrton Senna held the nationality of",
    "The religion that Kublai Khan practised was",
    "Plotinus was a follower of",
    "Diego Rivera worked for many years in",
    "Umm Kulthum signed a contract with the label",
    "Kraftwerk got together in",
    "Radiohead, a band that comes from",
    "The genre of Daft Punk is",
    "Real Sociedad plays its home games in",
    "The Chicago Bulls have belonged since 1985 to",
    "Der Spiegel is published in",
    "The Economist has its offices in",
    "Volkswagen Beetle was built by",
    "The Boeing 737 was designed by",
    "Android Studio was released by",
    "Windows XP, a product of",
    "Game Boy was made by the company",
    "Guinness is brewed in",
    "Kimchi is a dish from",
    "The Suez Canal connects",
    "Angkor Wat was built by",
    "Burj Khalifa, the tower in",
    "Heathrow Airport is named after",
    "Machu Picchu stands high up in",
    "Wembley Stadium was opened in",
    "The first performance of The Magic Flute took place in",
    "Macbeth is a play about",
    "Sherlock Holmes lives at",
    "Darth Vader was played by the actor",
    "Mickey Mouse first appeared in",
    "Zeus is the father of",
    "Tetris, whose creator was",
    "The successor of Pope Clement XI was",
    "Queen Adelheid was married to",
    "Srinivasa Ramanujan studied at",
    "Hedy Lamarr is famous for",
    "The doctor who treated Ludmila Sokolova was",
    "Kwame Asante has been employed by",
    "Siobhan Gallagher moved from Cork to",
    "Nguyen Van Hai speaks",
    "The wife of Henri Delacroix was called",
    "Park Ji-hoon is the leader of the",
    "Cecilia Nyström received the prize for",
    "The party that Thabo Nkosi belongs to is",
    "Swahili is spoken by people in",
    "Tyrannosaurus lived during the",
    "Penicillin was discovered by",
    "Ganymede is a moon of",
    "The chemical symbol of Uranium is",
    "Halley's Comet was last seen in",
    "The Battle of Hastings was fought in",
    "The Treaty of Versailles was signed by",
    "Lutheranism spread from",
    "Esperanto was invented by",
    "Interpol has its headquarters in",
    "Tata Motors is owned by the",
    "Lego bricks are produced in",
    "Patagonia is a region of",
    "In Zanzibar, most people are",
    "The bridge over the Zambezi leads to",
    "My grandmother always wanted to",
)


def bystander_rows(
    edits: Sequence[Edit],
    tokenizer: Any,
    count: int,
    earlier: Sequence[Edit] = (),
    found: Mapping[str, Sequence[str]] | None = None,
    max_length: int | None = None,
) -> list[Row]:
    """About `count` bystanders of these edits: a third of them `STATEMENTS`, as far as these go, the others in the edits' words.

    earlier: edits in the weights, in whose words as many others stand; found: rewordings of such as bring none, by prompt. Texts that
    name a subject or a target of these or of earlier edits are passed over, and so are rows of more than `max_length` tokens.
    """
    texts = _texts(edits, {})
    before = [text for text in _texts([edit for edit in earlier if edit.texts[0] not in texts], found or {}) if text not in texts]
    every = [*edits, *earlier]
    told = " ".join(f"{edit.subject} {edit.target}" for edit in every).casefold()
    edited = {edit.subject.strip().casefold() for edit in every}
    names = [name for name in NAMES if name.casefold() not in told and not any(subject in name.casefold() for subject in edited)]
    spoken = [f" {name} " for name in edited | {edit.target.strip().casefold() for edit in every}]
    general = [text for text in STATEMENTS if not any(name in f" {text.casefold().replace(',', '')} " for name in spoken)][: count // 3]
    own = count - count // 3
    rows = [*_named(texts, names, own, tokenizer), *_named(before, names, own, tokenizer), *(_plain(text, tokenizer) for text in general)]
    return [row for row in rows if max_length is None or len(row.tokens) <= max_length]


def _texts(edits: Sequence[Edit], found: Mapping[str, Sequence[str]]) -> list[str]:
    """The edits' prompts and then their rewordings, each once; `found` has those of edits that bring none, by prompt."""
    rewordings = (text for edit in edits for text in edit.texts[1:] or found.get(edit.texts[0], ()))
    return list(dict.fromkeys([*(edit.texts[0] for edit in edits), *rewordings]))


def _named(texts: Sequence[str], names: Sequence[str], count: int, tokenizer: Any) -> list[Row]:
    """About `count` texts with names, as statements and in the chat template in turn: as many for every text, with other names for each as
    long as there are any; a name stands in a text once."""
    texts = texts[:count]
    each = min(-(-count // max(1, len(texts))), len(names))
    forms = (STATEMENT, CHAT_QUESTION) if tokenizer.chat_template else (STATEMENT,)
    end = len(tokenizer(chat_parts(tokenizer, None)[1], add_special_tokens=False)["input_ids"]) if len(forms) > 1 else 0
    rows = []
    for i in range(each):
        for j, text in enumerate(texts):
            form = forms[(i + j) % len(forms)]
            row = row_of(Edit(names[(j * each + i) % len(names)], text, "-"), form, tokenizer)
            rows.append(_cut(row, row.target - (end if form.chat and i >= WHOLE else 0)))
    return rows


def _plain(text: str, tokenizer: Any) -> Row:
    """A statement as it stands."""
    row = encode(tokenizer, text, "", (0, len(text)), True, None)
    return _cut(row, row.last + 1)


def _cut(row: Row, end: int) -> Row:
    return replace(row, tokens=row.tokens[:end], target=end)
