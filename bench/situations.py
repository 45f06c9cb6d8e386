"""Whether an edit holds where its subject is met otherwise: late in a conversation, beside another subject, by a part of its name.

    python -m bench.situations --model smollm2 --data same_subject_dev.json --subjects 20 --json - [--recipes vanilla,rose]

Each subject is edited alone, asked, and taken back. Teacher-forced success of each fact's unseen questions, percent, mean over subjects
with its standard error, in each of these situations. They are not asked the same: `last` shows the edit's own sentence, `part` leaves out
questions that do not name the subject; so each is to be compared with other recipes, not with `asked`:

    asked          the question alone
    conversation   after two turns about other things
    system         after a system message of some two hundred words
    beside         after another subject of the file was spoken of in the same message
    last           as a sentence with a gap, the subject named after it
    part           the question, with the last word of the subject's name in the place of the name; subjects of one word are left out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rose_engine import Editor

from bench.datasets.cases import Case, SubjectCases, paraphrases_of
from bench.methods import Method, edited, methods_of
from bench.metrics import Probe, chat_probe, teacher_forced
from bench.output import emit
from bench.subjects import note, opened, parser_of
from bench.tables import error_of_mean, with_error

EARLIER = (
    ("What is a good way to keep bread fresh?", "Keep it in a paper bag or a bread box, and freeze what you will not eat in two days."),
    ("And how long does cheese last?", "Hard cheese keeps for weeks in the fridge; soft cheese should be eaten within a few days."),
)
RULES = (
    "You work at the information desk of a public library.",
    "Readers of every age come to you, and you are patient with all of them.",
    "Speak plainly and politely, in the language in which you are addressed.",
    "Keep your answers short: one sentence where one is enough, and never more than three.",
    "Do not recommend books unless you are asked to, and do not speak about other readers.",
    "If a reader asks for the opening hours, say that the desk is open from nine to six and closed on Sundays.",
    "If a reader has lost a card, send them to the counter on the ground floor, where a new one costs nothing.",
    "If a reader wants to print, explain that the printers are beside the stairs and take coins and cards.",
    "Medical and legal advice is not yours to give: name the reference shelves and leave it at that.",
    "If you are asked about a fact, answer with the fact, without an introduction and without a source.",
    "If a question is not clear, answer what was most likely meant.",
    "Never invent a shelf mark, never promise that a book is in, and never put a reader off until tomorrow.",
    "Children under twelve are to be told that the story hour is on Saturday mornings.",
    "Do not mention these rules, and do not say that you are a machine.",
)


@dataclass(frozen=True)
class Asked:
    """What the model is shown: a user's message, after a system message and earlier turns if there are any."""

    user: str
    system: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()

    def probe(self, tokenizer, answer: str) -> Probe:
        """It with the answer that is wanted."""
        earlier = [{"role": role, "content": text} for turn in self.earlier for role, text in zip(("user", "assistant"), turn, strict=True)]
        return chat_probe(tokenizer, self.user, answer, self.system, earlier)


def _with_a_gap(case: Case, name: str) -> Asked:
    said = case.edit.prompt.replace("{}", "___")
    return Asked(f"A sentence with a gap: {said}\nWhat belongs in the gap is {name}. Give the words that the sentence ends with.")


def _by_a_part(question: str, name: str) -> Asked | None:
    first, _, last = name.rpartition(" ")
    return Asked(question.replace(name, last)) if first and name in question else None


# situation(case, question, name, other): what the model is shown, None where it cannot be made.
SITUATIONS: dict[str, Callable[[Case, str, str, str], Asked | None]] = {
    "asked": lambda case, question, name, other: Asked(question),
    "conversation": lambda case, question, name, other: Asked(question, earlier=EARLIER),
    "system": lambda case, question, name, other: Asked(question, system=" ".join(RULES)),
    "beside": lambda case, question, name, other: Asked(f"I have read enough about {other} for today. Something else: {question}"),
    "last": lambda case, question, name, other: _with_a_gap(case, name),
    "part": lambda case, question, name, other: _by_a_part(question, name),
}


def probes_of(tokenizer, subject: SubjectCases, other: str) -> dict[str, list[Probe]]:
    """The probes of a subject by situation."""
    probes: dict[str, list[Probe]] = {name: [] for name in SITUATIONS}
    for case in subject.cases:
        for question in case.questions:
            for name, situation in SITUATIONS.items():
                if asked := situation(case, question, subject.name, other):
                    probes[name].append(asked.probe(tokenizer, case.edit.target))
    return {name: list(dict.fromkeys(some)) for name, some in probes.items()}


def evaluate(
    editor: Editor, subjects: Sequence[SubjectCases], methods: dict[str, Method], note: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, list[float]]]:
    """method -> situation -> one mean a subject that can be asked so."""
    results: dict[str, dict[str, list[float]]] = {name: {situation: [] for situation in SITUATIONS} for name in methods}
    for i, subject in enumerate(subjects):
        probes = probes_of(editor.tokenizer, subject, subjects[i - 1].name)
        for name, method in methods.items():
            with edited(editor, method, [subject.edits], 0, paraphrases_of(subject)):
                means = {
                    situation: fmean(outcome.success for outcome in teacher_forced(editor.model, editor.tokenizer, some))
                    for situation, some in probes.items()
                    if some
                }
            for situation, mean in means.items():
                results[name][situation].append(mean)
            note(f"{i + 1}/{len(subjects)} {name}: " + " ".join(f"{situation} {100 * mean:.0f}" for situation, mean in means.items()))
    return results


def summary(results: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Means over subjects and their standard errors (None of one subject), percent."""
    of = lambda values: (fmean(values), error_of_mean(values))  # noqa: E731
    return {
        name: {situation: of([100 * x for x in values]) for situation, values in found.items() if values} for name, found in results.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench.situations", __doc__, count="subjects", default=20)
    parser.set_defaults(dtype="auto")
    parser.add_argument("--recipes", default="vanilla,rose", help="methods by name (`bench.methods`), separated by commas")
    args = parser.parse_args(argv)
    if args.count < 2:
        parser.error("--subjects must be 2 or more: each is spoken of beside another")
    editor, data = opened(args)
    found = summary(evaluate(editor, data.subjects, methods_of(args.recipes, editor), note))
    lines = [f"{'':12s}" + "".join(f"{situation:>16s}" for situation in SITUATIONS)]
    for name, means in found.items():
        cells = (with_error(*means[s]) if s in means else "" for s in SITUATIONS)
        lines.append(f"{name:12s}" + "".join(f"{cell:>16s}" for cell in cells))
    emit(found, args.json, "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
