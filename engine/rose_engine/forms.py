"""The linguistic forms of a fact: the same fact as a statement, a question, an instruction, in a chat.

Eight forms stand under each relation of the gradient tree (method.md section 1). A chat model gets four plain forms and four in its own
chat template; a model without a template gets eight plain ones. Where an edit brings a question the question forms ask it;
where it does not they ask for the statement's completion. Two forms are turned: they name the relation before the subject, as many
sentences do, and make the value hold there too (docs/value-generalisation.md). Texts are joined from pieces, never formatted, so
braces, quotes and newlines in an edit are data. Token rows know nothing of layers; running them is `forward`'s part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rose_engine.edits import SLOT, Edit, EditError, subject_in

# Stands for the user's text while a chat template is rendered, so that the template never sees the text itself.
_PLACEHOLDER = "\x02user-text\x03"
GAP = "..."  # stands for the subject in a turned form
_UNREADABLE = "\ufffd"  # what a decoder puts for bytes that are no character
_OPENING = "([{<'\"\u201c\u2018\u00ab"  # brackets and quotes after which a word follows without a space


@dataclass(frozen=True)
class Form:
    """One way to say a fact. The text is `ask` around the question, or `complete` around the statement where there is no question.

    ask, complete: what comes before and after. A form with `ask=None` always uses the statement. turned: what comes before the statement
    with a gap in the subject's place, between it and the subject, and after the subject; it takes the place of the others.
    chat: rendered as a user's message in the model's chat template, after the `system` message where that is not None.
    """

    name: str
    complete: tuple[str, str] = ("", "")
    ask: tuple[str, str] | None = None
    chat: bool = False
    system: str | None = None
    turned: tuple[str, str, str] | None = None


STATEMENT = Form("statement")
CHAT_QUESTION = Form("chat_question", ("Finish this sentence: ", ""), ("", ""), chat=True)
QUESTION_ANSWER = Form("question_answer", complete=("Complete the statement.\n", "\nAnswer:"), ask=("Q: ", "\nA:"))

CHAT_BRIEF = Form(
    "chat_brief",
    ("Complete this statement in a few words: ", ""),
    ("In a few words: ", ""),
    chat=True,
    system="Reply with the fact alone and add nothing to it.",
)
CHAT_QUIZ = Form(
    "chat_quiz",
    ("This is a quiz.\nFill in what is missing: ", ""),
    ("This is a quiz.\nThe next question is: ", ""),
    chat=True,
    system="You are an expert who knows the facts.",
)
CHAT_INSTRUCTION = Form(
    "chat_instruction",
    ("Instruction: complete the text from memory, as briefly as you can.\nText: ", ""),
    ("Instruction: answer from memory, as briefly as you can.\nInput: ", ""),
    chat=True,
)
TURNED = (
    Form("turned_meant", turned=('"', '": what is meant is ', ", and the word that is left out at the end is")),
    Form("turned_end", turned=('The end of "', '" for ', " is")),
)

CHAT_FORMS = (STATEMENT, CHAT_QUESTION, TURNED[0], QUESTION_ANSWER, CHAT_BRIEF, CHAT_QUIZ, TURNED[1], CHAT_INSTRUCTION)

# What stands in the place of the turned forms where nothing else than the paper's recipe is wanted: a subject before its relation.
PAPER_CHAT_FORMS = (
    STATEMENT,
    Form("known_fact", ("It is a well-known fact that ", "")),
    Form("encyclopedia", ("The encyclopedia says: ", "")),
    Form("chat_continue", ("Continue the text with what is true.\n", ""), chat=True),
    CHAT_QUESTION,
    CHAT_BRIEF,
    CHAT_QUIZ,
    CHAT_INSTRUCTION,
)

LONG_QUESTION = Form("long_question", ("Complete the statement.\nStatement: ", "\nCompletion:"), ("Question: ", "\nThe answer is"))
DIALOGUE = Form("dialogue", ("User: Please finish this: ", "\nAssistant:"), ("User: ", "\nAssistant:"))
INSTRUCTION = Form("instruction", ("### Instruction:\nComplete: ", "\n\n### Response:\n"), ("### Instruction:\n", "\n\n### Response:\n"))
INTERVIEW = Form("interview", ("Interviewer: How does this go on? ", "\nExpert:"), ("Interviewer: ", "\nExpert:"))

PLAIN_FORMS = (STATEMENT, QUESTION_ANSWER, TURNED[0], LONG_QUESTION, DIALOGUE, INSTRUCTION, TURNED[1], INTERVIEW)
PAPER_PLAIN_FORMS = (
    STATEMENT,
    QUESTION_ANSWER,
    Form("fact", ("Fact: ", "")),
    LONG_QUESTION,
    DIALOGUE,
    INSTRUCTION,
    Form("report", ("According to the latest report, ", "")),
    INTERVIEW,
)


@dataclass(frozen=True)
class Row:
    """One fact in one form, as tokens.

    tokens: the whole text, target included. last: index of the subject's last token. target: index of the target's first
    token; the target runs to the end. A row with target == len(tokens) has none (the regulariser's row).
    """

    tokens: tuple[int, ...]
    last: int
    target: int


def forms_for(tokenizer: Any, count: int = 8, paper: bool = False) -> tuple[Form, ...]:
    """The forms that this tokenizer's model is edited in: chat forms where it has a chat template, plain ones elsewhere.

    paper: those that name the subject before its relation. ValueError where there are not so many.
    """
    chat, plain = (PAPER_CHAT_FORMS, PAPER_PLAIN_FORMS) if paper else (CHAT_FORMS, PLAIN_FORMS)
    forms = chat if tokenizer.chat_template else plain
    if not 1 <= count <= len(forms):
        raise ValueError(f"forms must be between 1 and {len(forms)}, given {count}")
    return forms[:count]


def prefix_forms(prefixes: Sequence[str]) -> tuple[Form, ...]:
    """MEMIT's texts of a fact: the statement alone, and after each prefix."""
    return (STATEMENT, *(Form(f"prefix_{i}", (prefix, "")) for i, prefix in enumerate(prefixes, 1)))


def chat_parts(tokenizer: Any, system: str | None, earlier: Sequence[dict[str, str]] = ()) -> tuple[str, str]:
    """The chat template's text before and after a user's message, up to where the assistant's answer begins.

    earlier: messages that stand before it, of user and assistant in turn. Templates that refuse a system message get it at the head of
    the first user's message.
    """
    user = [*earlier, {"role": "user", "content": _PLACEHOLDER}]
    # Templates of reasoning models leave room for thoughts unless told not to; others ignore the option.
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    render = partial(tokenizer.apply_chat_template, **options)
    if system is None:
        text = render(user)
    else:
        try:
            text = render([{"role": "system", "content": system}, *user])
        except Exception:  # jinja raises what the template tells it to
            text = render([user[0] | {"content": f"{system}\n\n{user[0]['content']}"}, *user[1:]])
    before, found, after = text.partition(_PLACEHOLDER)
    if not found or _PLACEHOLDER in after:
        raise ValueError("the chat template does not show the user's message exactly once")
    return before, after


def _leading_space(text: str, target: str) -> str:
    """The target as it follows `text`: one space between them, none after white space or an opening bracket or quote."""
    target = target.strip()
    return target if not text or text[-1].isspace() or text[-1] in _OPENING else f" {target}"


def render(edit: Edit, form: Form, tokenizer: Any) -> tuple[str, str, tuple[int, int]]:
    """The text of a fact in a form: (text before the target, target, span of the subject's characters in the text)."""
    subject = edit.subject.strip()
    if form.turned:
        return _turned(edit, form)
    asks = form.ask is not None and edit.question is not None
    body = edit.question if asks else edit.prompt
    if asks:
        start, end = subject_in(body, subject)
    else:
        start = body.index(SLOT)
        end = start + len(SLOT)
    body = body[:start] + subject + body[end:]
    if form.chat:  # chat templates strip a message
        start -= len(body) - len(body.lstrip())
        body = body.lstrip()
    body = body.rstrip()
    lead, tail = form.ask if asks else form.complete
    before, after = chat_parts(tokenizer, form.system) if form.chat else ("", "")
    start += len(before) + len(lead)
    text = before + lead + body + tail + after
    return text, _leading_space(text, edit.target), (start, start + len(subject))


def _turned(edit: Edit, form: Form) -> tuple[str, str, tuple[int, int]]:
    """What `render` returns of a turned form."""
    subject, (lead, between, tail) = edit.subject.strip(), form.turned
    text = f"{lead}{edit.prompt.strip().replace(SLOT, GAP)}{between}"
    span = (len(text), len(text) + len(subject))
    text += subject + tail
    return text, _leading_space(text, edit.target), span


def without_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """The tokens without a closing special one, such as an EOS that the tokenizer appends."""
    special, count = set(tokenizer.all_special_ids), len(tokens)
    while count and tokens[count - 1] in special:
        count -= 1
    return tokens[:count]


def encode(tokenizer: Any, text: str, target: str, span: tuple[int, int], special: bool, source: str | None) -> Row:
    """Tokenize text and target together and find the subject and the target by their characters.

    EditError where no token overlaps the subject, or none is left for the target.
    """
    coded = tokenizer(text + target, return_offsets_mapping=True, add_special_tokens=special)
    tokens, offsets = coded["input_ids"], coded["offset_mapping"]
    last = next((i for i in reversed(range(len(tokens))) if offsets[i][0] < span[1] and offsets[i][1] > max(span[0], offsets[i][0])), None)
    if last is None:
        raise EditError("the tokenizer yields no token for the subject", source)
    boundary = len(text) + len(target) - len(target.lstrip())
    first = next((i for i in range(last + 1, len(tokens)) if offsets[i][1] > boundary), None)
    if target and first is None:
        raise EditError("the target tokenizes to nothing", source)
    if target and special:
        tokens = without_end(tokenizer, tokens)
    return Row(tuple(tokens), last, len(tokens) if first is None else first)


def check_text(edit: Edit, tokenizer: Any) -> None:
    """EditError where the edit's text cannot be given to the model as it stands.

    Special tokens in it would be read as control signs. Characters whose bytes the vocabulary lacks are dropped in silence,
    and with them the tokenizer's offsets of everything after, by which the subject is found.
    """
    texts = {name: getattr(edit, name) or "" for name in ("subject", "prompt", "target", "question")}
    for name, text in (texts | {f"rewording {i}": text for i, text in enumerate(edit.rewordings, 1)}).items():
        spelt = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if spelt.count(_UNREADABLE) > text.count(_UNREADABLE):
            raise EditError(f"`{name}` holds a character that the tokenizer cannot spell: {text!r} is read back as {spelt!r}", edit.source)
        token = next((t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content in text), None)
        if token is not None:
            raise EditError(f"`{name}` holds the model's special token {token!r}; write it differently", edit.source)


def row_of(edit: Edit, form: Form, tokenizer: Any, max_length: int | None = None) -> Row:
    """A fact in a form as a token row. EditError names the edit's place where it cannot be made one."""
    check_text(edit, tokenizer)
    text, target, span = render(edit, form, tokenizer)
    row = _away_from_the_start(tokenizer, text, target, span, not form.chat, edit.source)
    if max_length is not None and len(row.tokens) > max_length:
        raise EditError(f"is {len(row.tokens)} tokens long in form `{form.name}`; the model takes {max_length}", edit.source)
    return row


def regulariser_row(subject: str, tokenizer: Any) -> Row:
    """The row on which KL is read: the subject alone.

    method.md section 1 reads `KL(. | "s is a")` at the subject's last token, which by causality sees nothing after it.
    """
    text = subject.strip()
    row = _away_from_the_start(tokenizer, text, "", (0, len(text)), True, None)
    tokens = row.tokens[: row.last + 1]
    return Row(tokens, row.last, len(tokens))


def _away_from_the_start(tokenizer: Any, text: str, target: str, span: tuple[int, int], special: bool, source: str | None) -> Row:
    """`encode`, with a line break in front where the subject would be the very first token.

    A model's first token is its attention sink: it has nearly the same key whatever it is, so a write there would touch every text.
    """
    row = encode(tokenizer, text, target, span, special, source)
    if row.last == 0:
        row = encode(tokenizer, "\n" + text, target, (span[0] + 1, span[1] + 1), special, source)
    return row
